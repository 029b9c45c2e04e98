"""Pins that clients hold: they outlive a request, and end by themselves."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from ..core import ChunkKey
from .problems import ProblemError, not_found
from .served_store import ServedStore


@dataclass(eq=False)
class Pin:
    """Chunks of a tenant that no tier evicts before `expires_at_s` (Unix time)."""

    id: str
    pool: str
    keys: tuple[ChunkKey, ...]
    expires_at_s: float
    hold: ExitStack
    generation: int


class Pins:
    """Every method may be called from any thread.

    Parameters
    ----------
    most_keys : that one tenant may pin at a time.
    """

    def __init__(self, store: ServedStore, most_keys: int, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._most_keys = most_keys
        self._clock = clock
        self._lock = threading.Lock()
        self._pins: dict[str, Pin] = {}

    def add(self, pool: str, keys: Sequence[ChunkKey], deadline_s: float) -> Pin:
        """Pins chunks, stored or not, for `deadline_s` from now.

        Raises
        ------
        ProblemError : the tenant would pin more than it may.
        """
        now_s = self._clock()
        with self._lock:
            self._lapse(now_s)
            pinned = sum(len(pin.keys) for pin in self._pins.values() if pin.pool == pool)
            if pinned + len(keys) > self._most_keys:
                raise ProblemError(
                    429, "too-many-pins", f"{pinned} keys are pinned, at most {self._most_keys} may be; release some"
                )
            pin = Pin(secrets.token_hex(16), pool, tuple(keys), now_s + deadline_s, ExitStack(), -1)
            self._hold(pin, now_s)
            self._pins[pin.id] = pin
        return pin

    def get(self, pool: str, pin_id: str) -> Pin:
        """Raises `ProblemError` if there is none, or not of this tenant."""
        with self._lock:
            self._lapse(self._clock())
            pin = self._pins.get(pin_id)
        if pin is None or pin.pool != pool:
            raise not_found("the pin")
        return pin

    def release(self, pool: str, pin_id: str) -> None:
        """Raises as `get`."""
        pin = self.get(pool, pin_id)
        with self._lock:
            self._pins.pop(pin_id, None)
        pin.hold.close()

    def follow(self) -> None:
        """Ends what is over, and pins again what a store held that has been replaced."""
        now_s = self._clock()
        with self._lock:
            self._lapse(now_s)
            for pin in self._pins.values():
                if pin.generation != self._store.generation:
                    pin.hold = ExitStack()  # the store that it pinned in is gone
                    self._hold(pin, now_s)

    def close(self) -> None:
        with self._lock:
            for pin in self._pins.values():
                pin.hold.close()
            self._pins.clear()

    def _hold(self, pin: Pin, now_s: float) -> None:
        with self._store.use() as store:
            pin.generation = self._store.generation
            pin.hold.enter_context(store.pinned(pin.keys, deadline_s=max(pin.expires_at_s - now_s, 0.001)))

    def _lapse(self, now_s: float) -> None:
        for pin in [pin for pin in self._pins.values() if pin.expires_at_s <= now_s]:
            pin.hold.close()
            del self._pins[pin.id]
