"""How long a piece of work takes on the device that does it. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stretch:
    """From when its work begins on a device until that has done it.

    On CUDA two events take the time, as work is only queued there: nothing waits until `seconds` is asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        if device.type == "cuda":  # not run with CUDA yet
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._begun_s = self._spent_s = 0.0

    @classmethod
    @contextmanager
    def on(cls, device: torch.device) -> Iterator[Stretch]:
        """Of what is done within."""
        stretch = cls(device)
        stretch._begun_s = time.monotonic()
        for event in stretch._events[:1]:
            event.record()
        yield stretch
        for event in stretch._events[1:]:
            event.record()
        stretch._spent_s = time.monotonic() - stretch._begun_s

    def seconds(self) -> float:
        """What it took; waits for the device."""
        if not self._events:
            return self._spent_s
        begun, ended = self._events
        ended.synchronize()
        return float(begun.elapsed_time(ended)) / 1e3
