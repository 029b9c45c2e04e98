"""What `docs/service.md` and `deploy/` say is what the service does."""

import os
import re
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.service.settings import ServiceSettings

from ..serving import service_in_thread

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "service.md").read_text()


@pytest.mark.slow
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    if find_spec("openai") is None or shutil.which("openssl") is None or shutil.which("curl") is None:
        pytest.skip("the page uses openai, openssl and curl")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        ports = {"8700": one.getsockname()[1], "8800": other.getsockname()[1]}
    (tmp_path / "model").symlink_to(BUNDLED_MODEL)
    tools = tmp_path / "bin"
    tools.mkdir()
    program = f'#!/bin/sh\nexec "{sys.executable}" -c "from kvloom.cli import main; main()" "$@"\n'
    (tools / "kvloom").write_text(program)
    (tools / "kvloom").chmod(0o755)
    lines = ["set -e", "set -m", "export PYTHONUNBUFFERED=1"]
    for language, text in re.findall(r"^```(sh|python)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL):
        lines.append(text if language == "sh" else f"{sys.executable} - <<'PYTHON'\n{text}PYTHON\n")
    script = re.sub("8700|8800", lambda match: str(ports[match[0]]), "\n".join(lines)) + "\necho the end\n"
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("the end\n"), done.stdout[-2000:] + done.stderr[-3000:]
    events = re.findall(r"event: (\w+)$", done.stdout, flags=re.MULTILINE)  # the first follows what has no line end
    assert events[-1] == "finished" and '"answer":"' in done.stdout and "'reused_tokens':" in done.stdout


def test_settings_that_are_named_exist() -> None:
    files = [PAGE, *(path.read_text() for path in (ROOT / "deploy").iterdir())]
    named = {name.lower() for text in files for name in re.findall(r"KVLOOM_([A-Z_]+)\b", text)} - {"config", ""}
    named |= set(re.findall(r"--set ([a-z_]+)", PAGE))
    assert named <= set(ServiceSettings.model_fields)


def test_the_routes_that_are_named_exist(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service:
        known = service.ask("GET", "/openapi.json", token=None).json()["paths"]
    shapes = {re.sub(r"\{[^}]*\}", "X", path) for path in known}
    for path in re.findall(r"/v1/[A-Za-z$/-]+", PAGE):
        assert re.sub(r"/(KEY|ID|NAME|team-a|\$JOB)\b", "/X", path).rstrip("/") in shapes, path
