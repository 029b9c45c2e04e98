"""Replays of traces: the store against ten lines of LRU, Belady against all there is, and the command around them."""

import itertools
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom import cli
from kvloom.bench.eviction.policies import SIMULATED_POLICIES
from kvloom.bench.eviction.replay import belady_hits, read_trace, replay
from kvloom.bench.eviction.simulate import SimulateOptions, simulate
from kvloom.testing import make_key

from ...support.commands import refusal

BLOCK_BYTES = 1000


def conversations(requests: int, seed: int) -> list[list[int]]:
    """Hash ids: every request begins with one of three system prompts; four in ten continue an earlier request."""
    draw = random.Random(seed)
    fresh = itertools.count(100)
    found: list[list[int]] = []
    for _ in range(requests):
        start = draw.choice(found[-25:])[:-1] if found and draw.random() < 0.4 else [draw.randrange(3)]
        found.append([*start, *(next(fresh) for _ in range(draw.randint(1, 6)))])
    return found


def write_trace(path: Path, requests: Sequence[Sequence[int]]) -> Path:
    lines = [
        {"timestamp": 10 * i, "input_length": 512 * len(ids), "output_length": 7, "hash_ids": list(ids)}
        for i, ids in enumerate(requests)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def keys_of(requests: Sequence[Sequence[int]]) -> list[list]:
    return [[make_key(block) for block in ids] for ids in requests]


def lru_hits(requests: Sequence[Sequence[int]], capacity: int) -> int:
    held: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for ids in requests:
        hits += next((i for i, block in enumerate(ids) if block not in held), len(ids))
        for block in ids:
            if block not in held and len(held) == capacity:
                held.popitem(last=False)
            held[block] = None
            held.move_to_end(block)
    return hits


def best_hits(requests: Sequence[Sequence[int]], capacity: int) -> int:
    """By trying every choice of what to keep."""
    states = {frozenset[int](): 0}
    for ids in requests:
        reached: dict[frozenset[int], int] = {}
        for held, before in states.items():
            hits = before + next((i for i, block in enumerate(ids) if block not in held), len(ids))
            there = held | set(ids)
            for kept in itertools.combinations(sorted(there), min(capacity, len(there))):
                reached[frozenset(kept)] = max(reached.get(frozenset(kept), 0), hits)
        states = reached
    return max(states.values())


@pytest.mark.parametrize("capacity", [20, 60, 200])
def test_replay_with_lru_is_lru(capacity: int) -> None:
    requests = conversations(300, seed=1)
    hits = lru_hits(requests, capacity)
    assert 0 < hits == replay(keys_of(requests), capacity * BLOCK_BYTES + BLOCK_BYTES // 2, BLOCK_BYTES, "lru")


@given(
    paths=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=1, max_size=6),
    capacity=st.integers(0, 4),
)
@settings(max_examples=80, deadline=None)
def test_belady_is_the_best_there_is(paths: list[list[int]], capacity: int) -> None:
    """Requests are paths in a binary tree: a block is the number of its path, so equal blocks are equal prefixes."""
    requests = [[int("1" + "".join(map(str, path[:n])), 2) for n in range(1, len(path) + 1)] for path in paths]
    best = best_hits(requests, capacity)
    assert belady_hits(keys_of(requests), capacity) == best
    for policy in SIMULATED_POLICIES:
        assert replay(keys_of(requests), capacity * BLOCK_BYTES, BLOCK_BYTES, policy) <= best


def test_no_policy_beats_belady_and_all_find_everything_in_room_enough() -> None:
    requests = conversations(400, seed=2)
    keys = keys_of(requests)
    unique = len({block for ids in requests for block in ids})
    everything = lru_hits(requests, unique)
    for policy in SIMULATED_POLICIES:
        found = [replay(keys, capacity * BLOCK_BYTES, BLOCK_BYTES, policy) for capacity in (12, unique)]
        assert 0 < found[0] <= belady_hits(keys, 12) < found[1] == everything == belady_hits(keys, unique)


def test_requests_are_in_order_of_time(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    fields = {"input_length": 1, "output_length": 1}
    lines = [json.dumps({"timestamp": t, "hash_ids": ids} | fields) for t, ids in ((5, [1, 2]), (3, [1]), (5, [2**70]))]
    trace.write_text(lines[0] + "\n\n" + lines[1] + "\n" + lines[2])
    first, second, third = read_trace(trace)
    assert first == second[:1] and len(second) == 2 and len(third) == 1 and len({*second, *third}) == 3
    assert all(len(key) == 32 for key in second)


def test_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = conversations(200, seed=3)
    references, unique = sum(map(len, requests)), len({block for ids in requests for block in ids})
    trace = write_trace(tmp_path / "trace.jsonl", requests)
    arguments = ["simulate", str(trace), "--capacity", "2%, 5%", "--codec-ratio", "1,4"]
    arguments += ["--json", str(tmp_path / "found.json"), "--report", str(tmp_path / "page.html")]
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["bench"] == "simulate" and len(found["tables"]) == 2
    ratios = {(row["policy"], row["capacity_ratio"], row["codec_ratio"]): row["hit_ratio"] for row in found["rows"]}
    names = {*SIMULATED_POLICIES, "belady"}
    assert ratios.keys() == set(itertools.product(names, (0.02, 0.05), (1, 4))) and len(found["rows"]) == 4 * len(names)
    for capacity, codec in itertools.product((0.02, 0.05), (1, 4)):
        blocks = int(round(capacity * codec * unique, 6))
        assert ratios["lru", capacity, codec] == lru_hits(requests, blocks) / references
        assert ratios["belady", capacity, codec] == belady_hits(keys_of(requests), blocks) / references
    assert ratios["lru", 0.02, 1] < ratios["lru", 0.02, 4] < ratios["belady", 0.02, 4]
    lru, bound, default = (ratios[name, 0.02, 1] for name in ("lru", "belady", "default"))
    assert found["metrics"]["gap_closed_at_0.02"]["value"] == pytest.approx((default - lru) / (bound - lru))
    assert found["metrics"]["hit_ratio_default_at_0.02"]["baseline"] == lru
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and f"{bound:.4f}" in printed
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and f"{bound:.4g}" in page


def test_chosen_policies_and_svg(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "trace.jsonl", conversations(50, seed=4))
    options = SimulateOptions(trace, capacity_ratios=[0.1], policies=["gdsf"])
    result = simulate(options)
    result.write_page(tmp_path / "plot.svg")
    assert [row["policy"] for row in result.rows] == ["lru", "gdsf", "default", "belady"]
    assert (tmp_path / "plot.svg").read_text().startswith("<svg")


GOOD = '{"timestamp": 0, "input_length": 5, "output_length": 5, "hash_ids": [1]}'
BAD_LINES = {
    "not JSON": ("{", "line 2 is not JSON"),
    "not an object": ("[1, 2]", "line 2 is list"),
    "missing": ('{"timestamp": 0, "hash_ids": [1]}', "line 2 lacks input_length, output_length"),
    "negative": (GOOD.replace('th": 5', 'th": -5'), "input_length is -5"),
    "text": (GOOD.replace('"timestamp": 0', '"timestamp": "now"'), "timestamp is 'now'"),
    "no list": (GOOD.replace("[1]", "1"), "hash_ids is not a list of integers"),
    "no integers": (GOOD.replace("[1]", "[1.5]"), "hash_ids is not a list of integers"),
    "no text": ("\udcff\udcfe", "line 2 is not JSON"),
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines(tmp_path: Path, line: str, message: str) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(f"{GOOD}\n{line}\n", errors="surrogateescape")
    with pytest.raises(ValueError, match="expected") as refused:
        read_trace(trace)
    assert "trace.jsonl, line 2" in str(refused.value) and message in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.jsonl"], "there is no file missing.jsonl"),
        (["empty.jsonl"], "names no blocks; give a trace"),
        (["good.jsonl", "--capacity", "5"], "--capacity has '5'; expected a percentage such as 5%"),
        (["good.jsonl", "--capacity", "x%"], "--capacity has 'x'; expected a number"),
        (["good.jsonl", "--capacity", "5%,0%"], "capacity is 0%; expected more than 0%"),
        (["good.jsonl", "--capacity", "101%"], "capacity is 101%; expected more than 0%"),
        (["good.jsonl", "--capacity", "nan%"], "capacity is nan%; expected more than 0%"),
        (["good.jsonl", "--codec-ratio", "0.5"], "codec ratio is 0.5; expected 1"),
        (["good.jsonl", "--codec-ratio", "inf"], "codec ratio is inf; expected 1"),
        (["good.jsonl", "--codec-ratio", "four"], "--codec-ratio has 'four'; expected a number"),
        (["good.jsonl", "--policy", "fifo"], "policy is 'fifo'; expected some of default, lru"),
        (["good.jsonl", "--report", "plot.png"], "plot.png ends in .png; expected .html or .svg"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KVLOOM_TRACEBACK", raising=False)
    (tmp_path / "good.jsonl").write_text(GOOD)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert message in refusal(capsys, "simulate", *arguments)
