"""CacheBlend (arXiv 2405.16444) within an engine: stored documents in a new context, some of their tokens recomputed.

    fetch     documents from the store, moved to where they stand now, into the blocks of the request   (background)
    lead      what precedes the first document, through all layers, while documents are fetched
    choose    the tokens of documents, and what is between them, through the first layers; what `check_layer` makes of
              them is compared with what was stored, and the tokens that differ most are chosen
    compute   what is in no document and what was chosen, through all layers

All but fetching goes in slices, one in each step of the engine, in the order of positions, so that a long context
does not keep other requests waiting; the result is the same as in one piece. Deviation and choice are those of
`blend.choosers`. Deviations from the paper: tokens are chosen once, not again in every layer, since the engine's
forward pass cannot drop tokens on its way; and the layers up to `check_layer` are fresh for every token, as they had to
be computed to choose.

The first layer's keys depend on nothing but token and position. If what was stored and moved differs from what the
model computes there, the model or its rotation is not what kvloom takes it for: then everything is computed. Where
tiers are lossy, a difference counts as their loss as long as it is small for most tokens: a rotation that is not
understood turns keys of moved documents by any angle.

Imports no engine: `EnginePasses` and `PagedLayers` are vLLM's side.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....blend.choosers import (
    CHOOSERS,
    CandidateTokens,
    by_deviation,
    deviation_of,
    places_in_chunks,
    squares,
    value_deviation_of,
)
from ....blend.method import WITHOUT_DEVIATION, FusionMethod
from ....errors import EngineError
from ..messages import Advance, Fusion, FusionWork, Loaded
from .arrivals import Arrival, Fetched
from .stretches import Stretch
from .transfers import Transfers

_LOSS = 0.25  # squared, relative: 2 bits lose about a tenth; keys that are turned by chance differ by 2

_CANCELLED = torch.empty(0, dtype=torch.int64)
"""Positions that a cancelled fusion still computes: none."""

_LOG = logging.getLogger("kvloom")


class Passes(Protocol):
    """Forward passes of the engine's model over chosen tokens of one request, which write their KV.

    Attributes
    ----------
    max_tokens, max_runs : most tokens, and runs of neighbouring tokens, of one pass.
    """

    max_tokens: int
    max_runs: int

    def compute(self, token_ids: NDArray[np.int64], positions: Tensor, blocks: Sequence[int]) -> None: ...
    def keys_and_values(
        self, layer: int, token_ids: NDArray[np.int64], positions: Tensor, blocks: Sequence[int]
    ) -> tuple[Tensor, Tensor]: ...
    def question_attention(
        self, question_ids: NDArray[np.int64], first: int, context_tokens: int, blocks: Sequence[int]
    ) -> Tensor:
        """As `blend.question.question_attention`, of tokens from position `first` on to the `context_tokens` that the
        blocks hold; writes no KV.
        """
        ...


class TokenCache(Protocol):
    """An engine's paged KV cache, as fusions use it: keys `[H, T, D]` and values `[H, T, Dv]` of one layer."""

    num_layers: int
    block_tokens: int
    dtype: torch.dtype
    device: torch.device

    def read_layer(self, index: int, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]: ...
    def write_tokens(
        self, index: int, blocks: Sequence[int], positions: Tensor, keys: Tensor, values: Tensor
    ) -> None: ...


@dataclass(slots=True)
class _Job:
    fusion: Fusion
    fetching: Future[Fetched]
    begun_s: float
    lead: int  # token up to which no document is needed
    led: int  # token up to which that is computed
    waited_s: float = 0.0  # until all documents were fetched and that was computed
    is_reported: bool = False  # that its documents are fetched
    probed: Tensor | None = None  # positions that go through the first layers, ascending
    candidates: Tensor | None = None  # of them, those that may be chosen
    rows: list[Tensor] = field(default_factory=list)  # of the slices probed so far
    computed: Tensor | None = None  # positions that go through all layers
    done: int = 0  # positions of the present stage
    passes: list[tuple[float, float, Stretch]] = field(default_factory=list)  # tokens, mean position and time of each


