"""Load or recompute: how much of a stored prefix a request loads, by what loading and computing cost on this machine.

    costs      observe_load(tier, bytes, seconds), observe_prefill(tokens, position, seconds), as they happen
    decisions  decide(stored, queue): so many leading chunks are loaded, and why
    probes     is_probe_due(tier, bytes): nothing was loaded from a tier for long; a chunk of it is read beside requests

It is a model of the time to the first token. A request that loads `n` chunks waits for the loads ahead of its own and
for its own; meanwhile the engine computes what waits to be computed; then the request computes the rest:

    max(load queue + load of n chunks, compute queue) + prefill of what follows them

A request that loads nothing waits for the compute queue and computes everything. The decision takes the least of these
times, and of nearly equal ones the one that loads most: computing is what all requests share.

Pure policy: no thread, no input or output, no randomness, and time only by the clock that is given. Imports neither
torch nor an engine. Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from .costs import LearnedCost
from .decisions import IDLE, Decision, Queue, Reason, StoredPrefix
from .trials import PATIENCE, SLACK_RATIO, Trials

_WAIT_RATIO = 1.1  # a request that waits for its load goes on to wait unless computing is faster by this factor
_PREFILL_MEMORY = 0.98  # the last fifty steps or so: bursts of steps of one kind tell three terms badly apart
_PROBE_S, _MOST_PROBE_S = 5.0, 600.0  # least and longest time without an observation of a tier before it is probed
_GRACE_S = 0.1  # least time beyond the expected one before a load is given up
_NEVER_PAYS = 2.0  # a chunk is not stored if loading it takes more than so many times as long as computing it
_STORE_OBSERVATIONS = 8  # of computing, before it is said of a chunk that it will never pay


class Controller:
    """Learns what loading and computing cost, and decides for each request.

        stored = StoredPrefix([StoredRun("disk", 8, chunk_bytes, 256)], start=0, computed=0, prompt_tokens=4096)
        decision = controller.decide(stored, Queue(compute_tokens=12_000))
        controller.begin(decision)  # when the request is taken on

    Parameters
    ----------
    lanes : loads that run at once.
    overlaps : whether the engine computes other requests while one is loaded; otherwise it waits for the load.
    clock : monotonic seconds.
    """

    def __init__(self, *, lanes: int = 4, overlaps: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._lanes = lanes
        self._overlaps = overlaps
        self._clock = clock
        self._tiers: dict[str, LearnedCost] = {}
        self._prefill = LearnedCost(3, 1, clock, memory=_PREFILL_MEMORY)
        self._turnaround = LearnedCost(1, 0, clock)
        self._trials = Trials(clock)  # of computing
        self._probed_s: dict[str, float] = {}  # when the last probe of a tier began

    # ------------------------------------------------------------------------------------------------- learning

    def observe_load(self, tier: str, nbytes: int, seconds: float, loads: int = 1) -> None:
        """A load, or its part from this tier, took so long from the first read to the last byte in the engine's blocks.

        Parameters
        ----------
        tier : its name, with that of the codec if chunks of several codecs lie in it: decoding is a part of the cost.
        nbytes : in whatever unit `StoredRun` counts them, as stored or as decoded; above 0.
        seconds : without waiting for other loads.
        loads : that all this is of.
        """
        if tier not in self._tiers:
            self._tiers[tier] = LearnedCost(2, 1, self._clock)
        self._tiers[tier].observe((float(loads), float(nbytes)), seconds)

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None:
        """A step of the engine computed so many prompt tokens, above 0; `position`: their mean one in their prompts."""
        self._prefill.observe((1.0, float(tokens), tokens * position), seconds)

    def observe_turnaround(self, seconds: float) -> None:
        """A request that loaded spent so long beside loading, until the engine could go on with it."""
        self._turnaround.observe((1.0,), seconds)

    # --------------------------------------------------------------------------------------------------- costs

    def load_s(self, tier: str, nbytes: int) -> float | None:
        """Seconds of a load, without queues; None if that is not known yet."""
        return self._tiers[tier].predict((1.0, float(nbytes))) if self._is_known([tier]) else None

    def prefill_s(self, tokens: int, position: int) -> float | None:
        """Seconds of computing `tokens` from `position` on, without queues; None if that is not known yet."""
        return self._prefill_s(tokens, position) if self._prefill.is_known else None

    @property
    def prefill_age_s(self) -> float:
        """Seconds since computing was observed; infinite before that."""
        return self._prefill.age_s

    def waits_s(self, queue: Queue) -> tuple[float, float]:
        """Seconds until a load would begin, and until the engine has computed what it has taken on."""
        wait_s = 0.0
        if queue.loads >= self._lanes:
            for tier, nbytes in queue.load_bytes.items():
                wait_s += self._tiers[tier].predict((1.0, float(nbytes))) if tier in self._tiers else 0.0
        _, token_s, context_s = self._prefill.coefficients
        return wait_s / self._lanes, queue.compute_tokens * (token_s + queue.compute_position * context_s)

    # ------------------------------------------------------------------------------------------------ decisions

    def decide(self, stored: StoredPrefix, queue: Queue = IDLE, *, may_shorten: bool = True) -> Decision:
        """How many of the leading chunks to load; all of them as long as too little is known.

        Changes nothing: `begin` says that a decision is carried out.

        Parameters
        ----------
        may_shorten : whether a part may be loaded; otherwise all or nothing.
        """
        total = stored.chunks
        if not total:
            return Decision(0, "nothing stored")
        wait_s, busy_s = self.waits_s(queue)
        if not self._prefill.is_known or not self._is_known(run.tier for run in stored.runs):
            return Decision(total, "untried", None, *self._untried_s(stored, wait_s, busy_s))
        counts = self._candidates(stored, wait_s, busy_s) if may_shorten else [total]
        times = {count: self._ready_s(stored, count, wait_s, busy_s) for count in (0, *counts)}
        most_s = min(times.values()) * (1.0 + SLACK_RATIO)
        chunks = max(count for count, seconds in times.items() if seconds <= most_s)
        if not chunks:
            load_s = min((seconds for count, seconds in times.items() if count), default=None)
            return Decision(0, self._why_not(stored, counts, busy_s, times[0]), load_s, times[0])
        reason: Reason = "loads" if chunks == total else "shortened"
        if chunks == total and may_shorten and self._is_trial_due(stored, times[chunks], wait_s, busy_s):
            chunks, reason = total - 1, "trial"
        load_s = self._ready_s(stored, chunks, wait_s, busy_s)
        return Decision(chunks, reason, load_s, times[0], self._limit_s(stored, chunks, wait_s, busy_s))

    def begin(self, decision: Decision) -> None:
        """A decision is carried out: if it tries computing, others do not for a while."""
        if decision.reason == "trial":
            self._trials.begin()

    def is_probe_due(self, tier: str, nbytes: int) -> bool:
        """Whether so much is to be read from a tier that no request loads from, to learn what it costs by now.

        At once and repeatedly, as long as its cost is not known. Later, after a hundred times the seconds that the
        probe is expected to take, at least 5 s and at most 10 minutes: a tier spends about 1 % of its time on probes.
        """
        seconds = self.load_s(tier, nbytes)
        if seconds is None:
            return True
        since_s = min(self._tiers[tier].age_s, self._clock() - self._probed_s.get(tier, float("-inf")))
        return since_s >= max(_PROBE_S, min(PATIENCE * seconds, _MOST_PROBE_S))

    def begin_probe(self, tier: str) -> None:
        """A tier is probed now, and not again for a while, whatever comes of it."""
        self._probed_s[tier] = self._clock()

    def pays_to_wait(self, stored: StoredPrefix, queue: Queue) -> bool:
        """Whether a load of all these chunks that has not begun is still better than computing; if in doubt it is.

        Parameters
        ----------
        queue : the loads ahead of this one; otherwise as for `decide`.
        """
        if not self._prefill.is_known or not self._is_known(run.tier for run in stored.runs):
            return True
        wait_s, busy_s = self.waits_s(queue)
        load_s = self._ready_s(stored, stored.chunks, wait_s, busy_s)
        compute_s = self._ready_s(stored, 0, wait_s, busy_s)
        return load_s <= _WAIT_RATIO * compute_s + self._turnaround.predict((1.0,))

    def pays_to_store(self, tiers: Sequence[str], nbytes: int, tokens: int, position: int) -> bool:
        """Whether a chunk may ever be loaded faster than it is computed; if in doubt it may.

        Latencies are left out, as the chunk may be one of many in a load.

        Parameters
        ----------
        tiers : that would hold it.
        nbytes : as of `StoredRun`.
        position : up to which the prompt reaches: to compute a token takes longer there, and leading chunks are needed
            for those that follow them.
        """
        if self._prefill.count < _STORE_OBSERVATIONS or not tiers:
            return True
        _, token_s, context_s = self._prefill.coefficients
        compute_s = tokens * (token_s + position * context_s)
        for tier in tiers:
            cost = self._tiers.get(tier)
            if cost is None or not cost.is_known or cost.age_s > _MOST_PROBE_S:
                return True
            if nbytes * cost.coefficients[1] <= _NEVER_PAYS * compute_s:
                return True
        return False

    # ------------------------------------------------------------------------------------------------ the model

    def _is_known(self, tiers: Iterable[str]) -> bool:
        return all(tier in self._tiers and self._tiers[tier].is_known for tier in tiers)

    def _prefill_s(self, tokens: int, position: int) -> float:
        return self._prefill.predict((1.0, float(tokens), tokens * (position + tokens / 2))) if tokens > 0 else 0.0

    def _loading_s(self, stored: StoredPrefix, chunks: int, *, fixed: bool = True) -> float:
        """Seconds of loading so many leading chunks; without what a load costs whatever its size if not `fixed`."""
        seconds = self._turnaround.predict((1.0,)) if fixed and chunks else 0.0
        for tier, nbytes in stored.bytes_of(chunks).items():
            latency_s, byte_s = self._tiers[tier].coefficients
            seconds += byte_s * nbytes + (latency_s if fixed else 0.0)
        return seconds

    def _ready_s(self, stored: StoredPrefix, chunks: int, wait_s: float, busy_s: float, *, fixed: bool = True) -> float:
        """Seconds to the first token if so many leading chunks are loaded."""
        begin_s = busy_s
        if chunks:
            loaded_s = wait_s + self._loading_s(stored, chunks, fixed=fixed)
            begin_s = max(loaded_s, busy_s) if self._overlaps else loaded_s + busy_s
        stop = stored.stop(chunks)
        return begin_s + self._prefill_s(stored.prompt_tokens - stop, stop)

    def _candidates(self, stored: StoredPrefix, wait_s: float, busy_s: float) -> list[int]:
        """Numbers of chunks of which one is best, if not 0.

        Within a run each chunk costs the same to load, and each saves more computing than the one before it: either all
        or none is best, or as many as are loaded while the engine is busy anyway.
        """
        counts, done = [], 0
        for run in stored.runs:
            low, high = done, done + run.chunks if self._overlaps and busy_s > 0.0 else done
            while low < high:
                middle = (low + high + 1) // 2
                is_free = wait_s + self._loading_s(stored, middle) <= busy_s
                low, high = (middle, high) if is_free else (low, middle - 1)
            done += run.chunks
            counts += [low, done]
        return counts

    def _why_not(self, stored: StoredPrefix, counts: Sequence[int], busy_s: float, compute_s: float) -> Reason:
        """Why to load nothing is fastest."""
        most_s = compute_s * (1.0 + SLACK_RATIO)
        some = [count for count in counts if count]
        if any(self._ready_s(stored, count, 0.0, busy_s) <= most_s for count in some):
            return "load queue"
        if any(self._ready_s(stored, count, 0.0, busy_s, fixed=False) <= most_s for count in some):
            return "too short to pay"
        return "slow tier"

    def _limit_s(self, stored: StoredPrefix, chunks: int, wait_s: float, busy_s: float) -> float:
        """Once a load is late by what computing its tokens takes, it is given up: at worst it costs twice that."""
        loaded_s = max(wait_s + self._loading_s(stored, chunks), busy_s)
        computing_s = self._prefill_s(stored.stop(chunks) - stored.computed, stored.computed)
        return loaded_s + max(computing_s, _GRACE_S)

    def _untried_s(self, stored: StoredPrefix, wait_s: float, busy_s: float) -> tuple[float | None, float | None]:
        """If computing is known: its seconds to the first token, and those after which loading is given up.

        That is when computing could have been over, so that at worst the request costs twice that.
        """
        if not self._prefill.is_known:
            return None, None
        computing_s = self._prefill_s(stored.stop(stored.chunks) - stored.computed, stored.computed)
        limit_s = max(wait_s, busy_s) + max(computing_s, _GRACE_S)
        return self._ready_s(stored, 0, wait_s, busy_s), limit_s

    def _is_trial_due(self, stored: StoredPrefix, loaded_s: float, wait_s: float, busy_s: float) -> bool:
        """Whether computing was not observed for so long that the last chunk is computed, which teaches it.

        That loses what computing one chunk takes at most, in a hundredth of the time.
        """
        loss_s = self._ready_s(stored, stored.chunks - 1, wait_s, busy_s) - loaded_s
        return self._trials.is_due(self._prefill.age_s, loss_s)
