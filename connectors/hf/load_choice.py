"""Load or compute: what one process has seen loading and computing cost."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from ..serving.controller.controller import Controller
from ..serving.controller.decisions import Reason, StoredPrefix, StoredRun

LoadOrRecompute: TypeAlias = Literal["auto", "always"]

_FEWEST_TOKENS = 32  # of a piece whose time says something about prompts


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether a chunk is loaded, and why; see `Reason`."""

    loads: bool
    reason: Reason


class LoadChoice:
    """Decides chunk by chunk, with nothing waiting before it. May be used from several threads.

    Without a choice to make (`always`), whatever is stored is loaded. In doubt, too: a tier is known after three
    chunks, computing after three pieces. A tier that is left alone is tried again with a chunk now and then, as
    `Controller.is_probe_due` says.

    Parameters
    ----------
    choice : of the user.
    clock : monotonic seconds.

    Raises
    ------
    ValueError : there is no such choice.
    """

    def __init__(self, choice: LoadOrRecompute = "always", *, clock: Callable[[], float] = time.monotonic) -> None:
        if choice not in get_args(LoadOrRecompute):
            raise ValueError(f"load_or_recompute is {choice!r}; expected one of {', '.join(get_args(LoadOrRecompute))}")
        self.decides = choice == "auto"
        self._controller = Controller(lanes=1, overlaps=False, clock=clock)
        self._lock = threading.Lock()

    def decide(self, tier: str, nbytes: int, tokens: int, position: int) -> Choice:
        """About a chunk that lies in a tier.

        Parameters
        ----------
        nbytes : of its keys and values as the model has them.
        position : of its first token, behind tokens whose KV is there.
        """
        if not self.decides:
            return Choice(True, "always")
        run = StoredRun(tier, 1, nbytes, tokens)
        stored = StoredPrefix([run], position, position, position + tokens)
        with self._lock:
            decision = self._controller.decide(stored, may_shorten=False)
            if not decision.chunks and self._controller.is_probe_due(tier, nbytes):
                self._controller.begin_probe(tier)
                return Choice(True, "trial")
        return Choice(decision.chunks > 0, decision.reason)

    def observe_load(self, tier: str, nbytes: int, seconds: float) -> None:
        """A chunk came from a tier."""
        if nbytes:
            with self._lock:
                self._controller.observe_load(tier, nbytes, seconds)

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None:
        """Tokens were computed; `position`: their mean one."""
        if tokens >= _FEWEST_TOKENS:
            with self._lock:
                self._controller.observe_prefill(tokens, position, seconds)
