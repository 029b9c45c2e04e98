"""Chunks that a look-up offered to the engine, kept from eviction until they are loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TypeAlias

from ....core import ChunkKey
from ..messages import FoundTiers, OtherKeys
from .head_reader import HeadReader

_LOG = logging.getLogger("kvloom")

Find: TypeAlias = "Callable[[], tuple[FoundTiers, Sequence[ChunkKey]]]"
"""Says what can be offered: tiers of leading chunks, and the keys that a load of them reads."""

OFFER_S = 30.0
"""Seconds for which an offer stays pinned that is neither taken nor released. Engines take one within a few steps."""


class Offers:
    """Pins of a worker's store, by the number of the look-up. Every method may be called from any thread.

    Parameters
    ----------
    reader : of the worker's store.
    offer_s : longest time that an offer stays pinned before its load begins.
    """

    def __init__(self, reader: HeadReader, *, offer_s: float = OFFER_S) -> None:
        self._reader = reader
        self._offer_s = offer_s
        self._pins: dict[int, AbstractContextManager[None]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._pins)

    def make(
        self, number: int, keys: Sequence[ChunkKey], others: Sequence[OtherKeys] = (), find: Find | None = None
    ) -> FoundTiers:
        """Tiers of the leading chunks that can be read, which are pinned under `number`, if that is not 0.

        Parameters
        ----------
        others : keys of each chunk in other sizes, all of which are pinned, too.
        find : says which chunks can be read, of keys that are no row of leading chunks.
        """
        look = find or (lambda: self._leading(keys, others))
        if not number:
            return look()[0]
        self._pin(number, keys, others, self._offer_s)  # first, so that no chunk goes between the look-up and its pin
        tiers, offered = look()
        if not tiers:
            self.release(number)
        elif len(offered) < len(keys):
            self._pin(number, offered, others[: len(offered)], self._offer_s)
        return tiers

    def _leading(self, keys: Sequence[ChunkKey], others: Sequence[OtherKeys]) -> tuple[FoundTiers, Sequence[ChunkKey]]:
        tiers = self._reader.locate_prefix(keys, others)
        return tiers, keys[: len(tiers)]

    def take(self, number: int, keys: Sequence[ChunkKey], deadline_s: float, others: Sequence[OtherKeys] = ()) -> bool:
        """Keep these chunks of an offer for a load that lasts at most `deadline_s`; False if that fails, and is logged.

        Nothing for number 0.
        """
        try:
            if number:
                self._pin(number, keys, others, deadline_s)
        except Exception:  # noqa: BLE001 - called within the engine's step, which must not end with us
            _LOG.exception("chunks that are about to be loaded cannot be pinned")
            return False
        return True

    def _pin(self, number: int, keys: Sequence[ChunkKey], others: Sequence[OtherKeys], deadline_s: float) -> None:
        """Pin these chunks, instead of what was pinned under `number`."""
        pin = self._reader.pinned(keys, others, deadline_s=deadline_s)
        pin.__enter__()
        self._replace(number, pin)

    def release(self, number: int) -> None:
        """End the pins of this number, if there are any."""
        self._replace(number, None)

    def close(self) -> None:
        """End all pins."""
        for number in list(self._pins):
            self.release(number)

    def _replace(self, number: int, pin: AbstractContextManager[None] | None) -> None:
        with self._lock:
            before = self._pins.pop(number, None)
            if pin is not None:
                self._pins[number] = pin
        if before is not None:
            before.__exit__(None, None, None)
