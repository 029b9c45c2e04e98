"""Requests to plan for: a recorded trace, or documents asked for by Zipf's law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np

from ...core import ChunkKey
from ..eviction.replay import TimedRequest, read_timed_trace
from .machines import read_assignments

TRACE_BLOCK_TOKENS = 512  # of Mooncake's traces
_DEFAULTS = {
    "documents": 10000.0, "alpha": 1.0, "tokens": 2048.0, "per_request": 4.0, "question": 128.0, "output": 256.0,
    "requests": 2000.0, "rate": 1.0, "seed": 0.0,
}  # fmt: skip
_MOST_DOCUMENTS = 10**7
_FEW = 100  # documents for each that a request names


@dataclass(frozen=True, slots=True)
class Zipf:
    """Requests that each name some of many documents.

    Attributes
    ----------
    documents : how many there are.
    alpha : the i-th most popular one is asked for in proportion to `i ** -alpha`.
    tokens : of a document.
    per_request : different documents in a request.
    question, output : tokens behind the documents, and of the answer.
    requests : how many, at random times.
    rate : requests a second.
    """

    documents: int
    alpha: float
    tokens: int
    per_request: int
    question: int
    output: int
    requests: int
    rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("documents", "tokens", "per_request", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} of the traffic is {getattr(self, name)}; expected at least 1")
        if self.documents > _MOST_DOCUMENTS:
            raise ValueError(f"documents of the traffic is {self.documents:,}; expected at most {_MOST_DOCUMENTS:,}")
        if self.per_request > self.documents:
            raise ValueError(f"per_request of the traffic is {self.per_request}; there are {self.documents} documents")
        if self.rate <= 0 or self.alpha < 0 or min(self.question, self.output, self.seed) < 0:
            raise ValueError("rate, alpha, question, output or seed of the traffic is too small; expected rate above 0")

    @classmethod
    def read(cls, text: str) -> Zipf:
        """`documents=10000,alpha=1,...`; what is left out has the default of `_DEFAULTS`."""
        found = _DEFAULTS | (read_assignments(text, _DEFAULTS, "zipf:") if text else {})
        whole = {name: value for name, value in found.items() if name not in ("alpha", "rate")}
        if wrong := [name for name, value in whole.items() if value != int(value)]:
            raise ValueError(f"{wrong[0]} of the traffic is {whole[wrong[0]]:g}; expected a whole number")
        return cls(alpha=found["alpha"], rate=found["rate"], **{name: int(value) for name, value in whole.items()})

    def draw(self) -> list[TimedRequest]:
        """The requests, always the same for one seed."""
        random = np.random.default_rng(self.seed)
        weights = np.arange(1, self.documents + 1, dtype=np.float64) ** -self.alpha
        weights /= weights.sum()
        bounds = np.cumsum(weights)
        times = np.cumsum(random.exponential(1 / self.rate, self.requests))
        tokens = self.per_request * self.tokens + self.question
        found = []
        for at in times:
            if self.documents < _FEW * self.per_request:
                chosen = list(random.choice(self.documents, self.per_request, replace=False, p=weights))
            else:  # as long as nearly all that is drawn is new, by far the faster way to the same distribution
                seen: dict[int, None] = {}
                while len(seen) < self.per_request:
                    drawn = int(np.searchsorted(bounds, random.random(), side="right"))
                    seen[min(drawn, self.documents - 1)] = None
                chosen = list(seen)
            keys = [_key(int(document)) for document in chosen]
            found.append(TimedRequest(float(at), keys, tokens, self.output))
        return found


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests, and what their keys stand for.

    Attributes
    ----------
    block_tokens : that a key stands for.
    is_chained : whether keys are blocks chained on those before them; otherwise documents.
    """

    name: str
    requests: Sequence[TimedRequest]
    block_tokens: int
    is_chained: bool

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s

    @property
    def blocks(self) -> int:
        """References to blocks or documents."""
        return sum(len(request.keys) for request in self.requests)

    def as_prefixes(self) -> Traffic:
        """Documents as an engine's prefix cache knows them: each together with those before it."""
        if self.is_chained:
            return self
        found = []
        for request in self.requests:
            keys, before = [], b""
            for key in request.keys:
                before = blake2b(before + key, digest_size=32).digest()
                keys.append(ChunkKey(before))
            found.append(TimedRequest(request.arrival_s, keys, request.input_tokens, request.output_tokens))
        return Traffic(self.name, found, self.block_tokens, True)


def read_traffic(text: str) -> Traffic:
    """A trace's file, or `zipf:documents=10000,alpha=1,...`.

    Raises
    ------
    ValueError : it is neither; the message says what is wrong.
    """
    kind, separator, rest = text.partition(":")
    if separator and kind == "zipf":
        zipf = Zipf.read(rest)
        return Traffic(f"zipf, {zipf.documents:,} documents", zipf.draw(), zipf.tokens, False)
    path = Path(text).expanduser()
    if not path.exists():
        raise ValueError(f"there is no trace {text}; expected a file of JSON lines, or zipf:documents=10000,alpha=1")
    return Traffic(path.name, read_timed_trace(path), TRACE_BLOCK_TOKENS, True)


def _key(document: int) -> ChunkKey:
    return ChunkKey(blake2b(b"document %d" % document, digest_size=32).digest())
