"""Loads of prefixes within the step that uses them: each layer's KV is there when that layer's attention begins.

    the scheduler   takes the stored tokens for computed, and lets the request compute what follows them at once
    a thread        reads the chunks, layer by layer, ahead of the model
    the model       waits before each attention for that layer, writes it into the blocks, and attends

What is lost is reported with the step's outcome: the engine takes back what it believed computed, and computes it in
the next step. Until then its prefix cache has those blocks, without their KV, under the hashes of their tokens.
`Planner.has_to_wait` and `Planner.take_unwritten_blocks` keep other requests from using them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ....core import KVSpec
from ....kvstore.store import Hit
from ..messages import Load, Loaded
from .arrivals import Arrival, RecomputeCost, fits
from .head_reader import HeadReader
from .offers import Offers
from .threads import compute_alone

_LOADERS = 2

_LOG = logging.getLogger("kvloom")


class LayerCache(Protocol):
    """An engine's paged KV cache, as layer-wise loads use it: keys `[H, T, D]` and values `[H, T, Dv]` of one layer."""

    block_tokens: int

    def write_layer(self, index: int, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None: ...


@dataclass(slots=True)
class _Job:
    load: Load
    begun_s: float
    layers: list[Future[list[Hit | None]]]
    lost_from: int  # first chunk that is lost in some layer; the number of chunks if none is
    tiers: dict[int, tuple[str, float | None]] = field(default_factory=dict)  # by chunk: its tier and cost
    written: set[int] = field(default_factory=set)  # layers
    waited_s: float = 0.0
    read_s: dict[str, float] = field(default_factory=dict)  # by tier
    is_over: bool = False  # read by the thread that loads


class LayerLoads:
    """The loads of one step of the engine.

    Parameters
    ----------
    reader, offers, cache : not owned.
    spec, rank : of this worker.
    chunk_tokens, load_timeout_s : see `ServingSettings`.
    count : adds to the worker's counts.
    """

    def __init__(
        self,
        reader: HeadReader,
        offers: Offers,
        cache: LayerCache,
        spec: KVSpec,
        rank: int,
        *,
        chunk_tokens: int,
        load_timeout_s: float,
        count: Callable[[Mapping[str, float]], None],
    ) -> None:
        self._reader = reader
        self._offers = offers
        self._cache = cache
        self._spec = spec
        self._rank = rank
        self._chunk_tokens = chunk_tokens
        self._load_timeout_s = load_timeout_s
        self._count = count
        self._loader = ThreadPoolExecutor(_LOADERS, "kvloom-layers", compute_alone)
        self._jobs: list[_Job] = []

    def begin(self, load: Load) -> None:
        """Begin a load before the model runs; `finish` ends it in the same step."""
        keys, others = load.keys[self._rank], load.others_of(self._rank)
        if not self._offers.take(load.lookup, keys, self._load_timeout_s, others):
            self._count({"errors": 1})
        job = _Job(load, time.monotonic(), [Future() for _ in range(self._spec.num_layers)], len(keys))
        self._jobs.append(job)
        self._loader.submit(self._read, job)

    def wait(self, layer: int) -> None:
        """Wait for the KV of a layer whose attention is about to begin, and write it, once for each layer."""
        for job in self._jobs:
            if layer in job.written:
                continue
            begun_s = time.monotonic()
            job.written.add(layer)
            hits = self._layer(job, layer)
            for index, hit in enumerate(hits[: job.lost_from]):
                first = job.load.first + index * self._chunk_tokens
                if hit is None or not fits(hit.chunk, self._spec, self._chunk_tokens, first):
                    job.lost_from = index
                    break
                job.tiers.setdefault(index, (hit.tier, hit.recompute_s))
                start, stop = max(first, job.load.start), min(first + self._chunk_tokens, job.load.stop)
                here = slice(start - first, stop - first)
                keys, values = hit.chunk.keys[0][:, here], hit.chunk.values[0][:, here]
                self._cache.write_layer(layer, job.load.blocks, start, keys, values)
            job.waited_s += time.monotonic() - begun_s

    def finish(self) -> list[Arrival]:
        """Outcomes of all loads, after the model has run. A layer that was never waited for makes its load fail.

        `spent_s` is the time for which the model waited.
        """
        jobs, self._jobs = self._jobs, []
        return [self._finished(job) for job in jobs]

    def close(self) -> None:
        """End what is being read."""
        for job in self._jobs:
            job.is_over = True
        self._loader.shutdown(wait=True, cancel_futures=True)

    def _read(self, job: _Job) -> None:
        for layer, future in enumerate(job.layers):
            hits: list[Hit | None] = []
            try:
                for key, other in job.load.chunks_of(self._rank):
                    left_s = job.begun_s + self._load_timeout_s - time.monotonic()
                    hit = None
                    if left_s > 0 and not job.is_over:
                        hit = self._reader.read(key, other, layers=(layer, layer + 1), timeout_s=left_s)
                    if hit is not None:
                        shared = max(min(len(self._jobs), _LOADERS), 1)
                        job.read_s[hit.tier] = job.read_s.get(hit.tier, 0.0) + hit.load_s / shared
                    hits.append(hit)
                    if hit is None:
                        break  # what follows it is of no use
            except BaseException as exc:
                for waiting in job.layers[layer:]:
                    waiting.set_exception(exc)
                raise
            future.set_result(hits)

    def _layer(self, job: _Job, layer: int) -> list[Hit | None]:
        """The layer's chunks, up to the first that is lost; none if the time is over."""
        left_s = job.begun_s + self._load_timeout_s - time.monotonic()
        error = None
        try:
            error = job.layers[layer].exception(timeout=max(left_s, 0.0))
        except TimeoutError:
            job.lost_from = 0
            job.is_over = True
        if error is not None:
            if job.lost_from:
                _LOG.error("loading KV of request %s failed; it is computed", job.load.request_id, exc_info=error)
                self._count({"errors": 1})
            job.lost_from = 0
        if not job.lost_from:
            return []
        hits = job.layers[layer].result()
        return hits + [None] * (job.lost_from - len(hits))

    def _finished(self, job: _Job) -> Arrival:
        job.is_over = True
        load, keys = job.load, job.load.keys[self._rank]
        self._offers.release(load.lookup)
        if len(job.written) < self._spec.num_layers:
            job.lost_from = 0
        tokens: Counter[str] = Counter()
        cost = RecomputeCost()
        for index in range(job.lost_from):
            tier, recompute_s = job.tiers[index]
            first = load.first + index * self._chunk_tokens
            count = min(first + self._chunk_tokens, load.stop) - max(first, load.start)
            tokens[tier] += count
            cost.add(count, self._chunk_tokens, recompute_s)
        is_lost = job.lost_from < len(keys)
        loaded = Loaded(
            dict(tokens), is_lost, job.waited_s, 0, cost.recompute_s, cost.unpriced_tokens, read_s=dict(job.read_s)
        )
        counts = {f"loaded_tokens.{name}": count for name, count in tokens.items()}
        counts["loaded_bytes"] = sum(tokens.values()) * self._spec.token_bytes
        self._count({"loads": 1, "load_seconds": job.waited_s, "failed_loads": int(is_lost)} | counts)
        if not is_lost:
            self._reader.prefetch(keys, load.others_of(self._rank))  # reading single layers promotes nothing
            return Arrival(load.request_id, loaded, frozenset())
        token = max(load.first + job.lost_from * self._chunk_tokens, load.start)
        return Arrival(load.request_id, loaded, load.blocks_from(token, self._cache.block_tokens))
