"""The command line: what works at once, and that failures are one line and exit code 2."""

import inspect
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from kvloom import __version__, cli
from kvloom.cli import certify
from kvloom.errors import TierUnavailableError
from kvloom.evaluation.environment import ROOT
from kvloom.evaluation.report import BenchResult, Metric

from ..support.commands import refusal


def run(*args: str) -> int:
    """Exit code of the command line in this process."""
    with pytest.raises(SystemExit) as leave:
        cli.main(args)
    return int(leave.value.code or 0)


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
    assert done.stderr == (
        "kvloom: No such command 'nothing'; known: blend, codecs, plan, controller, distributed, eviction, retrieval, "
        "schedule, service, tiers, sglang, vllm, rag; see kvloom bench --help\n"
    )


@pytest.mark.parametrize("option", ["--dir", "--lmcache-python", "--report", "--sizes"])
def test_options_of_another_benchmark_are_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "bench", "blend", option, "here")
    assert said.startswith(f"kvloom: No such option: {option}") and said.endswith("; see kvloom bench blend --help")


@pytest.mark.parametrize("command", [[], ["bench"]])
def test_no_command_shows_the_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command) == 2
    captured = capsys.readouterr()
    assert ("Usage: kvloom" in captured.out and "tiers" in captured.out) or "doctor" in captured.out
    assert captured.err == ""


WRONG = {
    "bench tiers --quick --dir {file}": "Invalid value for '--dir': {file} is not a folder",
    "bench tiers --lmcache-python {missing}": "there is no file {missing}",
    "bench codecs --dir {missing}": "Invalid value for '--dir': {missing} is not a folder",
    "bench codecs --report {folder}/x.pdf": "{folder}/x.pdf ends in .pdf; expected .html",
    "bench retrieval --sizes 12,,13": "--sizes is '12,,13'; expected items with one comma between two",
    "bench retrieval --sizes 4k": "--sizes has '4k'; expected a number of tokens such as 4096",
    "bench retrieval --sizes -5": "--sizes has '-5'; expected a number of tokens such as 4096",
    "bench retrieval --sizes 20": "sizes are 20; expected 256 to",
    "bench vllm --json {folder}": "cannot write {folder}: it is a folder",
    "calibrate reference -o {folder}/x": "no text; name files or folders of it with --text",
    "calibrate reference --text {file}": "Missing option '-o' / '--out'",
    "calibrate reference -o {folder}/x --text {missing}": "there is no file or folder {missing}",
    "calibrate reference -o {folder}/x --text {file} --tokens 3": "Invalid value for '--tokens'",
    "calibrate {missing} -o {folder}/x --text {file}": "no model in {missing}",
    "calibrate reference -o {folder}/x --text {file}": "the text has",
    "certify": "Missing argument 'MODEL'",
    "certify reference": "give one of --codec, --retrieval and --fusion",
    "certify reference --codec nuq4 --fusion": "give one of --codec, --retrieval and --fusion",
    "certify reference --codec zip": "unknown codec 'zip'; known: raw",
    "certify reference --codec nuq4": "kvloom calibrate",
    "certify reference --codec raw --profile {missing}": "there is no file {missing}",
    "certify reference --codec raw --profile {file}": "cannot be read as a profile",
    "certify reference --codec raw --text-windows 0": "Invalid value for '--text-windows'",
    "certify reference --codec raw --tasks chess": "tasks are chess; expected some of auto, none",
    "certify reference --codec raw --dtype int3": "dtype is 'int3'; expected one of auto",
    "certify reference --codec raw --max-kl nan": "limit is nan",
    "certify reference --retrieval magic": "magic",
    "certify reference --retrieval exact --budget-ratio 2": "budget_ratio is 2.0",
    "certify reference --retrieval exact --window-tokens -1": "window_tokens is -1",
    "certify reference --retrieval exact --parameter rank": "--parameter is 'rank'; expected NAME=VALUE",
    "certify reference --fusion --ratios a": "--ratios has 'a'; expected a number",
    "certify reference --fusion --ratios 2": "ratios are [2.0]; expected shares above 0 and below 1",
    "certify reference --fusion --tasks chess": "chess",
    "certify reference --fusion --budget-ratio 0.1": "--budget-ratio belongs to --retrieval, not to --fusion",
    "certify reference --codec raw --ratios 0.1": "--ratios belongs to --fusion, not to --codec",
    "certify reference --fusion --text {file}": "--text belongs to --codec and --retrieval, not to --fusion",
    "demo --model {missing}": "{missing} is not a folder",
    "demo --model {folder}": "no model in {folder}",
    "demo --docs {file}": "{file} is not a folder",
    "demo --docs {folder}": "no documents in {folder}",
    "demo --store {file}": "{file}",
    "demo --report {file}/x": "cannot write {file}/x: Not a directory",
    "demo --question": "requires an argument",
    "doctor --dir ~nobody-at-all": "~nobody-at-all: there is no such home folder",
    "doctor extra": "unexpected extra argument",
    "simulate {missing}": "there is no file {missing}",
    "simulate {folder}": "{folder} is a folder; expected a file",
    "simulate {file}": "line 1 is not JSON",
    "simulate {file} --capacity 5": "--capacity has '5'; expected a percentage such as 5%",
    "simulate {file} --capacity 0%": "capacity is 0%",
    "simulate {file} --codec-ratio 0.5": "codec ratio is 0.5",
    "simulate {file} --policy lru,mru": "policy is 'mru'; expected some of",
    "simulate {file} --report {folder}/x.png": "ends in .png; expected .html or .svg",
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_arguments(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"folder": tmp_path / "folder", "file": tmp_path / "file.txt", "missing": tmp_path / "missing"}
    names["folder"].mkdir()
    names["file"].write_text("Too short.")
    assert WRONG[command].format(**names) in refusal(capsys, *(word.format(**names) for word in command.split()))
    assert list(names["folder"].iterdir()) == []
    assert names["file"].read_text() == "Too short."


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["doctor", "--json", ""], "--json"),
        (["doctor", "--dir="], "--dir"),
        (["demo", "--store", "", "--quick"], "--store"),
        (["certify", ""], "an argument"),
    ],
)
def test_nothing_may_be_empty(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, *arguments) == f"kvloom: {name} is empty; give it a value, or leave it out"


