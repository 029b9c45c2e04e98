"""Messages between the scheduler's half of a connector and its workers. Imports no engine.

A `StepPlan` goes to every worker with a step of the engine, a `StepReport` comes back with the step's result. Keys are
given for every rank: a rank stores its own heads under its own keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...blend.method import EXACT, FusionMethod
from ...core import ChunkKey, KVSpec
from ...kvstore.placement.catalog import PlacementChange
from .controller.decisions import Missing
from .head_splits import HeadSplit

RankKeys: TypeAlias = "tuple[tuple[ChunkKey, ...], ...]"
"""Keys of the same chunks for every rank: `keys[rank][chunk]`."""

OtherKeys: TypeAlias = "tuple[tuple[ChunkKey, ...], ...]"
"""Keys of one chunk as engines of other tensor-parallel sizes store it: `keys[split][part]`, see `WorkerInfo`."""

RankOthers: TypeAlias = "tuple[tuple[OtherKeys, ...], ...]"
"""The same for several chunks and every rank: `others[rank][chunk]`; empty if other sizes are not looked for."""

LOADERS = 4
"""Loads that a worker runs at once, so that what lies on a slow disk is not in the way of what lies in memory."""

FoundTiers: TypeAlias = "tuple[str, ...]"
"""Result of a look-up: the tier of each chunk asked for, up to the first chunk that no tier holds; see `LookUp`."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What the scheduler's half has to know of a worker.

    `fusion`: how it fuses, with the ratio that certificates permit. `token`: names the worker's connector, for a
    scheduler in the same process. `splits`: where else its heads may be stored, for each other tensor-parallel size.
    `further`: specs of further groups of layers, see `GroupShape`. `tiers`: of its store.
    """

    spec: KVSpec
    may_fuse: bool = False
    fusion: FusionMethod = EXACT
    token: str = ""
    splits: tuple[HeadSplit, ...] = ()
    further: tuple[KVSpec, ...] = ()
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LookUp:
    """Ask which leading chunks are stored. Those found are an offer: they are pinned until a load of this number ends,
    the number is in `StepPlan.released`, or another look-up `replaces` it.

    `first`: number of the first chunk within its request. `further`: keys of the same chunks in further groups.
    `is_each`: ask of each chunk alone, `""` for one that is not stored; nothing is offered and nothing pinned.
    """

    request_id: str
    keys: RankKeys
    number: int = 0
    replaces: int = 0
    others: RankOthers = ()
    first: int = 0
    further: tuple[RankKeys, ...] = ()
    is_each: bool = False

    def others_of(self, rank: int) -> tuple[OtherKeys, ...]:
        """Keys of other sizes, for one rank; empty if these are not looked for."""
        return self.others[rank] if self.others else ()


@dataclass(frozen=True, slots=True)
class Load:
    """Write stored KV of tokens `[start, stop)` into the request's blocks. Chunk 0 begins at token `first`.

    Tokens for which there are no keys are lost. `lookup`: number of the look-up that offered the chunks. `skipped`:
    tokens before `start` that the load provides without loading them, as no later token attends to them. `further`: of
    further groups. `limit_s`: seconds after which what is not loaded is left to the engine to compute; None: no such
    limit.
    """

    request_id: str
    keys: RankKeys
    first: int
    start: int
    stop: int
    blocks: tuple[int, ...]
    lookup: int = 0
    others: RankOthers = ()
    skipped: int = 0
    further: tuple[Load, ...] = ()
    limit_s: float | None = None

    def chunks_of(self, rank: int) -> Iterator[tuple[ChunkKey, OtherKeys]]:
        """Each chunk's key on one rank, and its keys in other sizes."""
        return zip(self.keys[rank], self.others_of(rank) or repeat(()), strict=False)

    def others_of(self, rank: int) -> tuple[OtherKeys, ...]:
        """As of a `LookUp`."""
        return self.others[rank] if self.others else ()

    def blocks_from(self, token: int, block_tokens: int) -> frozenset[int]:
        """The blocks that hold tokens from this one on: those without KV if nothing from there on was loaded."""
        return frozenset(self.blocks[token // block_tokens : -(-self.stop // block_tokens)])


@dataclass(frozen=True, slots=True)
class Save:
    """Store the KV of tokens from `start` on; `blocks` begin with the one that holds token `start`.

    `keys`, `after`: of the chunk and of the chunk that it continues, one key for each rank. `recompute_s`: seconds that
    computing it took, if known. `is_prefix`: a chunk of the request's prefix; otherwise a document, stored by content.
    `group`: whose blocks these are.
    """

    keys: tuple[ChunkKey, ...]
    after: tuple[ChunkKey, ...] | None
    token_ids: NDArray[np.int64]
    start: int
    blocks: tuple[int, ...]
    recompute_s: float | None = None
    request_id: str = ""
    is_prefix: bool = False
    group: int = 0


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a fused request, tokens `[start, stop)`, and its content key for each rank.

    `others`: for each rank its keys in other sizes; empty if these are not looked for.
    """

    start: int
    stop: int
    keys: tuple[ChunkKey, ...]
    others: tuple[OtherKeys, ...] = ()

    def others_of(self, rank: int) -> OtherKeys:
        """Keys of other sizes, for one rank."""
        return self.others[rank] if self.others else ()


@dataclass(frozen=True, slots=True)
class Fusion:
    """Provide KV of tokens `[start, stop)`: documents from the store where they are stored, `ratio` of them recomputed,
    and everything else computed. Documents before token `inexact` are exact as they are stored.

    Every rank first fetches documents and reports which it found (`StepReport.found_documents`). It computes only when
    an `Advance` says so: ranks compute together and must not wait for each other within a step. What precedes the first
    document is computed while documents are fetched.

    `question`: the tokens that follow the documents, for a choice that goes by them; None for one that does not.

    `chosen`: positions that an equal fusion recomputed whose KV is there up to `start`, to go on with its choice; None:
    the tokens are to be chosen.
    """

    request_id: str
    token_ids: NDArray[np.int64]
    start: int
    stop: int
    inexact: int
    documents: tuple[Document, ...]
    ratio: float
    blocks: tuple[int, ...]
    chosen: NDArray[np.int32] | None = None
    question: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class Advance:
    """Compute the next slice of a fusion; `found` says of each document whether all ranks have it.

    None for `found`: documents are still being fetched. Only what precedes them may be computed.
    """

    request_id: str
    found: tuple[bool, ...] | None


@dataclass(frozen=True, slots=True)
class Revocation:
    """Report these blocks as not loaded, whatever was loaded into them: the cache was reset after the load was planned.
    A load or fusion of the request that is under way ends.
    """

    request_id: str
    blocks: frozenset[int]


@dataclass(slots=True)
class StepPlan:
    """What the workers have to do in one step of the engine.

    Attributes
    ----------
    is_idle : the engine itself computes nothing in this step.
    number : from `PrefillRate.begin`, to be reported with the outcome; 0 for none.
    introduce : report a `WorkerInfo`.
    is_reset : the cache was reset since the last plan.
    layer_loads : loads that are over within the step.
    released : numbers of look-ups whose offers are over.
    failures : requests whose loads are to be reported to the engine once more, as failed.
    cancelled : requests whose loads are to end, as computing is faster by now.
    probe : a chunk to be read when the step is computed, and written nowhere, to learn what its tier costs.
    """

    is_idle: bool = False
    number: int = 0
    introduce: bool = False
    is_reset: bool = False

    lookups: list[LookUp] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    layer_loads: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    advances: list[Advance] = field(default_factory=list)
    revocations: list[Revocation] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    probe: Load | None = None

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do and nothing to report."""
        work = self.lookups or self.loads or self.layer_loads or self.saves or self.fusions or self.advances
        other = self.revocations or self.released or self.is_idle or self.number or self.introduce or self.is_reset
        return not (work or other or self.failures or self.cancelled or self.probe)


@dataclass(frozen=True, slots=True)
class FusionWork:
    """What a fusion has done on one rank, to learn what fusions cost.

    Attributes
    ----------
    documents : that were fetched, by tier.
    tokens : of the passes behind the first document, as if each had gone through all layers.
    position : mean of their positions.
    seconds : of these passes.
    waited_s : seconds from its beginning until all documents were fetched and what precedes them was computed.
    """

    documents: Mapping[str, int] = field(default_factory=dict)
    tokens: float = 0.0
    position: float = 0.0
    seconds: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """Outcome of a load or a fusion.

    Attributes
    ----------
    tokens : loaded, by the tier that they came from.
    failed : a chunk was lost on the way.
    spent_s : seconds from the beginning of the load or fusion to its end.
    computed_tokens : computed by a fusion.
    recompute_s : seconds that computing the loaded tokens took, as far as their chunks say so.
    unpriced_tokens : provided tokens whose chunks do not say so.
    chosen : positions that a fusion recomputed, if it chose them itself.
    ranks : how many ranks this is the outcome of.
    read_s : seconds of loading by tier, from a read to the bytes in the engine's blocks, without waiting for a thread,
        divided by the loads that ran at once; by `""` those of a chunk that did not come. Empty if they were not taken.
    given_back : it ended early because computing was faster, not because a chunk was lost. It counts as `failed`, too.
    fused : what a fusion has done that was neither cancelled nor failed.
    """

    tokens: Mapping[str, int]
    failed: bool
    spent_s: float
    computed_tokens: int = 0
    recompute_s: float = 0.0
    unpriced_tokens: int = 0
    chosen: NDArray[np.int32] | None = None
    ranks: int = 1
    read_s: Mapping[str, float] = field(default_factory=dict)
    given_back: bool = False
    fused: FusionWork | None = None


@dataclass(slots=True)
class StepReport:
    """What the workers did since the last step.

    Attributes
    ----------
    workers : by rank, where the plan asked for it.
    found_prefixes : results of look-ups, by number.
    missing : why look-ups have found nothing, by number.
    loaded : by request.
    found_documents : by request: for each rank that has fetched the documents of a fusion, which of them it has.
    revoked : requests whose revocation was carried out.
    placement_changes : chunks that entered or left a tier, for an engine that publishes KV events.
    number : of the plan.
    probed : outcome of a probe.
    """

    workers: dict[int, WorkerInfo] = field(default_factory=dict)
    found_prefixes: dict[int, FoundTiers] = field(default_factory=dict)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    found_documents: dict[str, tuple[tuple[bool, ...], ...]] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)
    placement_changes: list[PlacementChange] = field(default_factory=list)
    number: int = 0
    missing: dict[int, Missing] = field(default_factory=dict)
    probed: Loaded | None = None

    @property
    def is_empty(self) -> bool:
        told = self.found_prefixes or self.loaded or self.found_documents or self.placement_changes
        return not (told or self.number or self.revoked or self.workers or self.probed)

    def merged(self, other: StepReport) -> StepReport:
        """The report of both ranks: stored is what both have, loaded what neither has lost."""
        prefixes, loaded = dict(self.found_prefixes), dict(self.loaded)
        for number, tiers in other.found_prefixes.items():
            both_have = zip(prefixes.get(number, tiers), tiers, strict=False)
            prefixes[number] = tuple(mine if mine and theirs else "" for mine, theirs in both_have)
        for request_id, load in other.loaded.items():
            loaded[request_id] = both(loaded[request_id], load) if request_id in loaded else load
        documents = dict(self.found_documents)
        for request_id, masks in other.found_documents.items():
            documents[request_id] = documents.get(request_id, ()) + masks
        return StepReport(
            self.workers | other.workers,
            prefixes,
            loaded,
            documents,
            self.revoked | other.revoked,
            self.placement_changes + other.placement_changes,
            max(self.number, other.number),
            other.missing | self.missing,
            both(self.probed, other.probed) if self.probed and other.probed else self.probed or other.probed,
        )


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request in a step: tokens whose KV is there when the step is done, its blocks, and the tokens it computes.

    `further`: its blocks in further groups.
    """

    request_id: str
    computed_tokens: int
    blocks: Sequence[int]
    new_tokens: int = 0
    further: tuple[Sequence[int], ...] = ()


def both(one: Loaded, other: Loaded) -> Loaded:
    """The outcome of two ranks, or of two loads of a request. Every rank has the tokens of the rank that has fewest."""
    fewer = one if sum(one.tokens.values()) <= sum(other.tokens.values()) else other
    return replace(
        fewer,
        failed=one.failed or other.failed,
        spent_s=max(one.spent_s, other.spent_s),
        computed_tokens=max(one.computed_tokens, other.computed_tokens),
        chosen=other.chosen if one.chosen is None else one.chosen,
        ranks=one.ranks + other.ranks,
        read_s={
            tier: max(one.read_s.get(tier, 0.0), other.read_s.get(tier, 0.0)) for tier in {**one.read_s, **other.read_s}
        },
        given_back=one.given_back or other.given_back,
        fused=max(one.fused or other.fused, other.fused or one.fused, key=lambda work: work.seconds if work else 0.0),
    )
