"""Which requests are being fused, and which tokens earlier fusions recomputed. Imports no engine.

This is the scheduler's side; `worker.fuser` computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..messages import Advance, Fusion, Loaded
from .requests import Request

Fused: TypeAlias = Literal["no", "yes", "partly"]
"""Whether the KV of a fused span is the result of one fusion; "partly": its rest was computed exactly behind it."""

REMEMBERED_PLANS = 256
"""Fusions whose choice is remembered: four bytes for each recomputed token."""


@dataclass(slots=True)
class _State:
    """The fusions of one request."""

    request: Request
    first: int  # token that is not exact
    local_tokens: int | None = None  # that the engine has itself, from when it asks until it admits the request
    begun_at: int = 0  # token, of the last fusion
    lead_tokens: int = 0  # before its first document, which no slice was planned for yet
    fused: Fused | None = None


class FusionTracker:
    """Fusions of the requests that are not exact. Methods do nothing for other requests.

    Parameters
    ----------
    ranks : of the engine; all of them fetch before any of them computes.
    block_tokens : of the engine.
    slice_tokens : of a slice at most; workers' may be shorter.
    """

    def __init__(self, ranks: int, block_tokens: int, slice_tokens: int) -> None:
        self._ranks = ranks
        self._block_tokens = block_tokens
        self._slice_tokens = slice_tokens
        self._states: dict[str, _State] = {}
        self._found: dict[str, tuple[tuple[bool, ...], ...]] = {}  # by each rank, of fusions in order of arrival
        self._choices: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()  # recomputed positions, by plan

    @property
    def is_fusing(self) -> bool:
        """Whether a fusion has begun that was not reported to be over."""
        return bool(self._found)

    def open(self, request_id: str, request: Request) -> None:
        """Track a request."""
        if request.inexact is not None:
            self._states[request_id] = _State(request, request.inexact)

    def close(self, request_id: str) -> Fused:
        """Forget a request; how it was fused."""
        self._found.pop(request_id, None)
        state = self._states.pop(request_id, None)
        return "no" if state is None else state.fused or "no"

    def reset(self) -> None:
        """Forget all requests and all choices."""
        self._states.clear()
        self._found.clear()
        self._choices.clear()

    def ask(self, request_id: str, computed_tokens: int) -> None:
        """The engine is about to admit the request, of which it has so many tokens itself."""
        if (state := self._states.get(request_id)) is not None:
            state.local_tokens = computed_tokens

    def reach(self, request_id: str, computed_tokens: int) -> int:
        """Token up to which a fusion can provide KV to a request that is not exact; 0 if it cannot."""
        state = self._states[request_id]
        if computed_tokens > state.first and state.request.plan not in self._choices:
            # The engine has fused tokens of a request like this one, or of this one before it was preempted. A
            # second choice among the rest alone would differ from the first one: the rest is computed.
            return 0
        # Whole blocks only: the engine finds them again as they are, and computes what follows in any case. One
        # token must be left to it: the first new token is sampled from what it computes.
        stop = min(state.request.documents[-1].stop, len(state.request.token_ids) - 1)
        return stop - stop % self._block_tokens

    def begin(self, request_id: str, start: int, stop: int, blocks: Sequence[int]) -> Fusion:
        """The engine took the offer up to `stop`: tokens `[start, stop)` are to be provided."""
        state = self._states[request_id]
        request, state.local_tokens, state.begun_at = state.request, None, start
        state.lead_tokens = request.documents[0].start - start
        self._found[request_id] = ()
        return Fusion(
            request_id,
            np.asarray(request.token_ids[:stop], dtype=np.int64),
            start,
            stop,
            state.first,
            request.documents,
            request.ratio,
            tuple(blocks),
            self._choices.get(request.plan) if start > state.first else None,
            request.question,
        )

    def decline(self, request_id: str) -> None:
        """The engine goes on without an offer: it computes what it does not have."""
        state = self._states.get(request_id)
        if state is None or state.local_tokens is None:  # merely back from a fusion
            return
        local, state.local_tokens = state.local_tokens, None
        stop = state.request.documents[-1].stop
        now: Fused = "yes" if local >= stop - stop % self._block_tokens else "partly"
        state.fused = _combined(state.fused, "no" if local <= state.first else now)

    def add_found(self, request_id: str, masks: tuple[tuple[bool, ...], ...]) -> None:
        """More ranks have fetched the documents; `masks` say which of them each rank has."""
        if request_id in self._found:
            self._found[request_id] += masks

    def advance(self) -> Advance | None:
        """The next slice. One fusion at a time, the first whose documents all ranks have fetched.

        Where there is none, the first one with tokens before its documents: these are computed meanwhile.
        """
        for request_id, masks in self._found.items():
            if len(masks) == self._ranks:
                return Advance(request_id, tuple(all(ranks) for ranks in zip(*masks, strict=True)))
        for request_id in self._found:
            state = self._states.get(request_id)
            if state is not None and state.lead_tokens > 0:
                state.lead_tokens -= self._slice_tokens
                return Advance(request_id, None)
        return None

    def end(self, request_id: str, loaded: Loaded) -> None:
        """A fusion is over, with this outcome."""
        self._found.pop(request_id, None)
        state = self._states.get(request_id)
        if state is None:
            return
        if loaded.chosen is not None:
            self._choices[state.request.plan] = loaded.chosen
            self._choices.move_to_end(state.request.plan)
            while len(self._choices) > REMEMBERED_PLANS:
                self._choices.popitem(last=False)
        lost: Fused = "no" if state.begun_at <= state.first else "partly"
        state.fused = _combined(state.fused, lost if loaded.failed else "yes")


def _combined(before: Fused | None, now: Fused) -> Fused:
    """How a request is fused that was admitted again: its tokens so far came of `before`."""
    return now if before is None or before == now else "partly"
