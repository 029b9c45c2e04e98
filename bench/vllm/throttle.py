"""A tier made slow: a device of one speed behind a worker's reads, for measurements."""

from __future__ import annotations

import threading
import time
from typing import Any

from ...connectors.serving.messages import Load
from ...connectors.serving.worker.transfers import Transfers
from ...kvstore.store import Hit


class Throttle:
    """Delays every chunk that a worker reads, as if it came from a slow device; the thread that loads it waits.

    Parameters
    ----------
    transfers : of the worker; its reads go through this from now on.

    Attributes
    ----------
    latency_s : of a load, whatever its size.
    byte_s : seconds a byte of decoded KV; the device serves one chunk at a time.
    """

    def __init__(self, transfers: Transfers) -> None:
        self.latency_s = self.byte_s = 0.0
        self._device = threading.Lock()
        self._begins = threading.local()
        read, fetch = transfers.reader.read, transfers._fetch  # noqa: SLF001 - a bench stands between the two
        measure = transfers.prober.measure

        def slow_fetch(load: Load, begun_s: float) -> Any:
            self._begins.here = True
            return fetch(load, begun_s)

        def slow_measure(probe: Load) -> Any:
            self._begins.here = True
            return measure(probe)

        def slow_read(*args: Any, **kwargs: Any) -> Hit | None:
            hit = read(*args, **kwargs)
            if getattr(self._begins, "here", False):
                self._begins.here = False
                time.sleep(self.latency_s)
            if hit is not None and self.byte_s:
                with self._device:
                    time.sleep((hit.chunk.keys.nbytes + hit.chunk.values.nbytes) * self.byte_s)
            return hit

        transfers.reader.read = slow_read  # type: ignore[method-assign]
        transfers.prober.measure = slow_measure  # type: ignore[method-assign]
        transfers._fetch = slow_fetch  # type: ignore[method-assign]  # noqa: SLF001
