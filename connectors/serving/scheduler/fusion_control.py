"""What the scheduler's half asks about fusions, and what it tells of them: which documents are loaded. No engine."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from ....blend.method import WITHOUT_DEVIATION, FusionMethod
from ..controller.controller import Controller
from ..controller.decisions import Decision, Queue
from ..controller.fusion_choice import FusionChoice, FusionWay
from ..messages import Document, FoundTiers, Loaded
from .requests import Request, RequestReader

REMEMBERED_WAYS = 256
"""Plans of which it is remembered how they were fused last, so that the engine finds the blocks of that again."""

_LOG = logging.getLogger("kvloom")


@dataclass(frozen=True, slots=True)
class _Fetching:
    """A fusion that has not ended."""

    way: FusionWay | None  # None if it was not decided
    begun_s: float
    was_alone: bool  # the engine had nothing to compute


class FusionControl:
    """Decides for one engine how requests of documents are fused; see `FusionChoice`.

    Every way to fuse a request is a request of its own, with documents, ratio and digest that say what its blocks hold:
    blocks of one way are never found by another one.

    Parameters
    ----------
    controller : of the engine's loads.
    method : how workers fuse.
    num_layers : of the engine.
    token_bytes : of its cache, on one rank.
    block_tokens : of the engine.
    clock : monotonic seconds.
    """

    def __init__(
        self,
        controller: Controller,
        method: FusionMethod,
        num_layers: int,
        token_bytes: int,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._choice = FusionChoice(controller, clock=clock)
        check = 0 if method.select in WITHOUT_DEVIATION else min(method.check_layer, num_layers - 1)
        self._probed_ratio = (check + 1) / num_layers  # of the layers, that every token of documents goes through
        self._token_bytes = token_bytes
        self._block_tokens = block_tokens
        self._clock = clock
        self._ways: OrderedDict[bytes, tuple[int, float] | None] = OrderedDict()  # by plan: first document, and ratio
        self._decided: dict[str, tuple[Decision, FusionWay | None]] = {}
        self._fetching: dict[str, _Fetching] = {}

    @property
    def is_known(self) -> bool:
        """As of `FusionChoice`."""
        return self._choice.is_known

    def remembered(self, request: Request, reader: RequestReader) -> Request:
        """The request as an equal one was fused last; as it is if that is not known."""
        if request.plan not in self._ways:
            return request
        way = self._ways[request.plan]
        return reader.exact(request) if way is None else reader.fused(request, *way)

    def decide(
        self, request_id: str, request: Request, reader: RequestReader, tiers: FoundTiers, computed: int, queue: Queue
    ) -> Request:
        """Decide whether and how the request is fused; the request that does that.

        Parameters
        ----------
        tiers : of each document, `""` for one that is not stored.
        computed : tokens that the engine has, of the exact ones.
        """
        tiers += ("",) * (len(request.documents) - len(tiers))
        ways = self._possible(request, tiers, computed)
        ahead = [each.way for each in self._fetching.values() if each.way is not None]
        ahead_s = sum(self._choice.load_s(way.documents, way.nbytes) for way in ahead)
        decision, way = self._choice.decide(ways, len(request.token_ids), computed, queue, ahead_s)
        self._decided[request_id] = decision, way
        self._ways[request.plan] = None if way is None else (way.first, way.ratio)
        self._ways.move_to_end(request.plan)
        while len(self._ways) > REMEMBERED_WAYS:
            self._ways.popitem(last=False)
        return reader.exact(request) if way is None else reader.fused(request, way.first, way.ratio)

    def _possible(self, request: Request, tiers: FoundTiers, computed: int) -> list[FusionWay]:
        """Ways to fuse, the one that loads most first: one for each stored document that may be the first of them."""
        documents = request.documents
        inexact = documents[0].start if request.inexact is None else request.inexact
        moved = [
            _tokens(document) if tier and document.start >= inexact else 0
            for document, tier in zip(documents, tiers, strict=True)
        ]
        asked = request.ratio * sum(moved)
        stop = min(documents[-1].stop, len(request.token_ids) - 1)
        stop -= stop % self._block_tokens
        ways = []
        for first, document in enumerate(documents):
            left = sum(moved[first:])
            if not tiers[first] or not left or asked >= left or stop <= max(inexact, document.start):
                continue
            # The one asked for as it is: its blocks have a name already.
            ratio = request.ratio if left == sum(moved) else asked / left
            ways.append(self._way(request, tiers, first, max(inexact, document.start), stop, ratio, computed))
        return ways

    def _way(
        self, request: Request, tiers: FoundTiers, first: int, inexact: int, stop: int, ratio: float, computed: int
    ) -> FusionWay:
        loaded = [(tier, each) for tier, each in zip(tiers[first:], request.documents[first:], strict=True) if tier]
        computed = min(computed, inexact - inexact % self._block_tokens)  # blocks from there on have other names
        counts: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for tier, document in loaded:
            counts[tier] += 1
            nbytes[tier] += _tokens(document) * self._token_bytes
        start = max(request.documents[first].start, computed)
        exact = sum(_tokens(document) for _, document in loaded if document.start < inexact)
        candidates = sum(_tokens(document) for _, document in loaded if document.start >= inexact)
        passed = stop - start - exact
        tokens = float(passed - candidates + math.ceil(ratio * candidates))
        if ratio > 0.0:  # otherwise nothing is chosen
            tokens += self._probed_ratio * passed + (0 if request.question is None else len(request.question))
        lead = (min(computed, start), start)
        return FusionWay(first, ratio, counts, nbytes, lead, max(tokens, 0.0), (start + stop) / 2, stop)

    def leave(self, request_id: str, request: Request) -> None:
        """Too little is known to decide anything: the request is fused as it was asked for."""
        self._decided[request_id] = Decision(len(request.documents), "untried"), None

    # -------------------------------------------------------------------------------------------------- outcomes

    def take_on(self, request_id: str, queue: Queue, *, fuses: bool) -> Decision | None:
        """The engine takes the request on, as it was decided last; that decision, None if nothing was decided."""
        decision, way = self._decided.pop(request_id, (None, None))
        if decision is not None:
            self._choice.begin(decision)
            _LOG.debug("request %s: documents, %s", request_id, decision)
        if fuses:
            self._fetching[request_id] = _Fetching(way, self._clock(), not queue.compute_tokens)
        return decision

    def end(self, request_id: str, loaded: Loaded, queue: Queue) -> None:
        """A fusion is over on all ranks, with this outcome; nothing for any other load."""
        fetching, work = self._fetching.pop(request_id, None), loaded.fused
        if fetching is None or work is None or loaded.failed:
            return
        for tier, documents in work.documents.items():
            nbytes = loaded.tokens.get(tier, 0) * self._token_bytes
            if nbytes and tier in loaded.read_s:
                self._choice.observe_load(tier, documents, nbytes, loaded.read_s[tier])
        if work.tokens > 0.0:
            self._choice.observe_passes(work.tokens, work.position, work.seconds)
        if fetching.was_alone and not queue.compute_tokens:
            beside_s = self._clock() - fetching.begun_s - work.waited_s - work.seconds
            self._choice.observe_beside(max(beside_s, 0.0))

    def forget(self, request_id: str) -> None:
        """The request is over. A fusion of it is still awaited."""
        self._decided.pop(request_id, None)


def _tokens(document: Document) -> int:
    return document.stop - document.start
