"""What the scheduler's half tells its controller, and asks it: which part of a hit is loaded. Imports no engine."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from ..controller.controller import Controller
from ..controller.decisions import Decision, Missing, Queue, StoredPrefix, StoredRun
from ..groups import GroupShape
from ..keys import PrefixKeys
from ..messages import LOADERS, Load, Loaded
from ..settings import ServingSettings
from .probes import Probes

_LOG = logging.getLogger("kvloom")


@dataclass(slots=True)
class _Waiting:
    """A load that has not ended."""

    stored: StoredPrefix  # what is loaded of it
    tiers: Sequence[str]  # of each chunk of that
    decision: Decision
    begun_s: float
    was_alone: bool  # the engine had nothing to compute
    is_given_back: bool = False
    nbytes: Mapping[str, int] = field(init=False)  # by tier; asked for again and again while many wait

    def __post_init__(self) -> None:
        self.nbytes = self.stored.bytes_of(self.stored.chunks)


@dataclass(slots=True)
class LoadControl:
    """Decides for one engine what is loaded; see `Controller`.

    Bytes of loads are those of the loaded tokens in the engine's cache, on one rank.

    Parameters
    ----------
    settings : the user's. With `load_or_recompute` `always`, it decides nothing and learns all the same.
    token_bytes : of the first group's cache, on one rank.
    tiers : of the workers' stores; empty if they are not known.
    may_give_back : whether the engine computes what was to be loaded and is not.
    ranks : of the engine.
    shapes : of its groups; empty for a single one of full attention. A part of a hit is of use to that alone.
    clock : monotonic seconds.

    Attributes
    ----------
    counts : of decisions, by reason.
    """

    settings: ServingSettings
    token_bytes: int
    tiers: Sequence[str] = ()
    may_give_back: bool = True
    ranks: int = 1
    shapes: Sequence[GroupShape] = ()
    clock: Callable[[], float] = time.monotonic
    counts: Counter[str] = field(default_factory=Counter)
    _controller: Controller = field(init=False)
    _probes: Probes = field(init=False)
    _decided: dict[str, tuple[Decision, StoredPrefix, Sequence[str]]] = field(init=False, default_factory=dict)
    _waiting: dict[str, _Waiting] = field(init=False, default_factory=dict)  # in the order in which they were begun
    _together: dict[str, tuple[int, int, float]] = field(init=False, default_factory=dict)  # not learned yet, by tier
    _prompts: dict[str, tuple[int, int]] = field(init=False, default_factory=dict)  # taken on: tokens, and computed

    def __post_init__(self) -> None:
        is_layerwise = self.settings.load_mode == "layerwise"
        # One lane: what runs at once shares processors, disk or network, and tells seconds divided by how many do.
        self._controller = Controller(lanes=1, overlaps=not is_layerwise, clock=self.clock)
        self._probes = Probes(
            self._controller,
            chunk_tokens=self.settings.chunk_tokens,
            token_bytes=self.token_bytes,
            ranks=self.ranks,
            shapes=self.shapes,
        )
        self.may_give_back = self.may_give_back and not is_layerwise and self._decides

    @property
    def _decides(self) -> bool:
        return self.settings.load_or_recompute == "auto"

    @property
    def controller(self) -> Controller:
        """That it tells and asks."""
        return self._controller

    # --------------------------------------------------------------------------------------------------- loading

    def decide(self, request_id: str, tiers: Sequence[str], first: int, computed: int, tokens: int) -> int:
        """How many of the chunks found the request is to load; to be asked again whenever it may be taken on.

        Parameters
        ----------
        tiers : of the chunks found, from number `first` on.
        computed : tokens that the engine has already.
        tokens : of the request.
        """
        size = self.settings.chunk_tokens
        runs = [StoredRun(tier, len(list(same)), size * self.token_bytes, size) for tier, same in groupby(tiers)]
        stored = StoredPrefix(runs, first * size, computed, tokens)
        if self._decides or not tiers:
            decision = self._controller.decide(stored, self.queue(request_id), may_shorten=not self.shapes)
        else:
            decision = Decision(len(tiers), "always")
        self._decided[request_id] = (decision, stored, tiers)
        return decision.chunks

    def forget_decision(self, request_id: str) -> None:
        """What was decided does not hold any more: the engine asks again."""
        self._decided.pop(request_id, None)

    def take_on(self, request_id: str, tokens: int, computed: int | None, *, loads: bool) -> Decision | None:
        """The engine takes the request on, as it was decided last; that decision, None if nothing was to be decided.

        Parameters
        ----------
        computed : tokens of it that the engine will have when they are loaded or fused; None for those that it had when
            it asked.
        """
        was_alone = not any(total > done for total, done in self._prompts.values())
        decided = self._decided.pop(request_id, None)
        had = 0 if decided is None else decided[1].computed
        self._prompts[request_id] = (tokens, had if computed is None else computed)
        if decided is None:
            return None
        decision, stored, tiers = decided
        if not self.may_give_back:
            decision = replace(decision, limit_s=None)
        self._controller.begin(decision)
        self._count(request_id, decision)
        if loads:
            taken = replace(stored, runs=stored.leading(decision.chunks))
            now_s = self.clock()
            self._waiting[request_id] = _Waiting(taken, tiers[: decision.chunks], decision, now_s, was_alone)
        return decision

    def end(self, request_id: str, loaded: Loaded) -> Decision | None:
        """A load has ended on all ranks; how it was decided in the end, None if it was not decided here."""
        waiting = self._waiting.pop(request_id, None)
        if waiting is None:
            return None
        self._learn(request_id, waiting, loaded)
        if loaded.given_back and not waiting.is_given_back:  # while it was read, as it took too long
            waiting.decision = self._give_back(request_id, waiting.decision)
        return waiting.decision

    def _learn(self, request_id: str, waiting: _Waiting, loaded: Loaded) -> None:
        lost = sum(loaded.tokens.values()) // self.settings.chunk_tokens
        for tier, seconds in loaded.read_s.items():
            nbytes = loaded.tokens.get(tier, 0) * self.token_bytes
            if not tier and lost < len(waiting.tiers):  # of a chunk that did not come: it takes at least that long
                tier, late_bytes = waiting.tiers[lost], self.settings.chunk_tokens * self.token_bytes
                expected_s = self._controller.load_s(tier, late_bytes)
                nbytes = late_bytes if expected_s is not None and seconds > expected_s else 0
            if nbytes:
                loads, total, spent_s = self._together.get(tier, (0, 0, 0.0))
                self._together[tier] = (loads + 1, total + nbytes, spent_s + seconds)
        # Of loads that run at once, one may have waited for the others: what they took is learned of all together. The
        # first ones are not awaited: as long as nothing is known, everything is loaded.
        for tier, (loads, total, spent_s) in list(self._together.items()):
            if loads >= LOADERS or not self._waiting or self._controller.load_s(tier, total) is None:
                self._controller.observe_load(tier, total, spent_s, loads)
                del self._together[tier]
        is_alone = waiting.was_alone and not self.queue(request_id).compute_tokens
        if is_alone and not loaded.failed and not loaded.given_back:
            beside_s = self.clock() - waiting.begun_s - loaded.spent_s
            self._controller.observe_turnaround(max(beside_s, 0.0))

    @property
    def has_queue(self) -> bool:
        """Whether `given_back` has something to look at."""
        return self.may_give_back and len(self._waiting) > LOADERS

    def given_back(self) -> list[str]:
        """Requests whose loads have not begun and are not to begin: by now, computing is faster."""
        if not self.has_queue:
            return []
        found = []
        ahead: Counter[str] = Counter()
        all_left = self.queue("")
        for index, (request_id, waiting) in enumerate(self._waiting.items()):
            if waiting.is_given_back:
                continue
            if index >= LOADERS:
                tokens, position = self._without(all_left, request_id)
                queue = Queue(index, ahead, tokens, position)
                if not self._controller.pays_to_wait(waiting.stored, queue):
                    waiting.is_given_back = True
                    waiting.decision = self._give_back(request_id, waiting.decision)
                    self._prompts[request_id] = (waiting.stored.prompt_tokens, waiting.stored.computed)
                    found.append(request_id)
                    all_left = self.queue("")
                    continue
            # Of a load that has begun, half is still to come.
            ahead.update({tier: nbytes // (1 if index >= LOADERS else 2) for tier, nbytes in waiting.nbytes.items()})
        return found

    def _give_back(self, request_id: str, decision: Decision) -> Decision:
        decision = replace(decision, chunks=0, reason="computes while waiting")
        self._count(request_id, decision)
        return decision

    # ---------------------------------------------------------------------------------------------------- probes

    def consider_probes(self, tiers: Sequence[str], decision: Decision, keys: PrefixKeys, first: int) -> None:
        """A request was taken on that has found chunks in these tiers, from number `first` on; see `Probes`."""
        if self._decides:
            self._probes.consider(tiers, decision.chunks, keys, first)

    @property
    def has_probe(self) -> bool:
        """Whether `take_probe` has something to look at."""
        return self._probes.has_next and not self._waiting

    def take_probe(self) -> Load | None:
        """A chunk to be read beside requests; none while a load waits."""
        return self._probes.take() if self.has_probe else None

    def end_probe(self, loaded: Loaded) -> None:
        """Its outcome on some ranks."""
        self._probes.end(loaded)

    def reset(self) -> None:
        """Nothing that was found before is found any more."""
        self._probes.forget()

    # -------------------------------------------------------------------------------------------------- computing

    def computed(self, request_id: str, tokens: int) -> None:
        """The engine has so many tokens of a request that it has taken on."""
        if request_id in self._prompts:
            self._prompts[request_id] = (self._prompts[request_id][0], tokens)

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None:
        """As `Controller.observe_prefill`."""
        self._controller.observe_prefill(tokens, position, seconds)

    def pays_to_store(self, request_id: str, computed: int) -> bool:
        """Whether a request's chunks may ever be loaded faster than they are computed; if in doubt they may.

        Parameters
        ----------
        computed : its tokens that the engine has.
        """
        if not self._decides:
            return True
        size, (tokens, _) = self.settings.chunk_tokens, self._prompts.get(request_id, (0, 0))
        return self._controller.pays_to_store(self.tiers, size * self.token_bytes, size, max(tokens, computed))

    def forget(self, request_id: str) -> None:
        """The request is over. A load of it is still awaited."""
        self._prompts.pop(request_id, None)
        self._decided.pop(request_id, None)

    # --------------------------------------------------------------------------------------------------- counting

    def queue(self, without: str) -> Queue:
        """What waits, but for what the request itself computes."""
        load_bytes: Counter[str] = Counter()
        for waiting in self._waiting.values():
            load_bytes.update(waiting.nbytes)
        left = [(total - done, (total + done) / 2) for name, (total, done) in self._prompts.items() if name != without]
        tokens = sum(count for count, _ in left if count > 0)
        position = sum(count * middle for count, middle in left if count > 0) / max(tokens, 1)
        return Queue(len(self._waiting), dict(load_bytes), tokens, position)

    def _without(self, queue: Queue, request_id: str) -> tuple[int, float]:
        """Tokens to compute, and their mean position, without those of a request."""
        total, done = self._prompts.get(request_id, (0, 0))
        own, tokens = max(total - done, 0), queue.compute_tokens
        if own >= tokens:
            return 0, 0.0
        return tokens - own, (tokens * queue.compute_position - own * (total + done) / 2) / (tokens - own)

    def _count(self, request_id: str, decision: Decision) -> None:
        self.counts[f"decisions.{decision.reason}"] += 1
        _LOG.debug("request %s: %s", request_id, decision)


def explained(decision: Decision, missing: Missing | None) -> Decision:
    """A decision about nothing, with the reason why nothing was found; any other as it is."""
    if decision.reason != "nothing stored" or missing is None:
        return decision
    return replace(decision, reason=missing)
