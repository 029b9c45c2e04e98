"""Chunks that are read beside requests, to learn what their tier costs. Imports no engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import repeat
from typing import TypeAlias

from ....core import ChunkKey
from ....kvstore.store import Hit
from ..messages import Load, Loaded, OtherKeys
from .pieces import all_keys
from .reading_times import ReadingTimes
from .threads import compute_alone

_LOG = logging.getLogger("kvloom")

Read: TypeAlias = "Callable[[Load, ChunkKey, OtherKeys, float], Hit | None]"
"""Reads a chunk of a load that began then, as it would be read for a request; None if it is lost or late."""


class Prober:
    """Reads, verifies and decodes a chunk as a load does, and writes it nowhere. One at a time, in a thread of its own.

    Parameters
    ----------
    read : of the worker's loads.
    times : of these, too: a probe and a load that run at once share the tier.
    rank : of the worker.
    count : adds to the worker's counts.
    """

    def __init__(
        self, read: Read, times: ReadingTimes, rank: int, count: Callable[[Mapping[str, float]], None]
    ) -> None:
        self._read, self._times, self._rank, self._count = read, times, rank, count
        self._thread = ThreadPoolExecutor(1, "kvloom-probe", compute_alone)
        self._under_way: Future[Loaded] | None = None

    @property
    def is_probing(self) -> bool:
        """Whether a probe has begun that `take` has not given yet."""
        return self._under_way is not None

    def begin(self, probe: Load) -> None:
        """Begin to read; nothing while another probe is under way."""
        if self._under_way is None:
            self._under_way = self._thread.submit(self.measure, probe)

    def take(self) -> Loaded | None:
        """The outcome, once, when it is there."""
        if self._under_way is None or not self._under_way.done():
            return None
        future, self._under_way = self._under_way, None
        if (error := future.exception()) is not None:
            _LOG.error("a chunk was not read to learn what its tier costs", exc_info=error)
            self._count({"errors": 1})
            return Loaded({}, True, 0.0)
        return future.result()

    def measure(self, probe: Load) -> Loaded:
        """Read the chunk. `tokens`: its own, by the tier of its first piece; none if it is lost."""
        begun_s, first = time.monotonic(), None
        others = probe.others_of(self._rank) or repeat(())
        with self._times.watch() as watch:
            for key, other in zip(all_keys(probe, self._rank), others, strict=False):
                hit = self._read(probe, key, other, begun_s)
                watch.lap("" if hit is None else hit.tier)
                if hit is None:
                    first = None
                    break
                first = first or hit.tier
        self._count({"probes": 1})
        tokens = {} if first is None else {first: probe.stop - probe.start}
        return Loaded(tokens, first is None, time.monotonic() - begun_s, read_s=watch.seconds)

    def close(self) -> None:
        """Wait for a probe that is under way."""
        self._thread.shutdown(wait=True, cancel_futures=True)
