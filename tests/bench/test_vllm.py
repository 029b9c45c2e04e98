"""What `kvloom bench vllm` is made of, without an engine."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvloom.bench.harness.peer import PeerError
from kvloom.bench.vllm import engine as vllm_engine
from kvloom.bench.vllm.engine import VLLMError, expect_vllm
from kvloom.bench.vllm.exact import FULL, FUSED, NAIVE, SAME_AS, FusedAnswers, Identity, compare_tokens
from kvloom.bench.vllm.families import Family
from kvloom.bench.vllm.inputs import Prompts, Shape, joined, make_model, reference_inputs
from kvloom.bench.vllm.lmcache import LMCacheServer
from kvloom.bench.vllm.served_families import FamilyOutcome, count_families, families_table, share
from kvloom.bench.vllm.server import Served
from kvloom.bench.vllm.times import FULL as PLAIN
from kvloom.bench.vllm.times import HOST, Timed, expect_loaded
from kvloom.bench.vllm.windows import WHOLE, WindowedHit

TINY = Shape(layers=2, hidden=64, intermediate=96, heads=4, kv_heads=2, vocabulary=100, max_tokens=128)


def served(*loaded: dict[str, int] | None, tokens: Sequence[tuple[int, ...]] = ()) -> Served:
    usage = tuple(None if each is None else {"loaded_tokens": each, "failed": False} for each in loaded)
    return Served(1.0, 0.5, tuple(tokens), (0,) * len(loaded), usage)


def test_context_matters_to_the_random_model(tmp_path: Path) -> None:
    make_model(tmp_path / "a", TINY)
    make_model(tmp_path / "b", TINY)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    ids = torch.tensor([Prompts(TINY.vocabulary, (), seed=3).ids(40)])
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % TINY.vocabulary
    with torch.no_grad():
        logits = model(ids).logits[0, -1]
        torch.testing.assert_close(again(ids).logits[0, -1], logits, rtol=0, atol=0)
        change = (model(other).logits[0, -1] - logits).abs().mean() / logits.abs().mean()
    assert change > 0.01, "the last token knows of one that is far back"


def test_prompts_hold_documents_where_their_spans_say() -> None:
    prompts = Prompts(50, (1,), seed=0)
    documents = prompts.documents(4, 6)
    orders = [prompts.shuffled(documents) for _ in range(10)]
    assert all(sorted(order) == sorted(documents) and order[0] != documents[0] for order in orders)
    tokens, spans = joined(prompts.lead_ids, orders[0], [7, 8])
    assert [tokens[start:stop] for start, stop in spans] == orders[0]
    assert (tokens[0], tokens[-2:], len(tokens)) == (1, [7, 8], 1 + 24 + 2)
    assert min(min(document) for document in documents) >= 8
    assert prompts.ids(20) != prompts.ids(20)


@pytest.mark.slow
def test_records_are_those_of_the_other_benchmark() -> None:
    few = reference_inputs(texts=3, max_text_tokens=40, records=1, context_tokens=600)
    more = reference_inputs(texts=3, max_text_tokens=40, records=2, context_tokens=600)
    assert more.records[:1] == few.records, "the first of many are the few"
    (case,) = few.records
    assert len(case.documents) == 8
    assert 400 < sum(map(len, case.documents)) <= 640
    assert 0 < len(case.answer) <= 8
    assert [text[0] for text in few.texts] == [1, 1, 1]
    assert len({len(text) for text in few.texts}) == 3


def test_ratios_are_taken_within_rounds() -> None:
    timed = Timed("first", "m", 100, "plain", {"plain": [2.0, 20.0, 8.0], "fast": [1.0, 5.0, 8.0]})
    assert timed.speedup("fast").value == 2.0
    assert timed.speedup("fast").baseline == "plain"
    assert timed.ratio("fast", "plain").value == 0.5
    assert timed.ratio("fast", "plain").baseline == "plain"
    row = timed.rows()[1]
    assert (row["way"], row["s"], row["speedup"], row["rounds"]) == ("fast", 5.0, 2.0, 3)


def test_the_gap_is_that_between_naive_reuse_and_everything() -> None:
    answers = FusedAnswers(
        {FULL: [True] * 8 + [False] * 2, NAIVE: [True] * 2 + [False] * 8, FUSED: [True] * 5 + [False] * 5}
    )
    gap = answers.gap_closed()
    assert gap.value == pytest.approx(0.5)
    assert gap.low is not None and gap.high is not None and gap.low < 0.5 < gap.high
    assert answers.exact_match(FUSED).value == 0.5
    assert math.isnan(FusedAnswers({FULL: [True], NAIVE: [True], FUSED: [True]}).gap_closed().value)


def test_a_prompt_counts_if_it_was_the_same_every_time() -> None:
    identity = Identity({"cold": [True, True, True, False], "host": [True, False, True, False]}, 2)
    assert identity.metric().value == 0.5
    assert [row["same"] for row in identity.rows()] == [3, 2]


def test_what_was_served_otherwise_is_refused() -> None:
    expect_loaded("row", served({"host": 256}, {}), [{"host": 256}, {}])
    for wrong in (served({"disk": 256}, {}), served({"host": 256}, None), served({"host": 128}, {})):
        with pytest.raises(VLLMError, match=r"row: kvloom loaded .* expected \[\{'host': 256\}, \{\}\]"):
            expect_loaded("row", wrong, [{"host": 256}, {}])


class FakeEngine:
    """Says `tokens` to everything and loads what `load` says of a prompt."""

    name = "fake"

    def __init__(self, load: Callable[[Sequence[int]], dict[str, int] | None], token: int = 5) -> None:
        self._load, self._token = load, token

    def reset(self) -> None: ...
    def settle(self) -> None: ...

    def generate(self, prompts: Sequence[Sequence[int]], *_: object, **__: object) -> Served:
        return served(*map(self._load, prompts), tokens=[(self._token,)] * len(prompts))


def test_tokens_are_compared_way_by_way() -> None:
    whole = lambda prompt: len(prompt) // 256 * 256  # noqa: E731
    calls: list[int] = []

    def host(prompt: Sequence[int]) -> dict[str, int]:
        calls.append(len(prompt))
        return {"host": whole(prompt)} if len(calls) > 2 and whole(prompt) else {}

    bed: Any = {
        "vLLM": FakeEngine(lambda _: None),
        "kvloom": FakeEngine(host),
        "kvloom without a host tier": FakeEngine(lambda prompt: {"disk": whole(prompt)} if whole(prompt) else {}, 6),
    }
    identity = compare_tokens(bed, [[1] * 10, [2] * 300], lambda: None)
    assert list(identity.same.values()) == [[True, True], [True, True], [False, False]]
    assert (identity.loaded, identity.metric().value) == (1, 0.0)
    bed["kvloom without a host tier"] = FakeEngine(lambda _: {})
    calls.clear()
    with pytest.raises(VLLMError, match="disk: kvloom loaded"):
        compare_tokens(bed, [[1] * 10, [2] * 300], lambda: None)


def test_where_vllm_is_missing_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"make engines, then .venv-engines/vllm/bin/kvloom bench vllm") as caught:
        expect_vllm()
    assert caught.value.name is None, "the command would tell people to install it into this environment"


def test_a_server_that_dies_says_why(tmp_path: Path) -> None:
    package = tmp_path / "lmcache" / "cli"
    package.mkdir(parents=True)
    (package / "main.py").write_text("def main():\n    print('no memory here')\n    raise SystemExit(3)\n")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {tmp_path}\necho 1.2.3\n")
    python.chmod(0o755)
    with pytest.raises(PeerError, match="exit code 3: no memory here"):
        LMCacheServer(python, 1, tmp_path / "log")
    python.write_text("#!/bin/sh\necho unknown package >&2\nexit 1\n")
    with pytest.raises(PeerError, match="python does not tell of LMCache: unknown package"):
        LMCacheServer(python, 1, tmp_path / "log")


def test_a_family_is_served_if_tokens_were_equal_every_way() -> None:
    ways = dict.fromkeys(SAME_AS, True)
    outcomes = [
        FamilyOutcome("all", ways),
        FamilyOutcome("not after a restart", {**ways, SAME_AS[2]: False}),
        FamilyOutcome("did not start", why="EngineError: no"),
    ]
    found = share(outcomes)
    assert found is not None and found.value == pytest.approx(1 / 3)
    assert share([]) is None
    assert [row[1:] for row in families_table(outcomes).rows] == [
        ["yes", "yes", "yes", ""],
        ["yes", "yes", "no", ""],
        ["", "", "", "EngineError: no"],
    ]


@pytest.mark.slow
def test_a_process_that_ends_with_a_family_costs_that_family_alone(tmp_path: Path) -> None:
    """Every process ends at once here, as it cannot write its log."""
    advanced: list[None] = []
    families = {"one": Family("llama"), "two": Family("no such architecture")}
    outcomes = count_families(tmp_path / "missing", lambda: advanced.append(None), families)
    assert outcomes == [FamilyOutcome(title, why="its process ended") for title in families]
    assert len(advanced) == 2

    (outcome,) = count_families(tmp_path, lambda: None, {"two": families["two"]})
    assert not outcome.is_served and "KeyError" in outcome.why


def test_bytes_of_a_hit_are_beside_those_of_whole_windows() -> None:
    timed = Timed("first", "model", 1000, PLAIN, {PLAIN: [2.0, 4.0], HOST: [1.0, 1.0], WHOLE: [1.5, 1.5]})
    hit = WindowedHit(timed, {HOST: 3 << 20, WHOLE: 12 << 20})
    assert hit.ratio().value == pytest.approx(0.375)
    ratio = hit.byte_ratio()
    assert ratio is not None and ratio.value == 0.25
    assert [row[-1] for row in hit.table().rows] == ["", "3.0", "12.0"]
    assert "3.0 MiB; with all tokens of all layers, 12.0 MiB" in hit.note()
    assert [row["loaded_bytes"] for row in hit.rows()] == [None, 3 << 20, 12 << 20]
    alone = WindowedHit(timed, {HOST: 3 << 20})
    assert alone.byte_ratio() is None and alone.note().endswith("3.0 MiB.")
