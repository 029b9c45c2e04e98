"""Load or recompute in SGLang: what batches teach, and which of the pages found are loaded."""

import logging
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.connectors.sglang import batch_times
from kvloom.connectors.sglang.batch_times import BatchTimes
from kvloom.connectors.sglang.load_choice import LoadChoice
from kvloom.connectors.sglang.page_store import PageStore
from kvloom.connectors.sglang.settings import SGLangSettings
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import leaves_no_threads
from .simulated import PAGE, Pool
from .test_page_store import HASHES, SPEC, filled, pages_of


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Learner:
    def __init__(self) -> None:
        self.seen: list[tuple[int, float, float]] = []

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None:
        self.seen.append((tokens, position, seconds))


def batch(launch_s: float | None, lengths: list[int], before: list[int], *, is_extend: bool = True) -> Any:
    mode = SimpleNamespace(is_extend=lambda: is_extend)
    return SimpleNamespace(forward_mode=mode, launch_ts=launch_s, extend_lens=lengths, prefix_lens=before)


def test_batches_of_prompts_teach_what_computing_takes() -> None:
    clock, learner = Clock(), Learner()
    batch_times.watch(learner)
    times = BatchTimes(clock)

    def run(what: Any, spent_s: float) -> None:
        def process(scheduler: str, given: Any, result: str) -> str:
            clock.now_s += spent_s
            return f"{scheduler} {result}"

        assert times.around(process, "scheduler", what, "result") == "scheduler result"

    run(batch(100.0, [64, 100], [0, 36]), 2.0)
    assert learner.seen == [(164, pytest.approx((64 * 32 + 100 * 86) / 164), 2.0)]
    run(batch(101.0, [50], [0]), 1.0)  # launched while the other ran: only the second after that is its own
    assert learner.seen[1:] == [(50, 25.0, 1.0)]
    run(batch(102.5, None, None, is_extend=False), 1.0)  # type: ignore[arg-type]  # answers
    run(batch(103.5, [1, 1, 1, 40], [9, 9, 9, 0]), 1.0)  # mostly a prompt
    assert learner.seen[2:] == [(43, pytest.approx((3 * 9.5 + 40 * 20) / 43), 1.0)]
    run(batch(104.0, [8], [0]), 1.0)
    run(batch(None, [80], [0]), 1.0)
    assert len(learner.seen) == 3, "too short to say something; never launched"


def test_what_goes_wrong_with_a_batch_is_sglangs_or_logged(caplog: pytest.LogCaptureFixture) -> None:
    learner = Learner()
    batch_times.watch(learner)
    times = BatchTimes()

    def fails(scheduler: object, given: object) -> None:
        raise KeyError("of SGLang")

    with pytest.raises(KeyError, match="of SGLang"):
        times.around(fails, None, batch(0.0, [64], [0]))
    caplog.set_level(logging.ERROR, "kvloom")
    assert times.around(lambda scheduler, given: 5, None, "no batch") == 5
    assert caplog.messages == ["the time of a batch was not taken"] and len(learner.seen) == 1


class SlowTier(HostTier):
    """A tier whose reads take `delay_s`."""

    delay_s = 0.0

    def get(self, *arguments: Any) -> Any:
        time.sleep(self.delay_s)
        return super().get(*arguments)


def opened(tier: HostTier, clock: Clock | None = None) -> PageStore:
    choice = LoadChoice(PAGE, PAGE * SPEC.token_bytes, clock=clock or Clock())
    store = KVStore([tier])
    return PageStore(store, SPEC, page_tokens=PAGE, salt="", load_timeout_s=5.0, is_lossy=False, choice=choice)


def taught(store: PageStore, page_s: float) -> LoadChoice:
    assert store.choice is not None
    for _ in range(4):
        store.choice.observe_prefill(4 * PAGE, 2 * PAGE, 4 * page_s)
    return store.choice


def test_pages_of_a_slow_tier_are_left_alone_and_tried_again() -> None:
    tier, clock = SlowTier(1 << 20), Clock()
    store = opened(tier, clock)
    assert store.write(HASHES, pages_of(filled()), [])
    taught(store, 5e-3)
    tier.delay_s = 0.05
    for _ in range(3):
        assert store.find(HASHES, []) == 4
        assert store.read(HASHES, pages_of(Pool("page_head"))) == 4
    assert store.find(HASHES, []) == 0 and store.store.stats().pinned == 0
    counts = store.counts()
    assert counts["decisions.untried"] == 3 and counts["decisions.slow tier"] == 1
    assert (counts["left_pages"], counts["hit_pages"]) == (4, 16), "found, and left"
    assert store.find(HASHES, decides=False) == 4, "for engines of several pools"
    assert store.read(HASHES, pages_of(Pool("page_head"))) == 4
    tier.delay_s = 0.0
    assert store.find(HASHES, []) == 0
    found = []
    for _ in range(60):  # a page of it is read now and then, and nothing of it is loaded before that
        clock.now_s += 100.0
        found.append(store.find(HASHES, []))
    assert found[0] == 0 and 4 in found and store.counts()["decisions.loads"] > 0
    store.close()


def test_a_fast_tier_is_loaded_from() -> None:
    store = opened(HostTier(1 << 20))
    assert store.write(HASHES, pages_of(filled()), [])
    taught(store, 1.0)
    for _ in range(5):
        assert store.find(HASHES, []) == 4
        assert store.read(HASHES, pages_of(Pool("page_head"))) == 4
    assert store.counts()["decisions.loads"] == 2 and store.counts().get("left_pages", 0) == 0
    store.close()


def test_only_the_part_that_pays_is_loaded() -> None:
    """What lies in the fast tier; and far behind in a long prompt computing takes longer."""
    choice = LoadChoice(PAGE, 1000, clock=Clock())
    for _ in range(4):
        choice.observe_pages({"host": 4, "disk": 4}, {"host": 1e-4, "disk": 4.0})
        choice.observe_prefill(64, 32.0, 0.1)
        choice.observe_prefill(64, 6400.0, 64.0)
    decision = choice.decide(["host", "host", "disk", "disk"], 0, 4)
    assert (decision.chunks, decision.reason) == (2, "shortened")
    assert choice.decide(["disk"] * 4, 0, 4).chunks == 0 and choice.decide(["disk"] * 4, 1000, 4).chunks == 4


def test_settings() -> None:
    assert SGLangSettings.of({"disk_path": "/kv"}).load_or_recompute == "always"
    assert SGLangSettings.of({"disk_path": "/kv", "load_or_recompute": "auto"}).load_or_recompute == "auto"
    with pytest.raises(ValueError, match="load_or_recompute is 'sometimes'; expected one of auto, always"):
        SGLangSettings.of({"disk_path": "/kv", "load_or_recompute": "sometimes"})
