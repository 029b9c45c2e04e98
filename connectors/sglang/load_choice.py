"""How many of the stored pages a request loads, by what pages and computing have cost. Imports no engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from ..serving.controller.controller import Controller
from ..serving.controller.decisions import Decision, StoredPrefix, StoredRun


class LoadChoice:
    """vLLM's controller for one rank, with an empty queue: SGLang does not tell its storage what waits.

    Pages are loaded as long as either cost is not known. Every method may be called from any thread.

    Parameters
    ----------
    page_tokens, page_bytes : of every page; bytes as the engine has them.
    clock : monotonic seconds.
    """

    def __init__(self, page_tokens: int, page_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._page_tokens, self._page_bytes = page_tokens, page_bytes
        self._controller = Controller(lanes=1, clock=clock)
        self._lock = threading.Lock()

    def decide(self, tiers: Sequence[str], before: int, asked: int) -> Decision:
        """How many of the pages found to load.

        Parameters
        ----------
        tiers : of the leading pages that are stored.
        before : pages in front of them, which the engine has.
        asked : pages that the engine computes otherwise, those found included.
        """
        size = self._page_tokens
        runs = [StoredRun(tier, len(list(same)), self._page_bytes, size) for tier, same in groupby(tiers)]
        stored = StoredPrefix(runs, before * size, before * size, (before + asked) * size)
        with self._lock:
            decision = self._controller.decide(stored)
            self._controller.begin(decision)
        return decision

    def is_probe_due(self, tier: str) -> bool:
        """Whether a page of a tier that is left alone is to be read now; the one who asks does it."""
        with self._lock:
            is_due = self._controller.is_probe_due(tier, self._page_bytes)
            if is_due:
                self._controller.begin_probe(tier)
        return is_due

    def observe_pages(self, pages: Mapping[str, int], read_s: Mapping[str, float]) -> None:
        """Pages of a load, and its seconds, by tier."""
        with self._lock:
            for tier, count in pages.items():
                if count:
                    self._controller.observe_load(tier, count * self._page_bytes, read_s[tier])

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None:
        """A batch of the engine computed so many tokens of prompts; `position`: their mean one."""
        with self._lock:
            self._controller.observe_prefill(tokens, position, seconds)
