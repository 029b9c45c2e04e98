"""What requests would see: hits by a replay through the store, times by a schedule of their loads and prefills."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from ...evaluation.intervals import quantiles
from ..eviction.replay import TimedRequest, replay_tiers
from ..schedule.costs import Costs
from ..schedule.jobs import Job, Policy, Served
from ..schedule.queues import schedule
from .machines import TierPlan
from .setup import Setup
from .traffic import Traffic

PREFIX, FUSION = "prefix", "fusion"
_PEAK_S = 60.0
_NOTHING = "none"
_SHARES = tuple(i / 100 for i in (*range(1, 99, 3), 99))


@dataclass(frozen=True, slots=True)
class Way:
    """A way of keeping KV: in which tiers, under which codec, found by prefix or fused from documents."""

    tiers: tuple[str, ...] = ()
    codec: str = "raw"
    reuse: str = PREFIX

    @property
    def is_cached(self) -> bool:
        return bool(self.tiers)

    @property
    def text(self) -> str:
        return " + ".join(self.tiers) or _NOTHING


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a way would do for the requests.

    Attributes
    ----------
    hits : shares of all references to blocks or documents, by tier.
    engines : that were simulated.
    ttft_s : median and 99th percentile, queues included.
    times : shares of the requests, and the time to first token that they do not exceed.
    alone_s : median time to first token of a request that meets no queue.
    loading : share of requests that load something.
    read_bytes_s : by tier, mean over the requests, and in the busiest minute.
    written_bytes_s : by tier, mean.
    busy : share of the time that each resource is in use, by name.
    tokens : of all prompts.
    duration_s : of the requests.
    """

    way: Way
    hits: Mapping[str, float]
    engines: int
    ttft_s: tuple[float, float]
    times: Sequence[tuple[float, float]]
    alone_s: float
    loading: float
    read_bytes_s: Mapping[str, tuple[float, float]]
    written_bytes_s: Mapping[str, float]
    busy: Mapping[str, float]
    tokens: int
    duration_s: float

    @property
    def hit_ratio(self) -> float:
        return sum(self.hits.values())

    @property
    def bottleneck(self) -> str:
        """The resource that is in use most."""
        return max(self.busy, key=lambda name: self.busy[name])

    def hourly_cost(self, prices: Mapping[str, float], tiers: Sequence[TierPlan], gpus: int) -> float:
        """Of its engines and tiers, at prices of a GPU's hour and of an hour of a GB in each tier."""
        found = prices.get("gpu", 0.0) * self.engines * gpus
        return found + sum(
            prices.get(tier.name, 0.0) * tier.capacity_bytes / 1e9 for tier in tiers if tier.name in self.way.tiers
        )


def ways(setup: Setup, traffic: Traffic) -> Iterator[Way]:
    """No cache; then every choice of tiers under every codec, and by fusion where requests are of documents."""
    yield Way(codec=next(iter(setup.forms)))
    names = [tier.name for tier in setup.tiers]
    for count in range(1, len(names) + 1):
        for chosen in combinations(names, count):
            for codec in setup.forms:
                for reuse in (PREFIX,) if traffic.is_chained else (PREFIX, FUSION):
                    yield Way(chosen, codec, reuse)


