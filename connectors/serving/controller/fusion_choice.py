"""Fuse or compute: whether stored documents are loaded and fused, and how many leading ones are computed meanwhile.

A fusion loads a request's documents, recomputes a share of their tokens in passes, and leaves what follows them to the
engine. Its passes begin when all documents are loaded: nothing of them hides behind the load. What precedes the first
loaded document needs no load at all, and is computed while the others are loaded:

    max(load queue + load of documents, compute queue + what precedes them) + passes + prefill of what follows them

So leading documents may be computed in full while the others are loaded, as Cake (arXiv 2410.03065) does for prefixes:
the share of tokens that is computed rises, for free as long as loading takes longer. The other documents keep the
number of recomputed tokens that was asked for all of them, so that none of them gets fewer.

Pure policy, as `Controller`. Imports neither torch nor an engine. Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .controller import Controller
from .costs import LearnedCost
from .decisions import IDLE, Decision, Queue, Reason
from .trials import SLACK_RATIO, Trials


@dataclass(frozen=True, slots=True)
class FusionWay:
    """One way to fuse a request's documents.

    Attributes
    ----------
    first : number of the first document that is loaded; those before it are computed in full.
    ratio : share of the loaded documents' tokens that is recomputed.
    documents, nbytes : that are loaded, by tier.
    lead : tokens `[start, stop)` that are computed while documents are loaded.
    pass_tokens : that go through the passes, as if each went through all layers.
    pass_position : mean of their positions.
    stop : token from which on the engine goes on.
    """

    first: int
    ratio: float
    documents: Mapping[str, int]
    nbytes: Mapping[str, int]
    lead: tuple[int, int]
    pass_tokens: float
    pass_position: float
    stop: int


class FusionChoice:
    """Learns what loads of documents and passes of fusions cost, and decides for each request of documents.

    Loads of documents are learned apart from those of prefixes: their keys are rotated to where they stand.

    Parameters
    ----------
    controller : knows what the engine's prompts and queues take.
    clock : monotonic seconds.
    """

    def __init__(self, controller: Controller, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._controller = controller
        self._clock = clock
        self._tiers: dict[str, LearnedCost] = {}
        self._passes = LearnedCost(3, 1, clock)
        self._beside = LearnedCost(1, 0, clock)
        self._trials = Trials(clock)

    # ------------------------------------------------------------------------------------------------- learning

    def observe_load(self, tier: str, documents: int, nbytes: int, seconds: float) -> None:
        """So many documents were loaded from a tier, as of `Controller.observe_load`."""
        if tier not in self._tiers:
            self._tiers[tier] = LearnedCost(2, 1, self._clock)
        self._tiers[tier].observe((float(documents), float(nbytes)), seconds)

    def observe_passes(self, tokens: float, position: float, seconds: float) -> None:
        """The passes of a fusion took so long; `tokens`, above 0, and `position` as of `FusionWay`."""
        self._passes.observe((1.0, tokens, tokens * position), seconds)

    def observe_beside(self, seconds: float) -> None:
        """A fusion in an idle engine took so long beside its load and its passes, until the engine went on with it."""
        self._beside.observe((1.0,), seconds)

    # ------------------------------------------------------------------------------------------------ decisions

    @property
    def is_known(self) -> bool:
        """Whether enough is known of computing and of passes to decide anything."""
        return self._passes.is_known and self._controller.prefill_s(1, 0) is not None

    def load_s(self, documents: Mapping[str, int], nbytes: Mapping[str, int]) -> float:
        """Seconds of loading documents; of tiers that nothing is known of, none."""
        return sum(
            self._tiers[tier].predict((float(documents[tier]), float(nbytes[tier])))
            for tier in documents
            if tier in self._tiers
        )

    def decide(
        self, ways: Sequence[FusionWay], prompt_tokens: int, computed: int, queue: Queue = IDLE, ahead_s: float = 0.0
    ) -> tuple[Decision, FusionWay | None]:
        """How to fuse, None to compute everything; the first way as long as too little is known.

        Of nearly equal times, computing everything is best, and then the way that computes most. Where the engine has
        others to compute, nothing but the first way is compared with that, as computing is what requests share.

        Changes nothing: `begin` says that a decision is carried out.

        Parameters
        ----------
        ways : the one that loads most first.
        computed : tokens that the engine has.
        ahead_s : seconds of documents of other requests that are loaded before.
        """
        if not ways:
            return Decision(0, "nothing stored"), None
        first = ways[0]
        tiers = [self._tiers.get(tier) for tier in first.documents]
        if not self.is_known or not all(tier is not None and tier.is_known for tier in tiers):
            return Decision(_loaded(first), "untried"), first
        wait_s, busy_s = self._controller.waits_s(queue)
        compute_s = busy_s + self._prefill_s(computed, prompt_tokens)
        usable = ways[:1] if queue.compute_tokens else ways
        times = [self._ready_s(way, prompt_tokens, wait_s + ahead_s, busy_s) for way in usable]
        least_s = min(times)
        last = max(i for i, seconds in enumerate(times) if seconds <= least_s * (1.0 + SLACK_RATIO))
        way, fused_s = usable[last], times[last]
        if compute_s > least_s * (1.0 + SLACK_RATIO):
            if self._trials.is_due(self._controller.prefill_age_s, compute_s - fused_s):
                return Decision(0, "trial", fused_s, compute_s), None
            reason: Reason = "fuses" if way is first else "ratio raised"
            return Decision(_loaded(way), reason, fused_s, compute_s), way
        oldest_s = max([self._passes.age_s, *(tier.age_s for tier in tiers if tier is not None)])
        if self._trials.is_due(oldest_s, fused_s - compute_s):
            return Decision(_loaded(way), "trial", fused_s, compute_s), way
        return Decision(0, "fusion does not pay", fused_s, compute_s), None

    def begin(self, decision: Decision) -> None:
        """A decision is carried out: if it tries what is thought slower, others do not for a while."""
        if decision.reason == "trial":
            self._trials.begin()

    # ------------------------------------------------------------------------------------------------ the model

    def _prefill_s(self, start: int, stop: int) -> float:
        return self._controller.prefill_s(stop - start, start) or 0.0

    def _ready_s(self, way: FusionWay, prompt_tokens: int, wait_s: float, busy_s: float) -> float:
        """Seconds to the first token."""
        loaded_s = wait_s + self.load_s(way.documents, way.nbytes)
        passes_s = self._passes.predict((1.0, way.pass_tokens, way.pass_tokens * way.pass_position))
        begin_s = max(loaded_s, busy_s + self._prefill_s(*way.lead))
        return begin_s + passes_s + self._beside.predict((1.0,)) + self._prefill_s(way.stop, prompt_tokens)


def _loaded(way: FusionWay) -> int:
    return sum(way.documents.values())