class Fuser:
    """Fusions of a worker, advanced one slice at a time.

    Parameters
    ----------
    transfers : fetches documents.
    passes, cache : the engine's.
    slice_tokens : tokens through all layers in one step of the engine.
    method : how tokens are chosen; their number is that of each request.
    sum_over_ranks : adds up a tensor of the tensor-parallel ranks; None for a single rank.
    is_lossy : documents may come from a tier whose codec loses something.
    """

    def __init__(
        self,
        transfers: Transfers,
        passes: Passes,
        cache: TokenCache,
        *,
        slice_tokens: int,
        method: FusionMethod,
        sum_over_ranks: Callable[[Tensor], Tensor] | None = None,
        is_lossy: bool = False,
    ) -> None:
        layers = cache.num_layers
        self._transfers = transfers
        self.passes = passes
        self._cache = cache
        self._select = method.select
        # A choice without deviations needs no full layers: only the first layer is looked at, which has to be right.
        self._check_layer = 0 if method.select in WITHOUT_DEVIATION else min(method.check_layer, layers - 1)
        self._slice_tokens = min(slice_tokens, passes.max_tokens)
        # A slice of choosing costs as much as one of computing: it runs through fewer layers.
        self._probe_tokens = min(self._slice_tokens * layers // (self._check_layer + 1), passes.max_tokens)
        self._sum_over_ranks = sum_over_ranks
        self._is_lossy = is_lossy
        self._jobs: dict[str, _Job] = {}
        self._over: list[Arrival] = []
        self.is_trusted = True
        """False once the first layer's keys were not what they should be."""

    @property
    def is_fusing(self) -> bool:
        """Whether a fusion has begun that `arrivals` has not given yet."""
        return bool(self._jobs or self._over)

    def begin(self, fusion: Fusion) -> None:
        """Begin a fusion; `arrivals` gives its outcome."""
        lead = min(max(fusion.documents[0].start, fusion.start), fusion.stop)  # which ends with a whole block
        self._jobs[fusion.request_id] = _Job(
            fusion, self._transfers.fetch(fusion), time.monotonic(), lead, fusion.start
        )

    def cancel(self, request_id: str) -> None:
        """End a fusion. `arrivals` gives it all the same, when nothing writes to its blocks any more."""
        if (job := self._jobs.get(request_id)) is not None:
            job.is_reported = True
            job.computed = _CANCELLED

    def fetched(self) -> dict[str, tuple[bool, ...]]:
        """For fusions whose documents are fetched, each once: which documents this rank found."""
        ready = {}
        for request_id, job in self._jobs.items():
            if not job.is_reported and job.fetching.done():
                job.is_reported = True
                if (error := job.fetching.exception()) is not None:
                    _LOG.error("fetching documents of request %s failed; they are computed", request_id, exc_info=error)
                    self._transfers.count({"errors": 1, "failed_loads": 1})
                ready[request_id] = self._outcome(job).found
        return ready

    def arrivals(self) -> list[Arrival]:
        """Fusions that are over, each once."""
        for request_id, job in list(self._jobs.items()):
            if job.computed is not None and job.done >= len(job.computed) and job.fetching.done():
                del self._jobs[request_id]
                self._over.append(self._arrival(job, job.computed))
        over, self._over = self._over, []
        return over

    @torch.inference_mode()
    def advance(self, advance: Advance) -> None:
        """Compute one slice; nothing if the fusion is over, of which the scheduler may not know yet."""
        job = self._jobs.get(advance.request_id)
        if job is None:
            return
        try:
            if job.computed is None and job.led < job.lead:
                stop = min(job.led + self._slice_tokens, job.lead)
                self.passes.compute(job.fusion.token_ids, torch.arange(job.led, stop), job.fusion.blocks)
                job.led = stop
            elif advance.found is None:
                return
            elif job.computed is None:
                self._choose(job, advance.found)
            elif len(left := job.computed[job.done :]):
                count = first_slice(left, self._slice_tokens, self.passes.max_runs)
                with self._timed(job, left[:count], 1.0):
                    self.passes.compute(job.fusion.token_ids, left[:count], job.fusion.blocks)
                job.done += count
        except (RuntimeError, EngineError):  # of the device or a kernel; the engine itself can still compute
            _LOG.exception("fusing request %s failed; it is computed", advance.request_id)
            del self._jobs[advance.request_id]
            self._transfers.count({"errors": 1, "failed_loads": 1})
            fusion, size = job.fusion, self._cache.block_tokens
            bad = frozenset(fusion.blocks[fusion.start // size : -(-fusion.stop // size)])
            self._over.append(Arrival(fusion.request_id, Loaded({}, True, time.monotonic() - job.begun_s), bad))

    # ------------------------------------------------------------------------------------------------ choosing

    def _choose(self, job: _Job, found: tuple[bool, ...]) -> None:
        """Compute the next slice of the first layers; after the last one, choose."""
        fusion = job.fusion
        if job.probed is None or job.candidates is None:
            job.waited_s = time.monotonic() - job.begun_s
            job.probed, job.candidates = stage(fusion, found, job.lead)
            count = math.ceil(fusion.ratio * len(job.candidates))
            # What goes on with a choice that was made goes through the first layers all the same: they stay fresh.
            is_settled = fusion.chosen is None and count == len(job.candidates)
            if count == 0 or is_settled or not self.is_trusted:
                everything = count or not self.is_trusted
                skipped = torch.isin(job.probed, job.candidates)
                job.computed = job.probed if everything else job.probed[~skipped]
                return
        left = job.probed[job.done :]
        count = first_slice(left, self._probe_tokens, self.passes.max_runs)
        with self._timed(job, left[:count], (self._check_layer + 1) / self._cache.num_layers):
            job.rows.append(self._probe(fusion, left[:count]))
        job.done += count
        if job.done < len(job.probed):
            return
        # Ranks add up what their heads say, so that all choose alike, and what one rank alone would.
        rows = torch.cat(job.rows, dim=1)
        if self._sum_over_ranks is not None:
            rows = self._sum_over_ranks(rows)
        is_candidate = torch.isin(job.probed, job.candidates)
        squared = (rows[4] / rows[5].clamp_min(torch.finfo(torch.float32).tiny))[is_candidate]
        off = float(squared.median() if self._is_lossy else squared.max())
        job.done = 0
        if off > self._tolerance():
            self.is_trusted = False
            _LOG.error(
                "fusion is off from now on: keys of the first layer are off by %.2g of their size where they should be "
                "equal; kvloom misunderstands this model's rotation. Requests are computed in full",
                off,
            )
            job.computed = job.probed
            return
        if fusion.chosen is not None:
            job.computed = continued(fusion, found, job.lead)
            return
        positions = job.probed[is_candidate]
        starts = torch.tensor([document.start for document in fusion.documents])
        offsets, to_next = places_in_chunks(positions, starts)
        attention, choose = None, CHOOSERS[self._select]
        if fusion.question is not None:
            attention = partial(self._attention, job, positions)
        elif self._select in WITHOUT_DEVIATION:  # there is none
            choose = by_deviation
        of_kv = rows[:4, is_candidate]
        deviations = deviation_of(of_kv), attention, value_deviation_of(of_kv)
        tokens = CandidateTokens(positions, offsets, *deviations, to_next)
        chosen = choose(tokens, math.ceil(fusion.ratio * len(positions)))
        kept = positions if chosen is None else positions[chosen]
        job.computed = torch.cat((job.probed[~is_candidate], kept)).sort().values

    def _attention(self, job: _Job, positions: Tensor) -> Tensor:
        """How much the question attends to tokens at `positions`, see `CandidateTokens`: `[2, T]`."""
        fusion = job.fusion
        if fusion.question is None:
            raise ValueError(f"request {fusion.request_id} has no question")
        first = fusion.documents[-1].stop
        with self._timed(job, torch.arange(first, first + len(fusion.question)), 1.0):
            rows = self.passes.question_attention(fusion.question, first, fusion.stop, fusion.blocks).cpu()
        return (rows if self._sum_over_ranks is None else self._sum_over_ranks(rows))[:, positions]

    def _probe(self, fusion: Fusion, positions: Tensor) -> Tensor:
        """`squares` at the check layer, and `|dK|^2` and `|K|^2` of the first: `[6, T]`."""
        cache, check = self._cache, self._check_layer
        first, last = int(positions[0]), int(positions[-1]) + 1
        stored_keys, stored_values = self._stored(fusion, first, last)
        index = positions - first
        fresh_keys, fresh_values = self.passes.keys_and_values(check, fusion.token_ids, positions, fusion.blocks)
        cache.write_tokens(check, fusion.blocks, positions, fresh_keys, fresh_values)
        keys, values = stored_keys[1][:, index], stored_values[1][:, index]
        old, new = stored_keys[0][:, index], cache.read_layer(0, fusion.blocks, first, last)[0][:, index]
        first_layer = squares(new, old, new, new)[:2]
        return torch.cat((squares(fresh_keys, keys, fresh_values, values), first_layer)).cpu()

    def _stored(self, fusion: Fusion, first: int, last: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values in the blocks now, `[H, T, D]` each, of the first layer and of the check layer."""
        layers = (0, self._check_layer)
        pairs = [self._cache.read_layer(layer, fusion.blocks, first, last) for layer in layers]
        return [keys for keys, _ in pairs], [values for _, values in pairs]

    def _tolerance(self) -> float:
        """Largest squared, relative difference that two roundings of a rotated key, or a codec's loss, explain."""
        if self._is_lossy:
            return _LOSS
        return (8 * torch.finfo(self._cache.dtype).eps) ** 2 + 1e-6

    # ------------------------------------------------------------------------------------------------ outcomes

    def _outcome(self, job: _Job) -> Fetched:
        if job.fetching.exception() is None:
            return job.fetching.result()
        return Fetched((False,) * len(job.fusion.documents), {})

    def _arrival(self, job: _Job, computed: Tensor) -> Arrival:
        spent_s, fusion = time.monotonic() - job.begun_s, job.fusion
        computed_tokens = len(computed) + job.led - fusion.start
        counts = {
            "fusions": 1,
            "fused_tokens": fusion.stop - fusion.start,
            "fusion_computed_tokens": computed_tokens,
            "fusion_seconds": spent_s,
        }
        self._transfers.count(counts)
        fetched = self._outcome(job)
        unpriced = fusion.stop - fusion.start - sum(fetched.tokens.values()) + fetched.cost.unpriced_tokens
        chosen = computed.numpy().astype(np.int32) if fusion.chosen is None else None
        loaded = Loaded(
            fetched.tokens,
            False,
            spent_s,
            computed_tokens,
            fetched.cost.recompute_s,
            unpriced,
            chosen,
            read_s=fetched.read_s,
            fused=self._work(job, fetched) if computed is not _CANCELLED else None,
        )
        return Arrival(fusion.request_id, loaded, frozenset())

    @contextmanager
    def _timed(self, job: _Job, positions: Tensor, layers_ratio: float) -> Iterator[None]:
        """Take the time of a pass through this share of the layers."""
        with Stretch.on(self._cache.device) as stretch:
            yield
        mean = float(positions.double().mean())
        job.passes.append((len(positions) * layers_ratio, mean, stretch))

    def _work(self, job: _Job, fetched: Fetched) -> FusionWork:
        tokens = sum(count for count, _, _ in job.passes)
        position = sum(count * mean for count, mean, _ in job.passes) / max(tokens, 1.0)
        seconds = sum(stretch.seconds() for _, _, stretch in job.passes)
        return FusionWork(fetched.documents, tokens, position, seconds, job.waited_s)


def stage(fusion: Fusion, found: tuple[bool, ...], lead: int = 0) -> tuple[Tensor, Tensor]:
    """Positions that go through the first layers, and those among them that may be chosen, both ascending.

    None before token `lead`, where all is computed already.

    | tokens                                 | first layers | may be chosen |
    |----------------------------------------|--------------|---------------|
    | of a stored document before `inexact`  | no: exact    |               |
    | of any other stored document           | yes          | yes           |
    | of no stored document                  | yes          | no: computed  |
    """
    is_stored = torch.zeros(fusion.stop, dtype=torch.bool)
    for document, is_found in zip(fusion.documents, found, strict=True):
        if is_found:
            is_stored[document.start : document.stop] = True
    positions = torch.arange(fusion.stop)
    ours = positions >= max(fusion.start, lead)
    return (
        positions[ours & ~(is_stored & (positions < fusion.inexact))],
        positions[ours & is_stored & (positions >= fusion.inexact)],
    )


def continued(fusion: Fusion, found: tuple[bool, ...], lead: int = 0) -> Tensor:
    """Ascending positions left to compute of a fusion with known `chosen` tokens: these, and what is not stored."""
    probed, candidates = stage(fusion, found, lead)
    is_left = ~torch.isin(probed, candidates)
    if fusion.chosen is not None:
        is_left |= torch.isin(probed, torch.from_numpy(fusion.chosen.astype(np.int64)))
    return probed[is_left]


def first_slice(positions: Tensor, max_tokens: int, max_runs: int) -> int:
    """How many leading positions make one slice: at most `max_tokens` tokens in at most `max_runs` runs."""
    leading = positions[:max_tokens]
    begins = torch.ones(len(leading), dtype=torch.int64)
    begins[1:] = leading.diff() != 1
    return int((begins.cumsum(0) <= max_runs).sum())
