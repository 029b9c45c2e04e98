"""The packages that a service is made of: pinned, complete, and without weaknesses that are known."""

import importlib.metadata as metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[3]
PINS = dict(
    re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower().replace("_", "-"), re.MULTILINE)
)
KNOWN_BAD = "urllib3==1.26.4"  # CVE-2021-33503: a database that does not know it was not reached


def closure() -> set[str]:
    """Names of all packages that `kvloom[service]` needs on this system, by what is installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [Requirement(each) for each in project["dependencies"] + extras["service"] + extras["metrics"]]
    found: set[str] = set()
    while waiting:
        each = waiting.pop()
        name = each.name.lower().replace("_", "-")
        if name in found or name == "kvloom" or (each.marker is not None and not each.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        waiting += map(Requirement, metadata.requires(name) or [])
    return found


def test_all_that_a_service_needs_is_pinned_and_installed_as_pinned() -> None:
    needed = closure()
    assert {"fastapi", "uvicorn", "httptools", "pydantic-settings", "starlette"} <= needed
    assert "transformers" not in needed and len(needed) < 60
    assert needed - PINS.keys() == set()
    for name in needed:
        assert metadata.version(name).lower().split("+")[0] == PINS[name], name


def audit(requirements: list[str], folder: Path) -> list[dict[str, object]]:
    """What pip-audit says of each package."""
    file = folder / "requirements.txt"
    file.write_text("\n".join(requirements) + "\n")
    command = [sys.executable, "-m", "pip_audit", "-r", str(file), "--no-deps", "--disable-pip", "-f", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off", "--timeout", "10"],
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    try:
        return list(json.loads(done.stdout)["dependencies"])
    except (LookupError, ValueError):
        pytest.skip(f"pip-audit reaches no database of advisories: {done.stderr.strip()[-200:]}")


@pytest.mark.slow
def test_no_package_of_a_service_has_a_known_weakness(tmp_path: Path) -> None:
    pytest.importorskip("pip_audit", reason="pip install pip-audit")
    if not any(each.get("vulns") for each in audit([KNOWN_BAD], tmp_path)):
        pytest.skip(f"the database of advisories cannot be reached from here: it does not know {KNOWN_BAD}")
    found = audit([f"{name}=={PINS[name]}" for name in sorted(closure())], tmp_path)
    weak = {each["name"]: each["vulns"] for each in found if each.get("vulns")}
    assert weak == {}
