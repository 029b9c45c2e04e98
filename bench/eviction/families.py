"""Traffic of several kinds, drawn at random from what is published of it: what a policy must cope with that knows none.

`CHOSEN_ON` are the families that a policy may be tuned on; those of `HELD_OUT` only check it. Every number that is not
quoted from a paper is drawn anew for each instance, within the range that stands in the code.

Sources
-------
Conversations: 73 % of ShareGPT's have several turns (CachedAttention, ATC 2024, arXiv 2403.19708); of the returns to a
public chat service 80 % come within 10 minutes, and of those to an API within 10 seconds, by single turns behind a
shared prompt (KVCache cache in the wild, ATC 2025, arXiv 2506.02634). Retrieval: 3 % of the documents serve 60 % of the
requests (RAGCache, arXiv 2404.12457), which is Zipf's law with an exponent of 1. Agents: tool calls take milliseconds
to tens of seconds (Continuum, arXiv 2511.02230), beside gaps paced by people and some 80 steps a session (TraceLab,
arXiv 2606.30560). Documents: LooGLE asks 8 questions of each, prompts share the instructions of tools as ToolBench's
do (both as in Preble, ICLR 2025, arXiv 2407.00023).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from ...core import ChunkKey

CHUNK_TOKENS = 256
_CHUNK_BYTES = 32 << 20  # 32 layers, 8 KV heads of dimension 128, 16 bit
_CHUNK_S = 0.032  # 8,000 tokens a second at the beginning of a context
_DOUBLING_CHUNKS = 128  # where attention takes as long as all else: 32,768 tokens


class Cost(NamedTuple):
    """Of a chunk: what it takes in a tier, and how long computing it took."""

    nbytes: int
    recompute_s: float


@dataclass(frozen=True, slots=True)
class Trace:
    """Chains of chunks in the order in which they are asked for; a request with several documents is several chains.

    Attributes
    ----------
    chains : keys of each, every one the continuation of the one before it.
    costs : of every chunk.
    """

    chains: Sequence[Sequence[ChunkKey]]
    costs: Mapping[ChunkKey, Cost]

    @property
    def references(self) -> int:
        return sum(map(len, self.chains))

    @property
    def footprint_bytes(self) -> int:
        """Of all different chunks."""
        return sum(cost.nbytes for cost in self.costs.values())


Label: TypeAlias = tuple[str | int, ...]
Timed: TypeAlias = tuple[float, Sequence[Label]]  # when a chain is asked for, and the labels of its chunks


@dataclass(slots=True)
class _Draw:
    """Random numbers of one instance, by what they stand for."""

    numbers: random.Random
    serial: Iterator[int] = field(default_factory=itertools.count)

    def between(self, low: float, high: float) -> float:
        return self.numbers.uniform(low, high)

    def log_between(self, low: float, high: float) -> float:
        return math.exp(self.numbers.uniform(math.log(low), math.log(high)))

    def around(self, median: float, sigma: float) -> float:
        """Log-normal: as often below the median as above it, with a long tail."""
        return median * math.exp(self.numbers.gauss(0, sigma))

    def chunks(self, median: float, sigma: float, most: int = 400) -> int:
        """How many, at least one."""
        return min(most, max(1, round(self.around(median, sigma))))

    def times(self, mean: float) -> int:
        """Geometric: at least one, and as likely to go on after each."""
        return 1 + int(self.numbers.expovariate(1) / -math.log1p(-1 / mean)) if mean > 1 else 1

    def arrivals(self, mean_s: float, begin_s: float, end_s: float) -> Iterator[float]:
        """Poisson: independent of one another, `mean_s` apart on average."""
        at_s = begin_s
        while (at_s := at_s + self.numbers.expovariate(1 / mean_s)) < end_s:
            yield at_s

    def ranks(self, count: int, exponent: float) -> Callable[[], int]:
        """Zipf: rank `n` from 0 with a chance in proportion to `(n + 1) ** -exponent`."""
        chances = list(itertools.accumulate((n + 1) ** -exponent for n in range(count)))
        return lambda: self.numbers.choices(range(count), cum_weights=chances)[0]

    def part(self, name: str, chunks: int) -> list[Label]:
        """Text that nothing has in common with other text."""
        number = next(self.serial)
        return [(name, number, i) for i in range(chunks)]


def _chat(draw: _Draw) -> Iterable[Timed]:
    """People talk to an assistant, read, think, and come back."""
    systems = [draw.part("system", draw.chunks(3, 0.6)) for _ in range(draw.numbers.randint(1, 4))]
    turns, think_s = draw.between(4, 8), draw.log_between(60, 240)
    sigma = math.log(600 / think_s) / 0.84 if think_s < 400 else 1.0  # 80 % within ten minutes
    for begin_s in draw.arrivals(draw.between(0.8, 1.4), -2000, 2000):
        at_s, prompt = begin_s, list(draw.numbers.choice(systems))
        name, tokens, turn_count = next(draw.serial), 0.0, draw.times(turns) if draw.numbers.random() < 0.73 else 1
        for _ in range(turn_count):
            pasted = draw.around(1500, 0.8) if draw.numbers.random() < 0.1 else 0.0
            tokens += draw.around(60, 1.0) + pasted
            whole = min(200, int(tokens // CHUNK_TOKENS))
            yield at_s, [*prompt, *(("chat", name, i) for i in range(whole))]
            tokens += draw.around(250, 0.7)
            at_s += 10 + draw.around(think_s, sigma)


def _rag(draw: _Draw) -> Iterable[Timed]:
    """Questions over a corpus: a few documents each, alone (fused later) or in the order of a prompt."""
    count = draw.numbers.randint(3000, 8000)
    documents = [draw.part("document", draw.chunks(2, 0.6, 12)) for _ in range(count)]
    draw.numbers.shuffle(documents)
    rank, found, drift_s = draw.ranks(count, draw.between(0.7, 1.1)), draw.numbers.randint(2, 5), draw.between(2, 20)
    is_alone, system = draw.numbers.random() < 0.5, draw.part("system", 2)
    moved_s = 0.0
    for at_s in draw.arrivals(1.0, 0, 12000 / found):
        while moved_s < at_s:  # what is asked for changes slowly
            one, other = rank(), draw.numbers.randrange(count)
            documents[one], documents[other] = documents[other], documents[one]
            moved_s += drift_s
        chosen = [documents[n] for n in dict.fromkeys(rank() for _ in range(found))]
        if is_alone:
            yield from ((at_s, document) for document in chosen)
        else:
            yield at_s, list(itertools.chain(system, *chosen))


def _agents(draw: _Draw) -> Iterable[Timed]:
    """Programs call tools in a loop, behind long instructions; now and then a person is asked."""
    systems = [draw.part("system", draw.chunks(30, 0.5, 80)) for _ in range(draw.numbers.randint(2, 6))]
    rank, steps = draw.ranks(len(systems), 1.0), draw.between(8, 20)
    tool_s, asks = draw.log_between(1, 6), draw.between(0.01, 0.06)
    for begin_s in draw.arrivals(draw.between(3, 8), -300, 1500):
        at_s, context = begin_s, [*systems[rank()], *draw.part("task", draw.chunks(3, 0.7))]
        for _ in range(draw.times(steps)):
            yield at_s, list(context)
            context += draw.part("result", draw.chunks(1.5, 0.9, 30))
            waits = draw.around(120, 1.2) if draw.numbers.random() < asks else draw.around(tool_s, 1.4)
            at_s += 4 + waits
            if len(context) > 250:
                break


def _scans(draw: _Draw) -> Iterable[Timed]:
    """Batch jobs run over corpora, once or again with another question, beside people who use the same service."""
    corpora = [
        [draw.part("document", draw.chunks(6, 0.6, 40)) for _ in range(draw.numbers.randint(150, 500))]
        for _ in range(draw.numbers.randint(2, 4))
    ]
    again = draw.between(0.0, 0.6)
    begin_s = draw.between(0, 300)
    while begin_s < 3000:
        corpus = draw.numbers.choice(corpora)
        if draw.numbers.random() > again:  # new text, never seen before
            corpus = [draw.part("document", len(document)) for document in corpus]
            corpora[draw.numbers.randrange(len(corpora))] = corpus
        for at_s, document in zip(itertools.count(begin_s, draw.log_between(0.5, 2)), corpus, strict=False):
            yield at_s, document
        begin_s += draw.between(300, 900)
    tasks = [draw.part("task", draw.chunks(8, 0.6, 40)) for _ in range(draw.numbers.randint(100, 300))]
    rank = draw.ranks(len(tasks), draw.between(0.6, 1.1))
    for at_s in draw.arrivals(draw.between(0.8, 2), 0, 3500):
        yield at_s, [*tasks[rank()], *draw.part("input", draw.numbers.randint(0, 2))]


def _questions(draw: _Draw) -> Iterable[Timed]:
    """Long documents are opened, asked a few questions, and left; some are opened by others later."""
    opened: list[list[Label]] = []
    questions, read_s, again = draw.between(4, 12), draw.log_between(20, 90), draw.between(0.05, 0.3)
    for begin_s in draw.arrivals(draw.between(6, 14), -600, 3000):
        if opened and draw.numbers.random() < again:
            document = draw.numbers.choice(opened[-200:])
        else:
            document = draw.part("document", draw.chunks(40, 0.7, 250))
            opened.append(document)
        at_s = begin_s
        for _ in range(draw.times(questions)):
            yield at_s, document
            at_s += 5 + draw.around(read_s, 1.0)


def _templates(draw: _Draw) -> Iterable[Timed]:
    """Programs send single prompts: shared instructions, tools and examples, then an input of their own; in bursts."""
    services = [draw.part("system", draw.chunks(3, 0.5)) for _ in range(draw.numbers.randint(10, 40))]
    templates = [
        [*draw.numbers.choice(services), *draw.part("tools", draw.chunks(6, 0.7, 40))]
        for _ in range(draw.numbers.randint(400, 1200))
    ]
    rank, inputs, size = draw.ranks(len(templates), draw.between(0.6, 1.1)), draw.between(0.4, 2), draw.between(2, 10)
    for begin_s in draw.arrivals(draw.between(0.5, 1.5) * size / 4, 0, 3000):
        number = rank()
        if draw.numbers.random() < 0.02:  # a new version of it
            templates[number] = [*draw.numbers.choice(services), *draw.part("tools", draw.chunks(6, 0.7, 40))]
        at_s = begin_s
        for _ in range(draw.times(size)):
            yield at_s, [*templates[number], *draw.part("input", int(draw.numbers.expovariate(1 / inputs)))]
            at_s += draw.around(3, 1.0)


CHOSEN_ON: Mapping[str, Callable[[_Draw], Iterable[Timed]]] = MappingProxyType({"chat": _chat, "rag": _rag})
HELD_OUT: Mapping[str, Callable[[_Draw], Iterable[Timed]]] = MappingProxyType(
    {"agents": _agents, "scans": _scans, "questions": _questions, "templates": _templates}
)
FAMILIES: Mapping[str, Callable[[_Draw], Iterable[Timed]]] = MappingProxyType({**CHOSEN_ON, **HELD_OUT})
"""Makers of traffic by name."""


def make_trace(family: str, seed: int, *, most_references: int = 100_000) -> Trace:
    """One instance of a family; equal seeds give equal traces.

    Bytes vary by 2 % as behind a codec, seconds grow with the position as attention does, and by 15 % as measured ones.

    Parameters
    ----------
    most_references : where it ends at the latest.

    Raises
    ------
    ValueError : there is no such family.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}; expected one of {', '.join(FAMILIES)}")
    numbers = random.Random(f"{family} {seed}")
    timed = sorted((at_s, order, labels) for order, (at_s, labels) in enumerate(FAMILIES[family](_Draw(numbers))))
    chains: list[list[ChunkKey]] = []
    costs: dict[ChunkKey, Cost] = {}
    references = 0
    for at_s, _, labels in timed:
        if at_s < 0 or not labels:
            continue
        if references + len(labels) > most_references:
            break
        chain: list[ChunkKey] = []
        after = b""
        for place, label in enumerate(labels):
            after = blake2b(after + repr(label).encode(), digest_size=32).digest()
            chain.append(ChunkKey(after))
            if chain[-1] not in costs:
                nbytes = round(_CHUNK_BYTES * math.exp(numbers.gauss(0, 0.02)))
                seconds = _CHUNK_S * (1 + place / _DOUBLING_CHUNKS) * math.exp(numbers.gauss(0, 0.15))
                costs[chain[-1]] = Cost(nbytes, seconds)
        chains.append(chain)
        references += len(chain)
    return Trace(chains, costs)
