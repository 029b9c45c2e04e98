"""What a controller is asked and what it answers: stored chunks, queues, decisions and their reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

Missing: TypeAlias = Literal["never stored", "other model", "evicted", "expired", "removed", "unavailable"]
"""Why nothing of a prompt was found, by its first chunk.

- `never stored`: or so long ago that it is forgotten.
- `other model`: when the store was opened, it held chunks of other models only, and none was stored since.
- `evicted`: to make room for others.
- `expired`: its time was over.
- `removed`: deleted, by whom ever; found corrupt or undecodable; or it did not fit.
- `unavailable`: in a tier that does not answer.
"""

Reason: TypeAlias = Literal[
    "nothing stored",
    "never stored",
    "other model",
    "evicted",
    "expired",
    "removed",
    "unavailable",
    "loads",
    "untried",
    "shortened",
    "too short to pay",
    "slow tier",
    "load queue",
    "trial",
    "computes while waiting",
    "always",
    "fuses",
    "ratio raised",
    "fusion does not pay",
]
"""Why a request loads as much as it does.

- `nothing stored`: there is nothing to load; where more is known, the word of `Missing`.
- `loads`: all that is stored, as that is fastest.
- `untried`: all that is stored, as too little is known yet of what loading it or computing it costs. Once computing is
  known, no longer than that takes.
- `shortened`: a part of it; to load more would take longer than to compute it.
- `too short to pay`: nothing; what a load costs whatever its size is more than computing so few tokens.
- `slow tier`: nothing; the tier gives bytes more slowly than the engine computes their tokens.
- `load queue`: nothing; too much waits to be loaded before it.
- `trial`: all but one chunk, as computing was not observed for long. Of documents all or none, whichever is thought
    slower and was not observed for long.
- `computes while waiting`: it was to be loaded, but has not begun, and now computing is faster.
- `always`: all that is stored, as the user has said.
- `fuses`: all documents that are stored, as that is fastest; they are fused at the ratio that was asked for.
- `ratio raised`: all but leading documents, which are computed in full while the others are loaded.
- `fusion does not pay`: no document; to compute everything takes no longer than to load and fuse them.
"""

_NONE: Mapping[str, int] = MappingProxyType({})

REASONS: tuple[Reason, ...] = get_args(Reason)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """Neighbouring chunks of a prefix in one tier. `chunk_bytes`, `chunk_tokens`: of each of them.

    Bytes are counted as in `Controller.observe_load`.
    """

    tier: str
    chunks: int
    chunk_bytes: int
    chunk_tokens: int


@dataclass(frozen=True, slots=True)
class Queue:
    """What waits before a request.

    Attributes
    ----------
    loads : that have not ended.
    load_bytes : that they are still to load, by tier.
    compute_tokens : of prompts that the engine has taken on and not computed.
    compute_position : mean position of these tokens in their prompts.
    """

    loads: int = 0
    load_bytes: Mapping[str, int] = field(default_factory=lambda: _NONE)
    compute_tokens: int = 0
    compute_position: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """How much a request loads.

    Attributes
    ----------
    chunks : leading ones to load; of a request that may be fused, documents.
    reason : see `Reason`.
    load_s : expected seconds to the first token if so many chunks are loaded, or, where none is, if as many were as is
        best; None if not known.
    compute_s : the same if nothing is loaded.
    limit_s : seconds after which the load is better given up, counted from now; None for no limit.
    """

    chunks: int
    reason: Reason
    load_s: float | None = None
    compute_s: float | None = None
    limit_s: float | None = None

    def __str__(self) -> str:
        """In one line, for people."""
        expected = (
            f"loading is expected to take {_seconds(self.load_s)}, computing everything {_seconds(self.compute_s)}"
        )
        return f"{self.chunks} chunks are loaded ({self.reason}); {expected}"


def _seconds(seconds: float | None) -> str:
    return "an unknown time" if seconds is None else f"{seconds:.3g} s"


IDLE = Queue()
"""Nothing waits."""


@dataclass(frozen=True, slots=True)
class StoredPrefix:
    """What is stored of a request's prompt.

    Attributes
    ----------
    runs : from token `start` on, without a gap.
    computed : tokens that the engine has already, `start` of them or more.
    prompt_tokens : of the request.
    """

    runs: Sequence[StoredRun]
    start: int
    computed: int
    prompt_tokens: int

    @property
    def chunks(self) -> int:
        """Of all runs."""
        return sum(run.chunks for run in self.runs)

    def leading(self, chunks: int) -> tuple[StoredRun, ...]:
        """The runs of so many leading chunks."""
        return tuple(replace(run, chunks=taken) for run, taken in self._taken(chunks))

    def stop(self, chunks: int) -> int:
        """Tokens that the engine has when so many chunks are loaded."""
        stop = self.start + sum(taken * run.chunk_tokens for run, taken in self._taken(chunks))
        return min(max(stop, self.computed), self.prompt_tokens)

    def bytes_of(self, chunks: int) -> dict[str, int]:
        """Bytes of so many leading chunks, by tier."""
        found: dict[str, int] = {}
        for run, taken in self._taken(chunks):
            found[run.tier] = found.get(run.tier, 0) + taken * run.chunk_bytes
        return found

    def _taken(self, chunks: int) -> Iterator[tuple[StoredRun, int]]:
        """The runs that hold so many leading chunks, and how many of them each has."""
        for run in self.runs:
            taken = min(chunks, run.chunks)
            if taken:
                yield run, taken
            chunks -= taken
