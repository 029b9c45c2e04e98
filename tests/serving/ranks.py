"""An engine of several ranks without a model: every rank has its heads and layers of numbers that stand for KV.

The scheduler's half, the steps of each rank, its store and what moves chunks are kvloom's own. KV of a token is made of
the token and all before it, so that a wrong head, block or token shows when a rank's cache is compared with the truth.
"""

import hashlib
import pickle
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvloom.connectors.serving.head_splits import heads_of
from kvloom.connectors.serving.messages import Scheduled, StepReport, WorkerInfo
from kvloom.connectors.serving.scheduler.planner import Planner
from kvloom.connectors.serving.settings import RequestOptions, ServingSettings
from kvloom.connectors.serving.worker.layer_loads import LayerLoads
from kvloom.connectors.serving.worker.other_sizes import splits_for
from kvloom.connectors.serving.worker.steps import Steps, Worker
from kvloom.connectors.serving.worker.store_setup import QualityRecords, open_store
from kvloom.connectors.serving.worker.transfers import Transfers
from kvloom.core import KVSpec, RopeSpec

LAYERS, DIM, BLOCK, CHUNK, BLOCKS = 2, 4, 4, 8, 32
ROPE = RopeSpec((1.0, 0.1))


def truth(tokens: Sequence[int], heads: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[L, heads, T, D]`."""
    parent, rows = b"", []
    for token in tokens:
        parent = hashlib.sha256(parent + token.to_bytes(8, "little")).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(parent[:7], "little"))
        rows.append(torch.randn(2, LAYERS, heads, DIM, generator=generator))
    keys, values = torch.stack(rows, dim=3)
    return keys, values


T = TypeVar("T")


def sent(message: T) -> T:
    """As it arrives in another process: engines of several ranks pickle what the two halves tell one another."""
    received: T = pickle.loads(pickle.dumps(message))
    return received


class Pages:
    """The paged cache of one rank; numbers that nobody wrote are NaN."""

    block_tokens = BLOCK

    def __init__(self, layers: int, heads: int) -> None:
        self.keys, self.values = torch.full((2, layers, heads, BLOCKS * BLOCK, DIM), torch.nan)

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        slots = self.slots(blocks, start, stop)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        slots = self.slots(blocks, start, start + keys.shape[2])
        self.keys[:, :, slots], self.values[:, :, slots] = keys, values

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        slots = self.slots(blocks, start, start + keys.shape[1])
        self.keys[index][:, slots], self.values[index][:, slots] = keys, values

    def slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        return [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]


class Ranks:
    """An engine of `size` ranks in each of `stages` that share a folder with other engines.

    With `copies` every rank has all heads, as of latent caches, and the first of a stage stores them.

    Attributes
    ----------
    loaded : tokens that were loaded for the last request, by tier.
    computed : tokens of it that were computed.
    """

    def __init__(
        self, folder: Path, size: int, heads: int, *, stages: int = 1, copies: bool = False, **settings: object
    ) -> None:
        self.settings = ServingSettings.of(
            {"chunk_tokens": CHUNK, "disk_path": str(folder), "host_bytes": "1MiB", **settings}
        )
        self.size, self.heads, self.stages, self.copies = size, heads, stages, copies
        self.pages: list[Pages] = []
        self.workers: list[Worker] = []
        for rank in range(size * stages):
            layers, mine = self.part(rank)
            name = "model" if stages == 1 else f"model+stage-{rank // size}"
            shard = (0, 1) if copies else (rank % size, size)
            counts = (layers.stop - layers.start, mine.stop - mine.start)
            spec = KVSpec(name, *counts, DIM, torch.float32, ROPE, shard=shard)
            pages = Pages(*counts)
            splits = splits_for(self.settings, spec, heads)
            transfers = Transfers(
                open_store(self.settings, spec, QualityRecords.of(self.settings)),
                pages,
                spec,
                rank,
                chunk_tokens=CHUNK,
                load_timeout_s=self.settings.load_timeout_s,
                save_pending_bytes=1 << 24,
                splits=splits,
                saves=not copies or rank % size == 0,
            )
            loads = LayerLoads(
                transfers.reader,
                transfers.offers,
                pages,
                spec,
                rank,
                chunk_tokens=CHUNK,
                load_timeout_s=self.settings.load_timeout_s,
                count=transfers.count,
            )
            numbers = {str(layer): layer for layer in range(LAYERS)}
            self.pages.append(pages)
            self.workers.append(Worker(WorkerInfo(spec, splits=splits), transfers, loads, numbers, None))
        self.steps = [Steps(worker) for worker in self.workers]
        look_up = self.workers[0].transfers.look_up if size * stages == 1 else None
        infos = [worker.info for worker in self.workers]
        self.planner = Planner(
            self.settings, [info.spec for info in infos], BLOCK, look_up, splits=[info.splits for info in infos]
        )
        self.loaded: dict[str, int] = {}
        self.computed = 0
        self._bad_blocks: set[int] = set()
        self._arrived: list[set[str]] = [set() for _ in infos]

    def part(self, rank: int) -> tuple[slice, slice]:
        """Layers and heads of a rank."""
        stage, number = divmod(rank, self.size)
        layers = slice(stage * LAYERS // self.stages, (stage + 1) * LAYERS // self.stages)
        return layers, slice(*((0, self.heads) if self.copies else heads_of(number, self.size, self.heads)))

    def step(self, scheduled: Sequence[Scheduled] = (), compute: tuple[Sequence[int], int, int] | None = None) -> bool:
        """One step: what `compute` says (tokens, from, to) is computed; whether the load under way is over."""
        plan = sent(self.planner.plan_step(scheduled, is_idle=not scheduled))
        report = StepReport()
        for rank, steps in enumerate(self.steps):
            steps.begin(plan)
            for layer in range(LAYERS):
                steps.wait_for_layer(str(layer))
            if compute is not None:
                self._compute(rank, *compute)
            steps.save(plan)
            self._arrived[rank] |= steps.end(plan, set())
            self._bad_blocks |= steps.take_bad_blocks()
            report = report.merged(sent(steps.take_report() or StepReport()))
        everywhere = set.intersection(*self._arrived)
        self._arrived = [each - everywhere for each in self._arrived]
        self.planner.apply_report(report)
        return "r" in self.planner.arrived(everywhere)

    def _compute(self, rank: int, tokens: Sequence[int], start: int, stop: int) -> None:
        keys, values = (each[*self.part(rank), start:stop] for each in truth(tokens[:stop], self.heads))
        self.pages[rank].write(range(BLOCKS), start, keys, values)

    def ask(self, tokens: list[int], *, meanwhile: object = None, **options: Any) -> bool:
        """A request to its end, on empty pages; whether the KV of every rank is right then.

        `meanwhile`: called between the look-up and the load.
        """
        for pages in self.pages:
            pages.keys.fill_(torch.nan)
            pages.values.fill_(torch.nan)
        blocks, self._bad_blocks = tuple(range(BLOCKS)), set()
        self.planner.open("r", tokens, b"", RequestOptions(**options))
        while (found := self.planner.matched_tokens("r", 0)) is None:
            self.step()
        found = min(found, len(tokens) - 1)
        if callable(meanwhile):
            meanwhile()
        is_layerwise = self.planner.is_layerwise("r")
        self.planner.allocated("r", found, blocks)
        until_s = time.monotonic() + 30
        while found and not is_layerwise and not self.step():
            assert time.monotonic() < until_s, "a load does not end"
        start, size = found, len(tokens)
        if is_layerwise:
            self.step([Scheduled("r", size, blocks, size - start)], (tokens, start, size))
        if self._bad_blocks:
            start = min(self._bad_blocks) * BLOCK
        if not is_layerwise or self._bad_blocks:
            self.step([Scheduled("r", size, blocks, size - start)], (tokens, start, size))
        self.computed = size - start
        usage = self.planner.close("r") or {}
        self.loaded = usage["loaded_tokens"]  # type: ignore[assignment]
        self.settle()
        return self.is_right(tokens)

    def is_right(self, tokens: list[int]) -> bool:
        keys, values = truth(tokens, self.heads)
        for rank, pages in enumerate(self.pages):
            slots = pages.slots(range(BLOCKS), 0, len(tokens))
            if not torch.equal(pages.keys[:, :, slots], keys[self.part(rank)]):
                return False
            if not torch.equal(pages.values[:, :, slots], values[self.part(rank)]):
                return False
        return True

    def settle(self) -> None:
        for worker in self.workers:
            assert worker.transfers.settle(30)

    def counts(self, name: str) -> list[float]:
        """Of every rank, since the last call for any name."""
        return [worker.transfers.take_counts().get(name, 0) for worker in self.workers]

    def stored(self) -> int:
        """Chunks in the folder."""
        return len(self.workers[0].transfers.store.tiers[-1].entries())

    def close(self) -> None:
        self.step()
        assert self.planner.is_idle and all(not len(worker.transfers.offers) for worker in self.workers)
        for steps in self.steps:
            steps.close()
