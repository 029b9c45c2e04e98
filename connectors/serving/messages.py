"""What the scheduler's half of the vLLM connector and the workers' halves tell one another. Imports no engine.

`StepPlan` goes to every worker with a step of the engine, `StepReport` comes back with its result. Keys are given for
every rank: what a rank stores are its own heads, under its own keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...core import ChunkKey
from ...kvstore.placement.catalog import PlacementChange

RankKeys: TypeAlias = "tuple[tuple[ChunkKey, ...], ...]"
"""Keys of the same chunks for every rank: `keys[rank][chunk]`."""

Answer: TypeAlias = "tuple[str, ...]"
"""The tier that holds each of the chunks asked about, up to the first that none does."""


@dataclass(frozen=True, slots=True)
class LookUp:
    """Up to which of these chunks are all stored? Each is of use only together with those before it."""

    request_id: str
    keys: RankKeys


@dataclass(frozen=True, slots=True)
class Load:
    """Put stored KV of tokens `[start, stop)` into the request's blocks. Chunk 0 begins at token `first`."""

    request_id: str
    keys: RankKeys
    first: int
    start: int
    stop: int
    blocks: tuple[int, ...]

    def blocks_from(self, token: int, block_tokens: int) -> frozenset[int]:
        """Blocks in which nothing came, if nothing did from this token on."""
        return frozenset(self.blocks[token // block_tokens : -(-self.stop // block_tokens)])


@dataclass(frozen=True, slots=True)
class Save:
    """Store the KV of tokens from `start` on; `blocks` begin with the one that holds token `start`."""

    keys: tuple[ChunkKey, ...]  # one for each rank
    after: tuple[ChunkKey, ...] | None
    token_ids: NDArray[np.int64]
    start: int
    blocks: tuple[int, ...]
    recompute_s: float | None = None  # what computing it took, if that is known
    request_id: str = ""  # who computed it
    is_prefix: bool = False  # a chunk of that request's prefix; otherwise a document, stored by its content


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a fused request, tokens `[start, stop)`, and its content key for each rank."""

    start: int
    stop: int
    keys: tuple[ChunkKey, ...]


@dataclass(frozen=True, slots=True)
class Fusion:
    """Provide KV of tokens `[start, stop)`: documents from the store where they are stored, `ratio` of them recomputed,
    and all that is not stored computed. Documents before token `inexact` are right as they are stored.

    Every rank first fetches documents and tells which it found (`StepReport.found`). It computes only when told to, by
    an `Advance`, since ranks compute together and must not wait for one another within a step.

    `chosen`: what an equal fusion computed whose KV is there up to `start`, to go on with; None: to be chosen.
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


@dataclass(frozen=True, slots=True)
class Advance:
    """Compute the next slice of a fusion; `found` says of each document whether all ranks have it."""

    request_id: str
    found: tuple[bool, ...]


@dataclass(slots=True)
class StepPlan:
    """What the workers are to do in one step of the engine.

    `layerwise`: loads that are over within the step. `is_idle`: the engine itself computes nothing in it. `number`:
    from `PrefillRate.begin`, to be told with the outcome.
    """

    is_idle: bool = False
    number: int = 0

    lookups: list[LookUp] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    layerwise: list[Load] = field(default_factory=list)
    saves: list[Save] = field(default_factory=list)
    fusions: list[Fusion] = field(default_factory=list)
    advances: list[Advance] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Nothing is to be done, and nothing to be told of."""
        asks = self.lookups or self.loads or self.layerwise or self.saves or self.fusions or self.advances
        return not (asks or self.is_idle or self.number)


@dataclass(frozen=True, slots=True)
class Loaded:
    """What became of a load or a fusion: tokens by tier, tokens computed, and whether a chunk was lost on the way.

    `recompute_s`: what computing tokens that came with this knowledge took. `unpriced_tokens`: provided without it.
    `chosen`: the positions that a fusion computed, if it chose them itself.
    """

    tokens: Mapping[str, int]
    failed: bool
    spent_s: float
    computed_tokens: int = 0
    recompute_s: float = 0.0
    unpriced_tokens: int = 0
    chosen: NDArray[np.int32] | None = None


@dataclass(slots=True)
class StepReport:
    """What the workers did since the last step.

    `found`: for each rank that has fetched the documents of a fusion, which of them it has. `moves`: chunks that
    entered or left a tier, where somebody wants to know. `number`: of the plan.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    loaded: dict[str, Loaded] = field(default_factory=dict)
    found: dict[str, tuple[tuple[bool, ...], ...]] = field(default_factory=dict)
    moves: list[PlacementChange] = field(default_factory=list)
    number: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.answers or self.loaded or self.found or self.moves or self.number)

    def merged(self, other: StepReport) -> StepReport:
        """Of two ranks: stored is what all have, loaded what none has lost."""
        answers, loaded = dict(self.answers), dict(self.loaded)
        for request_id, answer in other.answers.items():
            answers[request_id] = min(answers.get(request_id, answer), answer, key=len)
        for request_id, load in other.loaded.items():
            loaded[request_id] = both(loaded[request_id], load) if request_id in loaded else load
        found = {**self.found, **{name: self.found.get(name, ()) + masks for name, masks in other.found.items()}}
        return StepReport(answers, loaded, found, self.moves + other.moves, max(self.number, other.number))


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A request in a step: tokens whose KV is there when it is done, its blocks, and how many tokens it computes."""

    request_id: str
    computed_tokens: int
    blocks: Sequence[int]
    new_tokens: int = 0


def both(one: Loaded, other: Loaded) -> Loaded:
    """Of two ranks, or of two loads of a request. Tokens are those of every rank: the fewer."""
    fewer = one if sum(one.tokens.values()) <= sum(other.tokens.values()) else other
    return replace(
        fewer,
        failed=one.failed or other.failed,
        spent_s=max(one.spent_s, other.spent_s),
        computed_tokens=max(one.computed_tokens, other.computed_tokens),
        chosen=other.chosen if one.chosen is None else one.chosen,
    )
