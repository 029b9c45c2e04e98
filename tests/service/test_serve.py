"""`kvloom serve` as a process: first start, refusals, restart, an orderly end."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom.service.access.credentials import TokenFile
from kvloom.service.self_check import check_settings
from kvloom.service.settings import ServiceSettings
from kvloom.testing.chunks import make_blob, make_key, same_blob

from .serving import service_process

KVLOOM = [sys.executable, "-c", "from kvloom.cli import main; main()"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KVLOOM, *arguments], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_first_start_shows_a_token_once_and_the_next_does_not(tmp_path: Path) -> None:
    with service_process(tmp_path / "kv") as service:
        assert re.fullmatch(r"kvloom serves http://127\.0\.0\.1:\d+, .*", service.lines[0])
        service.client().put(make_key(1), make_blob(1))
        other = run("serve", "--directory", str(tmp_path / "kv"), "--port", "0")
        assert other.returncode == 2 and "another service uses" in other.stderr
        assert service.stop() == 0
        shown = [line for line in service.lines if "token, shown only now" in line]
        assert len(shown) == 1
        token = shown[0].split()[-1]
    with service_process(tmp_path / "kv") as service:
        found = service.client(token).get(make_key(1))
        assert found is not None and same_blob(found, make_blob(1))
        assert service.stop() == 0
        assert not any("shown only now" in line for line in service.lines)
    listed = run("token", "list", "--directory", str(tmp_path / "kv")).stdout.splitlines()
    assert len(listed) == 3 and token.split("_")[2] not in "".join(listed)
    assert run("token", "revoke", token.split("_")[1], "--directory", str(tmp_path / "kv")).returncode == 0
    assert run("token", "revoke", "nothing", "--directory", str(tmp_path / "kv")).returncode == 2


def test_an_address_that_others_reach_needs_tls_and_tokens(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        refused = run("serve", "--directory", str(tmp_path / "kv"), "--host", host, "--port", "0")
        assert refused.returncode == 2 and "tls_certificate" in refused.stderr, refused.stderr
    options = ["--set", f"tls_certificate={tmp_path}/a.pem", "--set", f"tls_key={tmp_path}/b.pem"]
    refused = run("serve", "--directory", str(tmp_path / "kv"), "--host", "0.0.0.0", "--port", "0", *options)
    assert refused.returncode == 2 and "kvloom token create" in refused.stderr


def test_what_lies_in_the_directory_is_its_owners_alone(tmp_path: Path) -> None:
    directory = tmp_path / "kv"
    directory.mkdir(mode=0o755)
    old = TokenFile(directory / "tokens.json").create("default", ["read"])
    (directory / "tokens.json").chmod(0o644)
    with service_process(directory) as service:
        assert service.ask("GET", "/v1/stats", token=old).status == 200
        service.client().put(make_key(1), make_blob(1))
        others = [path for path in directory.rglob("*") if path.stat().st_mode & 0o077 and path.parent == directory]
        assert others == [] and directory.stat().st_mode & 0o777 == 0o755
        assert service.stop() == 0 and service.lines[-1].startswith("kvloom has stopped")
    directory.chmod(0o775)
    refused = run("serve", "--directory", str(directory), "--port", "0")
    assert refused.returncode == 2 and f"chmod go-w {directory}" in refused.stderr


def test_an_end_that_is_asked_for_during_the_start_is_orderly(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*KVLOOM, "serve", "--directory", str(tmp_path / "kv"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and "serves http" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)  # it listens, and is about to load the rest
        _, err = process.communicate(timeout=120)
    assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in err, err


WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
EXTRAS = ("transformers", "tokenizers", "openai", "zmq", "msgspec", "opentelemetry", "faiss", "numba", "zstandard")


def test_it_needs_nothing_but_its_own_extra(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(names=EXTRAS))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with service_process(tmp_path / "kv", env={"PYTHONPATH": path}) as service:
        service.client().put(make_key(1), make_blob(1))
        assert service.client().match([make_key(1)]) == 1
        assert service.ask("POST", "/v1/completions", {"model": "x", "prompt": "x"}).status == 404
        assert service.stop() == 0


def test_models_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.service.self_check.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'kvloom\[service,transformers\]'"):
        check_settings(ServiceSettings(models={"tiny": Path("x")}), has_tokens=True)
