"""A tier on a device that stalls, fails, dies and comes back, as a test tells it to."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator

from kvloom.core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk
from kvloom.errors import TierError, TierFullError, TierUnavailableError
from kvloom.kvstore.tiers.host import HostTier

from .patience import LONG_S, eventually


def workers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("kvloom-")}


def leaves_no_threads() -> Iterator[None]:
    """The body of a fixture."""
    before = workers()
    yield
    assert eventually(lambda: workers() <= before), workers() - before


def device_error(code: int) -> TierError:
    """What a tier makes of an error of the operating system."""
    if code == errno.ENOSPC:
        return TierFullError(os.strerror(code), needed_bytes=1)
    error = TierUnavailableError(os.strerror(code))
    error.__cause__ = OSError(code, os.strerror(code))
    return error


class FaultyTier(HostTier):
    """Every call first waits for `gate`, then `delay_s`, then raises what `faults` makes for its verb.

    `calls` lists the verbs: get, put, delete, check, close.
    """

    may_stall = True

    def __init__(self, capacity_bytes: int | None = None, *, name: str = "disk") -> None:
        super().__init__(capacity_bytes, name=name)
        self.gate = threading.Event()
        self.gate.set()
        self.delay_s = 0.0
        self.faults: dict[str, Callable[[], BaseException]] = {}
        self.calls: list[str] = []
        self.closed = False

    def fail(self, code: int, *verbs: str) -> None:
        self.faults = dict.fromkeys(verbs or ("get", "put", "delete", "check"), lambda: device_error(code))

    def heal(self) -> None:
        self.faults = {}
        self.delay_s = 0.0
        self.gate.set()

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        self._reach("get")
        return super().get(key)

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        self._reach("get")
        blob = super().get(key)
        return None if blob is None else blob.layers(start, stop)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int:
        self._reach("put")
        return super().put(key, blob, info)

    def delete(self, key: ChunkKey) -> bool:
        self._reach("delete")
        return super().delete(key)

    def check(self) -> list[str]:
        self._reach("check")
        return super().check()

    def close(self) -> None:
        self._reach("close")
        self.closed = True
        super().close()

    def _reach(self, verb: str) -> None:
        self.calls.append(verb)
        self.gate.wait(LONG_S)
        time.sleep(self.delay_s)
        fault = self.faults.get(verb)
        if fault is not None:
            raise fault()
