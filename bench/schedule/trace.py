"""A small trace to be replayed on a real engine: prompts that begin with stored ones, in bursts at random times."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..vllm.inputs import Prompts
from .jobs import Job

NEW_RATIO = 0.2  # of the prompts: nothing of them is stored
BURST = 4  # most requests at the same moment
OUTPUT_TOKENS = 16  # most that a request generates


@dataclass(frozen=True, slots=True)
class Traced:
    """A request of the trace.

    Attributes
    ----------
    work : when it comes, in seconds of an engine that computes everything and is never idle.
    document : whose beginning its prompt is; None for one that is not stored.
    chunks : stored of it.
    new_tokens : behind them.
    output_tokens : that it generates.
    """

    work: float
    document: int | None
    chunks: int
    new_tokens: int
    output_tokens: int

    def job(self, tier: str, chunk_tokens: int, work_s: float) -> Job:
        """For the simulation; `work_s`: real seconds of one of `work`."""
        stored = {tier: self.chunks} if self.chunks else {}
        tokens = self.chunks * chunk_tokens + self.new_tokens
        return Job(self.work * work_s, tokens, stored, output_tokens=self.output_tokens)


def draw_trace(requests: int, documents: int, chunks: int, chunk_tokens: int, *, busy_ratio: float) -> list[Traced]:
    """Bursts by a Poisson process. Always the same for the same sizes.

    Parameters
    ----------
    documents : that are stored, the first ones asked for more often (Zipf).
    chunks : of each of them; a prompt begins with one to all of them.
    busy_ratio : share of the time in which an engine that computes everything is busy. Work counts in tokens, a chunk
        being a second.
    """
    draw = random.Random(5)
    weights = [1.0 / (rank + 1) for rank in range(documents)]
    found: list[Traced] = []
    now, left, gap = 0.0, 0, 0.0
    for _ in range(requests):
        if not left:
            now, left, gap = now + draw.expovariate(1.0) * gap, draw.randint(1, BURST), 0.0
        left -= 1
        if draw.random() < NEW_RATIO:
            document, stored, new = None, 0, draw.randint(chunk_tokens, chunks * chunk_tokens)
        else:
            (document,) = draw.choices(range(documents), weights)
            stored, new = draw.randint(1, chunks), draw.randint(16, chunk_tokens)
        found.append(Traced(now, document, stored, new, draw.randint(1, OUTPUT_TOKENS)))
        gap += (stored + new / chunk_tokens) / busy_ratio
    return found


def prompts_of(trace: Sequence[Traced], texts: Sequence[Sequence[int]], prompts: Prompts, size: int) -> list[list[int]]:
    """Token ids; what is new is never the same."""
    return [
        [*([] if each.document is None else texts[each.document][: each.chunks * size]), *prompts.ids(each.new_tokens)]
        for each in trace
    ]
