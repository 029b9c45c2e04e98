"""Loads within a step, without an engine: layer after layer, and what is told of those that do not come."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kvloom.connectors.serving.messages import Load, Loaded, Scheduled, StepReport
from kvloom.connectors.serving.settings import RequestOptions
from kvloom.connectors.serving.worker.arrivals import Arrival
from kvloom.connectors.serving.worker.head_reader import HeadReader
from kvloom.connectors.serving.worker.layer_loads import LayerLoads
from kvloom.connectors.serving.worker.offers import Offers
from kvloom.core import KVChunk, KVSpec
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import Hit, KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import LONG_S, leaves_no_threads
from .test_planner import BLOCK as PLAN_BLOCK
from .test_planner import CHUNK as PLAN_CHUNK
from .test_planner import SPEC as PLAN_SPEC
from .test_planner import Shelf, blocks_for, planner

LAYERS, BLOCK, CHUNK, CHUNKS = 3, 4, 8, 3
SPEC = KVSpec("model", LAYERS, 2, 4, torch.float32, None)
BLOCKS = (5, 3, 8, 1, 6, 7)
TOKENS = list(range(CHUNK * CHUNKS))
KEYS = prefix_keys(SPEC, TOKENS, chunk_tokens=CHUNK)


class Pages:
    block_tokens = BLOCK

    def __init__(self) -> None:
        self.keys, self.values = torch.zeros(LAYERS, 2, 10 * BLOCK, 4), torch.zeros(LAYERS, 2, 10 * BLOCK, 4)

    def write_layer(self, index: int, blocks: tuple[int, ...], start: int, keys: Tensor, values: Tensor) -> None:
        slots = self.slots(blocks, start, start + keys.shape[1])
        self.keys[index][:, slots], self.values[index][:, slots] = keys, values

    def slots(self, blocks: tuple[int, ...], start: int, stop: int) -> list[int]:
        return [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]


class Bench:
    """A store with all chunks, an empty cache, and the truth."""

    def __init__(self, *, timeout_s: float = 20.0, recompute_s: float | None = None) -> None:
        self.store, self.pages, self.counts = KVStore([HostTier(None)]), Pages(), Counter[str]()
        self.keys, self.values = (torch.randn(LAYERS, 2, len(TOKENS), 4) for _ in range(2))
        for index, key in enumerate(KEYS):
            here = slice(index * CHUNK, (index + 1) * CHUNK)
            positions = torch.arange(here.start, here.stop)
            parts = (each[:, :, here].contiguous() for each in (self.keys, self.values))
            self.store.put(key, KVChunk(SPEC, torch.tensor(TOKENS[here]), positions, *parts), recompute_s=recompute_s)
        reader = HeadReader(self.store, SPEC)
        self.loads = LayerLoads(
            reader,
            Offers(reader),
            self.pages,
            SPEC,
            0,
            chunk_tokens=CHUNK,
            load_timeout_s=timeout_s,
            count=self.counts.update,
        )

    def right_tokens(self, layer: int) -> list[int]:
        """Those whose KV is in the layer's pages."""
        slots = self.pages.slots(BLOCKS, 0, len(TOKENS))
        right = (self.pages.keys[layer][:, slots] == self.keys[layer]) & (
            self.pages.values[layer][:, slots] == self.values[layer]
        )
        return [token for token in TOKENS if bool(right[:, token].all())]

    def run(self, start: int, stop: int, layers: range = range(LAYERS)) -> Arrival:
        first = start // CHUNK
        keys = tuple(KEYS[first : -(-stop // CHUNK)])
        self.loads.begin(Load("r", (keys,), first * CHUNK, start, stop, BLOCKS))
        for layer in layers:
            self.loads.wait(layer)
        (arrival,) = self.loads.finish()
        assert self.loads.finish() == []
        return arrival


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.loads.close()
    bench.store.close()


@pytest.mark.parametrize(("start", "stop"), [(0, 24), (4, 24), (12, 23), (0, 1), (8, 16)])
def test_every_layer_is_there_when_it_is_waited_for(bench: Bench, start: int, stop: int) -> None:
    first = start // CHUNK
    keys = tuple(KEYS[first : -(-stop // CHUNK)])
    bench.loads.begin(Load("r", (keys,), first * CHUNK, start, stop, BLOCKS))
    for layer in range(LAYERS):
        assert bench.right_tokens(layer) == []
        bench.loads.wait(layer)
        assert bench.right_tokens(layer) == list(range(start, stop))
    (arrival,) = bench.loads.finish()
    assert (arrival.loaded.failed, dict(arrival.loaded.tokens), arrival.bad_blocks) == (
        False,
        {"host": stop - start},
        frozenset(),
    )
    assert arrival.loaded.unpriced_tokens == stop - start
    assert bench.counts["loaded_tokens.host"] == stop - start


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_what_is_lost_in_one_layer_is_lost(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, chunk: int, layer: int
) -> None:
    """With all that follows it; what precedes it is right in every layer."""
    read = bench.store.read

    def harmed(*args: Any, **kwargs: Any) -> Hit | None:
        return None if (args[0], kwargs["layers"][0]) == (KEYS[chunk], layer) else read(*args, **kwargs)

    monkeypatch.setattr(bench.store, "read", harmed)
    arrival = bench.run(4, 24)
    assert arrival.loaded.failed
    kept = max(chunk * CHUNK, 4)
    assert sum(arrival.loaded.tokens.values()) == kept - 4
    assert arrival.bad_blocks == set(BLOCKS[kept // BLOCK :])
    assert all(set(range(4, kept)) <= set(bench.right_tokens(each)) for each in range(LAYERS))
    assert bench.counts["failed_loads"] == 1


def test_layers_that_the_model_left_out_are_a_failure(bench: Bench) -> None:
    arrival = bench.run(0, 24, range(LAYERS - 1))
    assert arrival.loaded.failed
    assert arrival.bad_blocks == set(BLOCKS)


def test_a_load_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, gate = Bench(timeout_s=1.0), threading.Event()
    monkeypatch.setattr(bench.store, "read", lambda *_, **__: gate.wait(LONG_S) and None)
    arrival = bench.run(0, 24)
    gate.set()
    assert arrival.loaded.failed
    assert 0.1 < arrival.loaded.spent_s < LONG_S / 2
    bench.loads.close()
    bench.store.close()


def test_time_saved_counts_what_the_model_waited_for() -> None:
    bench = Bench(recompute_s=0.5)
    loaded = bench.run(4, 24).loaded
    assert loaded.recompute_s == pytest.approx(0.5 * 20 / 8)
    assert loaded.unpriced_tokens == 0
    bench.loads.close()
    bench.store.close()


# ------------------------------------------------------------------------------------------ the scheduler's half


def opened(tokens: int = 24) -> tuple[Any, list[int]]:
    row, shelf = list(range(tokens)), Shelf()
    keys = prefix_keys(PLAN_SPEC, row, chunk_tokens=PLAN_CHUNK)
    shelf.tiers = dict.fromkeys(keys, "host")
    plan = planner(shelf, load_mode="layerwise")
    plan.open("r", row, b"", RequestOptions())
    return plan, row


def test_one_token_is_left_to_compute() -> None:
    plan, _ = opened()
    assert plan.matched_tokens("r", 4) == 23 - 4
    assert plan.is_layerwise("r")
    plan.allocated("r", 19, blocks_for(24))
    planned = plan.plan_step([Scheduled("r", 24, blocks_for(24), 1)])
    (load,) = planned.layer_loads
    assert (load.first, load.start, load.stop, len(load.keys[0])) == (0, 4, 23, 3)
    assert planned.loads == planned.saves == []
    assert dict(plan.hit_tokens("r")) == {"host": 19}
    usage = plan.close("r")
    assert usage is not None
    assert usage["loaded_tokens"] == {"host": 19}, "the step that loads is its last one"
    assert usage["seconds_saved"] is None
    plan.apply_report(StepReport(loaded={"r": Loaded({"host": 19}, False, 0.5, 0, recompute_s=2.0)}))
    assert plan.take_counts()["seconds_saved"] == 1.5


def test_who_begins_alike_waits_for_a_step() -> None:
    plan, row = opened()
    plan.allocated("r", plan.matched_tokens("r", 0), blocks_for(24))
    assert plan.has_to_wait(row, PLAN_BLOCK)
    assert not plan.has_to_wait(row, 0), "what it has not found, it does not share"
    assert not plan.has_to_wait([99, *row[1:]], PLAN_BLOCK)
    plan.plan_step([])
    assert not plan.has_to_wait(row, PLAN_BLOCK)


@pytest.mark.parametrize("is_closed", [False, True])
def test_blocks_that_did_not_come_are_spoiled(is_closed: bool) -> None:
    plan, _ = opened()
    plan.allocated("r", plan.matched_tokens("r", 4), blocks_for(24))
    plan.plan_step([])
    if is_closed:
        plan.close("r")
    plan.apply_report(StepReport(loaded={"r": Loaded({"host": 4}, True, 0.1)}))
    assert plan.take_unwritten_blocks() == set(blocks_for(24)[1:])
    assert plan.take_unwritten_blocks() == set()


def test_blocks_that_came_are_not() -> None:
    plan, _ = opened()
    plan.allocated("r", plan.matched_tokens("r", 4), blocks_for(24))
    plan.plan_step([])
    plan.apply_report(StepReport(loaded={"r": Loaded({"host": 19}, False, 0.1)}))
    assert plan.take_unwritten_blocks() == set()
