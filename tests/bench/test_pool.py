"""One model in several processes: the same results in the same order as in one."""

from __future__ import annotations

import time

import pytest

from kvloom.bench.harness.pool import ModelPool
from kvloom.evaluation.answers import known_kinds, shares_right
from kvloom.evaluation.questions import QuestionSampler


def test_processes_give_what_one_gives_and_end_in_time() -> None:
    # What processes call must be found by its name there; these modules of tests bear others.
    with ModelPool(None, device="cpu") as alone, ModelPool(None, device="cpu", processes=2) as shared:
        for pool in (alone, shared):
            seen: list[None] = []
            items = ["model", "nothing", "tokenizer", "once", "none"]
            assert pool.map(hasattr, items, advance=lambda seen=seen: seen.append(None)) == [1, 0, 1, 1, 0]
            assert len(seen) == 5
            assert pool.map(hasattr, items, stop_s=time.monotonic()) == []
            with pytest.raises(AttributeError, match="nothing"):
                pool.map(getattr, ["nothing"])
        shares = shares_right(
            alone.here.model, QuestionSampler(alone.here.tokenizer, context_tokens=256), ("needle", "extract")
        )
        assert shares["needle"] >= 0.5 > shares["extract"]
        assert known_kinds(shares) == ("needle",)
    with pytest.raises(ValueError, match="processes is 0"):
        ModelPool(None, processes=0)
