"""The command line: what works at once, and that failures are one line and exit code 2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kvloom import __version__, cli
from kvloom.errors import TierUnavailableError


def run(*args: str) -> int:
    """Exit code of the command line in this process."""
    with pytest.raises(SystemExit) as leave:
        cli.main(args)
    return int(leave.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.endswith("\n")
    assert captured.err.count("\n") == 1
    return captured.err.strip()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"kvloom {__version__}\n"


@pytest.mark.parametrize("command", [[], ["demo"], ["bench"], ["doctor"]])
def test_help(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    assert run(*command, "--help") == 0
    shown = capsys.readouterr().out
    expected = {"demo": "--report", "bench": "blend", "doctor": "--json"}
    for name in command or ("demo", "bench", "doctor"):
        assert (expected[name] if command else name) in shown


def test_runs_as_a_module_from_anywhere(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvloom.cli", "bench", "nothing"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "kvloom: unknown benchmark 'nothing'; known: blend, codecs, retrieval, tiers, vllm\n"


def test_unknown_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "nothing") == 2
    line = one_line(capsys)
    for name in cli.BENCHMARKS:
        assert name in line


@pytest.mark.parametrize(
    ("option", "takers"),
    [
        ("--dir", "codecs, tiers and vllm"),
        ("--lmcache-python", "tiers and vllm"),
        ("--report", "codecs, retrieval and vllm"),
        ("--sizes", "retrieval"),
    ],
)
def test_options_of_another_benchmark_are_refused(option: str, takers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "blend", option, "here") == 2
    assert one_line(capsys) == f"kvloom: {option} belongs to {takers}, not to blend"


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_output_is_refused_before_the_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvloom.bench.demo.run", None)  # importing it would fail: the work must not begin
    for place in (tmp_path / "missing" / "out", tmp_path, Path("/proc/out")):
        assert run("demo", option, str(place)) == 2
        line = one_line(capsys)
        assert line.startswith(f"kvloom: cannot write {place}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TierUnavailableError("store is used by\nanother process"), "kvloom: store is used by another process"),
        (ValueError("no documents in x; name a folder of texts"), "kvloom: no documents in x; name a folder of texts"),
        (ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"), 'pip install "kvloom[bench]"'),
        (ImportError("needs transformers: pip install x"), "kvloom: needs transformers: pip install x"),
    ],
)
def test_expected_failures(
    error: Exception, line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr("kvloom.bench.doctor.diagnose", fail)
    assert run("doctor") == 2
    assert line in one_line(capsys)
    monkeypatch.setenv("KVLOOM_TRACEBACK", "1")
    with pytest.raises(type(error)):
        cli.main(["doctor"])


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'kvloom.gone'", name="kvloom.gone"),
        ImportError("cannot import name 'x' from 'kvloom.core'", name="kvloom.core"),
        KeyError("x"),
    ],
)
def test_bugs_keep_their_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise error

    monkeypatch.setattr("kvloom.bench.doctor.diagnose", fail)
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_doctor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "disk", tmp_path / "doctor.json"
    folder.mkdir()
    assert run("doctor", "--dir", str(folder), "--json", str(out)) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["bench"] == "doctor"
    assert {"host_copy_speed", "disk_write_speed", "disk_read_speed"} <= set(found["metrics"])
    for metric in found["metrics"].values():
        assert 0 < metric["low"] <= metric["value"] <= metric["high"]
        assert metric["unit"] == "GB/s"
    assert {"extra bench", "extra transformers", "reference model"} <= {row["subject"] for row in found["rows"]}
    assert found["env"]["torch"] in shown
    assert list(folder.iterdir()) == []


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.bench import doctor

    monkeypatch.setattr(doctor, "usable", lambda module: module != "matplotlib")
    assert {row["subject"]: row["finding"] for row in doctor._extras()} == {
        "extra transformers": "usable",
        "extra bench": 'matplotlib missing; run: pip install "kvloom[bench]"',
        "extra bench-peers": "usable",
    }


def test_doctor_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", "--dir", str(tmp_path / "missing")) == 2
    assert "is not a folder" in one_line(capsys)
