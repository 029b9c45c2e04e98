"""The journal of requests, and `kvloom explain`, which reads it."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from kvloom import cli
from kvloom.connectors.serving.controller.decisions import Reason
from kvloom.connectors.serving.explanations import WHY, explanation
from kvloom.connectors.serving.messages import Loaded, StepReport
from kvloom.connectors.serving.request_journal import RequestJournal, read_journal
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import ServingSettings

from ..support.commands import refusal
from ..support.faulty import eventually, leaves_no_threads
from .test_planner import BLOCK, CHUNK, PLAIN, SPEC, blocks_for


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def record(**more: object) -> dict[str, Any]:
    return {
        "request": "cmpl-1",
        "at_s": 0.0,
        "prompt_tokens": 2080,
        "found_tokens": {"disk": 2048},
        "loaded_tokens": {"disk": 2048},
        "load_s": 0.0123,
        "decision": "loads",
        "expected_load_s": 0.015,
        "expected_compute_s": 1.9,
        **more,
    }


def run(*args: str) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main(["explain", *args])
    return int(leave.value.code or 0)


def journal(folder: Path, *ids: str, requests: int = 100) -> Path:
    kept = RequestJournal(folder, requests)
    for name in ids:
        kept.append(name, {"prompt_tokens": 8, "decision": "slow tier", "found_tokens": {"disk": 8}})
        assert eventually(lambda name=name: read_all(folder)[-1:] == [name])  # type: ignore[misc]
    return folder


def read_all(folder: Path) -> list[str]:
    try:
        return [each["request"] for each in read_journal(folder)]
    except ValueError:
        return []


def test_every_reason_is_explained() -> None:
    assert set(WHY) == set(get_args(Reason))


def test_a_line_says_what_was_done_and_why() -> None:
    line = explanation(record())
    assert "cmpl-1" in line and "2,048 of 2,080 prompt tokens were loaded (disk) in 12.3 ms" in line
    assert "loads: that was expected to be fastest" in line and "15 ms with a load, 1.9 s without" in line
    line = explanation(record(loaded_tokens={}, decision="slow tier"))
    assert "all 2,080 prompt tokens were computed, though 2,048 were stored (disk); slow tier: the tier gives" in line
    line = explanation(record(loaded_tokens={"host": 256, "disk": 256}, decision="shortened", failed=True))
    assert "512 of 2,080 prompt tokens were loaded (host 256, disk 256)" in line and "lost on the way" in line
    line = explanation(record(decision=None, fused="yes", computed_tokens=300))
    assert "its documents were fused, and 300 tokens of them computed" in line
    assert "\n" not in line
    assert "nothing was to be decided" in explanation({"request": "r"})


def test_a_request_is_found_by_its_id_or_how_it_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = journal(tmp_path / "new", "cmpl-1", "cmpl-12", "chat-3")
    assert run("cmpl-1", "--disk-path", str(folder)) == 0
    assert capsys.readouterr().out.count("\n") == 1, "the very ID comes before others that begin like it"
    assert run("cmpl", "--disk-path", str(folder)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in shown] == ["cmpl-1", "cmpl-12"]
    assert run("ch", "--disk-path", str(folder), "--json", str(tmp_path / "out.json")) == 0
    (told,) = json.loads((tmp_path / "out.json").read_text())
    assert (told["request"], told["decision"]) == ("chat-3", "slow tier")


def test_the_last_ones_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = journal(tmp_path, "a-request", "b-request", "c-request")
    assert run("--last", "2", "--disk-path", str(folder)) == 0
    shown = capsys.readouterr().out
    assert "a-request" not in shown and "b-request" in shown and "c-request" in shown and "slow tier" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["x", "--disk-path", "{there}"], "no request 'x' among the last 1 in"),
        (["x", "--disk-path", "{empty}"], "has no requests.jsonl; expected the disk_path"),
        (["x", "--disk-path", "{empty}/none"], "is not a folder"),
        (["--disk-path", "{there}"], "give the ID of a request, or --last N"),
        (["r", "--last", "2", "--disk-path", "{there}"], "not both"),
        (["--last", "0", "--disk-path", "{there}"], "--last"),
        (["r"], "Missing option '--disk-path'"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    journal(tmp_path / "there", "r")
    (tmp_path / "empty").mkdir()
    places = {"there": tmp_path / "there", "empty": tmp_path / "empty"}
    assert message in refusal(capsys, "explain", *(arg.format(**places) for arg in args))


def test_old_requests_are_forgotten_and_torn_lines_left_out(tmp_path: Path) -> None:
    kept = RequestJournal(tmp_path, 20)
    for number in range(400):
        kept.append(f"r{number}", {"prompt_tokens": number, "note": "x" * 300})
        if number % 50 == 49:
            assert eventually(lambda number=number: read_all(tmp_path)[-1:] == [f"r{number}"])  # type: ignore[misc]
    names = read_all(tmp_path)
    assert names == [f"r{number}" for number in range(400 - len(names), 400)]
    assert 20 <= len(names) <= 80
    with (tmp_path / "requests.jsonl").open("a") as file:
        file.write('{"request": "torn')
    assert read_all(tmp_path) == names


def test_several_processes_lose_nothing(tmp_path: Path) -> None:
    journals = [RequestJournal(tmp_path, 10_000) for _ in range(4)]

    def write(number: int) -> None:
        for count in range(50):
            journals[number].append(f"{number}-{count}", {"prompt_tokens": 1})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert eventually(lambda: len(read_all(tmp_path)) == 200)
    names = read_all(tmp_path)
    assert len(set(names)) == 200
    assert [name for name in names if name.startswith("2-")] == [f"2-{count}" for count in range(50)]


def test_a_folder_that_cannot_be_written_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = RequestJournal(tmp_path / "file", 10)
    for name in ("a", "b", "c"):
        kept.append(name, {})
        assert eventually(lambda: not kept._is_writing)
    assert caplog.text.count("cannot be written") == 1


@pytest.mark.parametrize("settings", [{"journal_requests": 0}, {}])
def test_what_a_scheduler_has_decided_is_kept(tmp_path: Path, settings: dict[str, object]) -> None:
    made = ServingSettings.of({"chunk_tokens": CHUNK, "disk_path": str(tmp_path), **settings})
    plan = Planner(made, (SPEC,), BLOCK, lambda lookup: ("disk",) * len(lookup.keys[0]))
    plan.open("r", list(range(20)), b"", PLAIN)
    plan.allocated("r", plan.matched_tokens("r", 0) or 0, blocks_for(20))
    plan.plan_step([])
    plan.apply_report(StepReport(loaded={"r": Loaded({"disk": 16}, False, 0.5)}))
    plan.arrived({"r"})
    usage = plan.close("r")
    if settings:
        assert not list(tmp_path.iterdir())
        return
    assert eventually(lambda: read_all(tmp_path) == ["r"])
    (told,) = read_journal(tmp_path)
    assert usage is not None and usage.items() <= told.items()
    assert (told["decision"], told["found_tokens"], told["loaded_tokens"]) == ("untried", {"disk": 16}, {"disk": 16})