class Predictor:
    """Predicts outcomes of one setup for one traffic; ways in which as many blocks fit are replayed once.

    Parameters
    ----------
    policy : a name of `SIMULATED_POLICIES`.
    engines : to simulate; None for as many as each way needs.
    """

    def __init__(self, setup: Setup, traffic: Traffic, *, policy: str = "default", engines: int | None = None) -> None:
        self._setup, self._traffic, self._prefixes = setup, traffic, traffic.as_prefixes()
        self._policy, self._engines = policy, engines
        self._replays: dict[tuple[str, tuple[int, ...]], list[tuple[int, ...]]] = {}

    def capacities(self, way: Way) -> tuple[int, ...]:
        """Blocks that fit into each tier of a way."""
        form, tiers = self._setup.forms[way.codec], {tier.name: tier for tier in self._setup.tiers}
        return tuple(tiers[name].capacity_bytes // form.bytes_in(name, self._block_chunks) for name in way.tiers)

    @property
    def _block_chunks(self) -> int:
        """Chunks of a block."""
        return math.ceil(self._traffic.block_tokens / next(iter(self._setup.forms.values())).tokens)

    def hits(self, way: Way, advance: Callable[[], object] = lambda: None) -> list[tuple[int, ...]]:
        """Blocks of every request that are found in each tier of a way: what `kvloom simulate` counts."""
        if not way.is_cached:
            return [()] * len(self._traffic.requests)
        traffic = self._traffic if way.reuse == FUSION else self._prefixes
        wanted = way.reuse, self.capacities(way)
        if wanted not in self._replays:
            keys = [request.keys for request in traffic.requests]
            self._replays[wanted] = replay_tiers(
                keys, wanted[1], self._policy, is_chained=traffic.is_chained, advance=advance
            )
        return self._replays[wanted]

    def outcome(self, way: Way, advance: Callable[[], object] = lambda: None) -> Outcome:
        """What a way would do."""
        setup, requests = self._setup, self._traffic.requests
        hits = self.hits(way, advance)
        ratio = setup.assume.fusion_ratio if way.reuse == FUSION else 0.0
        per_block, chunk_tokens = self._block_chunks, setup.forms[way.codec].tokens
        jobs = [
            job_of(request, dict(zip(way.tiers, found, strict=True)), per_block, chunk_tokens, ratio)
            for request, found in zip(requests, hits, strict=True)
        ]
        costs = setup.costs(way.codec, is_moved=way.reuse == FUSION)
        policy: Policy = "never" if not way.is_cached else "controller" if way.reuse == PREFIX else "always"
        duration_s = max(self._traffic.duration_s, 1e-9)
        engines = self._engines
        if engines is None:
            engines = engines_needed(jobs, costs, duration_s, setup.assume.busy_ratio)
        served = schedule(jobs, costs, policy, engines=engines, is_taught=True)
        return self._outcome(way, hits, served, engines, duration_s)

    def _outcome(
        self, way: Way, hits: Sequence[tuple[int, ...]], served: Sequence[Served], engines: int, duration_s: float
    ) -> Outcome:
        setup, form, blocks = self._setup, self._setup.forms[way.codec], self._traffic.blocks
        costs, per_block = setup.costs(way.codec, is_moved=way.reuse == FUSION), self._block_chunks
        counts = [each.job.leading(each.chunks) for each in served]
        read, busy = {}, {"computing": sum(each.computed_s for each in served) / (engines * duration_s)}
        first_s = self._traffic.requests[0].arrival_s
        for name in way.tiers:
            nbytes = [form.bytes_in(name, found.get(name, 0)) for found in counts]
            minutes: dict[int, float] = {}
            for each, size in zip(served, nbytes, strict=True):
                minute = int((each.job.arrival_s - first_s) // _PEAK_S)
                minutes[minute] = minutes.get(minute, 0.0) + size
            read[name] = sum(nbytes) / duration_s, max(minutes.values(), default=0.0) / min(_PEAK_S, duration_s)
            tier = next(tier for tier in setup.tiers if tier.name == name)
            speed = (setup.machine.read_bytes_s or {}).get(name, tier.read_bytes_s)
            if math.isfinite(speed):
                busy[name] = read[name][0] / (speed * (1 if name == "remote" else engines))
        chunks = sum(sum(found.values()) for found in counts)
        if way.is_cached:
            busy["host to GPU"] = chunks * form.raw_bytes / (setup.machine.link_bytes_s * engines * duration_s)
            loads_s = sum(costs.load_s(found) for found in counts)
            busy["loading threads"] = loads_s / (engines * costs.lanes * duration_s)
        stored = blocks - sum(map(sum, hits))
        alone = [costs.load_s(found) + each.computed_s for each, found in zip(served, counts, strict=True)]
        *times, median_s, late_s = quantiles([each.ttft_s for each in served], (*_SHARES, 0.5, 0.99))
        return Outcome(
            way=way,
            hits={name: sum(found[i] for found in hits) / blocks for i, name in enumerate(way.tiers)},
            engines=engines,
            ttft_s=(median_s, late_s),
            times=list(zip(_SHARES, times, strict=True)),
            alone_s=quantiles(alone, (0.5,))[0],
            loading=sum(each.chunks > 0 for each in served) / len(served),
            read_bytes_s=read,
            written_bytes_s={name: form.bytes_in(name, stored * per_block) / duration_s for name in way.tiers},
            busy=busy,
            tokens=sum(each.job.tokens for each in served),
            duration_s=duration_s,
        )


def engines_needed(jobs: Sequence[Job], costs: Costs, duration_s: float, busy_ratio: float) -> int:
    """Engines for which computing what is not stored, and answers, takes no more than this share of the time; nor do
    loads that are made in any case, as those of fusions are.
    """
    computed_s, loaded_s = 0.0, 0.0
    for job in jobs:
        behind = sum(job.stored.values()) * costs.chunk_tokens
        computed_s += costs.prefill.seconds(job.tokens - behind, behind)
        computed_s += (job.output_tokens - 1) * costs.prefill.added_s(1, job.tokens + job.output_tokens / 2)
        if job.recompute_ratio:
            computed_s += costs.prefill.scattered_s(behind * job.recompute_ratio, behind)
            loaded_s += costs.load_s(job.stored)
    needed = max(computed_s, loaded_s / costs.lanes) / (max(duration_s, 1e-9) * busy_ratio)
    return max(1, math.ceil(needed))


def job_of(
    request: TimedRequest, hits: Mapping[str, int], block_chunks: int, chunk_tokens: int, recompute_ratio: float = 0.0
) -> Job:
    """A request of a trace for a schedule: what may be loaded of its hits, as its last token is always computed.

    Parameters
    ----------
    hits : blocks found in each tier, of `block_chunks` chunks each.
    """
    left, stored = (request.input_tokens - 1) // chunk_tokens, {}
    for tier, blocks in hits.items():
        taken = min(blocks * block_chunks, left)
        if taken > 0:
            stored[tier] = taken
        left -= taken
    return Job(request.arrival_s, request.input_tokens, stored, recompute_ratio, max(1, request.output_tokens))