@pytest.mark.parametrize("columns", ["0", "1", "00", "99999999999999", "-3", "wide"])
def test_absurd_widths_print(columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert run("doctor", "--help") == 0
    assert "Folder whose disk is measured" in capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(
        "kvloom.bench.doctor.run.diagnose", lambda *_, **__: BenchResult("doctor", {"speed": Metric(1.5, 1, 2)})
    )
    assert run("doctor") == 0
    assert "1 to 2" in capsys.readouterr().out


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("kvloom.bench.doctor.run.diagnose", lambda *_, **__: BenchResult("doctor", {}))
    assert run("doctor", "--json=~/out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text())["bench"] == "doctor"


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_output_is_refused_before_the_work(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "kvloom.bench.demo.run", None)  # importing it would fail: the work must not begin
    for place in (tmp_path / "missing" / "out", tmp_path, Path("/proc/out")):
        line = refusal(capsys, "demo", option, str(place))
        assert line.startswith(f"kvloom: Invalid value for '{option}': cannot write {place}: ")
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
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("kvloom.bench.doctor.run.diagnose", fail)
    assert line in refusal(capsys, "doctor")
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
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("kvloom.bench.doctor.run.diagnose", fail)
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


def test_doctor_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.bench.doctor import run as doctor

    monkeypatch.setattr(doctor, "usable", lambda module: module != "matplotlib")
    found = {str(row["subject"]): row["finding"] for row in doctor.diagnose(tmp_path).rows}
    extras = {name.removeprefix("extra "): finding for name, finding in found.items() if name.startswith("extra ")}
    assert extras.pop("bench") == 'matplotlib missing; run: pip install "kvloom[bench]"'
    assert set(extras.values()) == {"usable"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    told = {name for name, needs in project["optional-dependencies"].items() if needs and name != "dev"}
    assert {"bench", *extras} == told


def test_doctor_without_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in refusal(capsys, "doctor", "--dir", str(tmp_path / "missing"))


def test_options_that_belong_to_one_kind_of_certificate_exist() -> None:
    assert set(certify.BELONGS_TO) <= set(inspect.signature(certify.certify).parameters)


def test_files_are_written_although_the_output_is_not_read(tmp_path: Path) -> None:
    command = f"{sys.executable} -m kvloom.cli doctor --dir {tmp_path} --json {tmp_path}/out.json | true"
    subprocess.run(["/bin/sh", "-c", command], check=True, capture_output=True)
    assert json.loads((tmp_path / "out.json").read_text())["bench"] == "doctor"
