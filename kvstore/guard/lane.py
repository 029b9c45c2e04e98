"""The way to a tier that can stall: calls that can be given up, and a tier that is left alone while it is down."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar, cast

from ...core import ChunkKey, Tier
from ...errors import TierError, TierTimeoutError, TierUnavailableError
from .circuit_breaker import Breaker
from .deadline import Patience
from .worker_pool import Workers

T = TypeVar("T")

_QUEUED_CALLS = 256
_DOUBTFUL_CHUNKS = 1024


class _Call(Generic[T]):
    """One call of a tier. Until it has ended, the lane's lock guards all but `operation` and `ended`."""

    # state      begun_at_s  given_up  finished   who goes on with it
    # queued     None        False     False      the next worker that is free
    # withdrawn  None        True      False      nobody
    # running    set         False     False      its worker
    # late       set         True      False      its worker, which throws the result away
    # done       set         False     True       the caller, who takes the result

    __slots__ = ("begun_at_s", "ended", "error", "finished", "given_up", "operation", "probes", "result", "writes")

    def __init__(self, operation: Callable[[Tier], T], writes: ChunkKey | None) -> None:
        self.operation: Callable[[Tier], T] | None = operation
        self.writes = writes
        self.probes = False
        self.begun_at_s: float | None = None
        self.given_up = False
        self.finished = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.ended = threading.Lock()  # released at the end
        self.ended.acquire()

    def make(self, tier: Tier) -> None:
        operation, self.operation = self.operation, None
        try:
            if operation is not None:
                self.result = operation(tier)
        except BaseException as exc:  # noqa: BLE001  raised again where the result is waited for
            self.error = exc

    def outcome(self) -> T:
        """What the operation returned or raised; to be asked once."""
        if self.error is not None:
            try:
                raise self.error
            finally:
                self.error = None  # its traceback leads back here
        result, self.result = self.result, None
        return cast("T", result)


class Lane:
    """Calls a tier from a few threads, so that whoever asks can stop waiting.

    A call that has not ended in time is given up: `TierTimeoutError`, and its late result is thrown away. A chunk whose
    writing or deletion was given up is doubtful: the thread deletes it as soon as the tier answers, and until then it
    is not written again. So what was given up ends as absent, whatever the tier made of it.

    While all threads have been waiting for longer than the timeout, the tier is stalled: further calls fail at once,
    and nothing piles up. After three faults in a row (unavailable or too late) the tier is down, and left alone for a
    time that grows from 0.1 s to 30 s with every probe that fails. A call that its caller gave less than half of
    `timeout_s` is no fault of the tier.

    Parameters
    ----------
    timeout_s : longest time that a caller waits for a call, queue included.
    patience : of the calling thread, if it waits less than that.
    on_recovery : called with the seconds that the tier was down, by the thread that found it up again.
    on_removal : called with a doubtful chunk that has been deleted, before it can be written again.
    threads : calls that run at a time.
    """

    def __init__(
        self,
        tier: Tier,
        timeout_s: float,
        *,
        patience: Patience | None = None,
        on_recovery: Callable[[float], None] = lambda _: None,
        on_removal: Callable[[ChunkKey], object] = lambda _: None,
        threads: int = 4,
    ) -> None:
        self.timeout_s = timeout_s
        self._tier = tier
        self._patience = patience or Patience()
        self._on_recovery = on_recovery
        self._on_removal = on_removal
        self._workers = Workers(f"kvloom-{tier.name}", threads, queued_tasks=_QUEUED_CALLS)
        self._lock = threading.Lock()  # of what follows; taken before the lock of the workers
        self._breaker = Breaker()
        self._running: list[_Call[object]] = []
        self._doubtful: set[ChunkKey] = set()
        self._removals: deque[ChunkKey] = deque()  # doubtful chunks whose late call has ended
        self._unheard: BaseException | None = None
        self._closed = False

    def run(self, operation: Callable[[Tier], T], *, writes: ChunkKey | None = None, is_brief: bool = False) -> T:
        """What `operation` returns or raises.

        Parameters
        ----------
        writes : the chunk that it puts or deletes, if it does; one such call a chunk at a time.
        is_brief : it moves no chunk, and need not wait behind those that do.

        Raises
        ------
        TierTimeoutError : it did not end in time.
        TierUnavailableError : the tier is not asked: stalled, down or closed, or the chunk is doubtful.
        """
        if self._workers.forked:
            raise TierUnavailableError(f"tier {self._tier.name!r} belongs to the process that opened it; open another")
        timeout_s = min(self.timeout_s, self._patience.left_s())
        if timeout_s <= 0:
            raise TierTimeoutError(f"tier {self._tier.name!r} was not asked: no time is left", begun=False)
        call = _Call(operation, writes)
        self._send(call, is_brief=is_brief)
        sent_at_s = time.monotonic()
        try:
            call.ended.acquire(timeout=timeout_s)
        finally:
            self._leave(call, time.monotonic() - sent_at_s)
        if call.given_up:
            raise TierTimeoutError(
                f"tier {self._tier.name!r} has not answered within {timeout_s:.3g} s", begun=call.begun_at_s is not None
            )
        return call.outcome()

    @contextmanager
    def hold(self, lock: threading.Lock) -> Iterator[None]:
        """Within, `lock` is held; waiting for it and what runs within take `timeout_s` together."""
        with self._patience.within(self.timeout_s):
            if not lock.acquire(timeout=max(0.0, self._patience.left_s())):
                raise TierTimeoutError(
                    f"tier {self._tier.name!r} was not asked: another call has the chunk", begun=False
                )
            try:
                yield
            finally:
                lock.release()

    @property
    def refuses(self) -> bool:
        """Whether the tier would not be asked now: it is stalled, down or closed, or another process's."""
        if self._workers.forked:
            return True
        with self._lock:
            return self._closed or self._is_stalled() or self._breaker.keeps_away

    def doubtful(self) -> frozenset[ChunkKey]:
        """Chunks that the tier may hold although their writing or deletion was given up."""
        with self._lock:
            return frozenset(self._doubtful)

    def close(self) -> None:
        """Closes the tier after the calls that are queued, and ends the threads.

        Raises
        ------
        TierTimeoutError : the tier does not answer; it is closed, and the threads end, when it does.
        """
        if self._workers.forked:
            return  # the tier is the parent's
        with self._lock:
            if self._closed:
                return
            self._closed = True
        until_s = time.monotonic() + self.timeout_s
        call = _Call(lambda tier: tier.close(), None)
        if not self._workers.submit(partial(self._perform, call), last=True):
            self._tier.close()  # without a thread there is no call to wait behind
            return
        in_time = call.ended.acquire(timeout=self.timeout_s)
        self._workers.close(max(0.0, until_s - time.monotonic()))
        if not in_time:
            raise TierTimeoutError(f"tier {self._tier.name!r} does not answer; it is closed when it does", begun=True)
        call.outcome()

    def _send(self, call: _Call[T], *, is_brief: bool) -> None:
        with self._lock:
            error, self._unheard = self._unheard, None
            if error is not None:
                raise error
            refusal = self._refusal(call.writes)
            if refusal is None:
                call.probes = self._breaker.is_down
                if self._workers.submit(partial(self._perform, call), first=is_brief):
                    return
                refusal = "takes no more calls: too many are waiting, or no thread can be started"
                self._breaker.judge(probes=call.probes)
            raise TierUnavailableError(f"tier {self._tier.name!r} {refusal}")

    def _refusal(self, writes: ChunkKey | None) -> str | None:
        """Why the tier is not asked; None if it is, which may begin a probe."""
        if self._closed:
            return "is closed"
        if self._is_stalled():
            return f"is stalled: {len(self._running)} calls have been waiting for more than {self.timeout_s:.3g} s"
        if writes is not None and writes in self._doubtful:
            return (
                f"is not asked to write chunk {writes.hex()}: an earlier call was given up, and is still to be undone"
            )
        if writes is not None and len(self._doubtful) >= _DOUBTFUL_CHUNKS:
            return f"is not written to: {len(self._doubtful)} chunks whose writing was given up are still to be deleted"
        if not self._breaker.admits():
            return f"is down, and asked again in {self._breaker.wait_s():.3g} s"
        return None

    def _is_stalled(self) -> bool:
        stuck_since_s = time.monotonic() - self.timeout_s
        return len(self._running) == self._workers.count and all(
            call.begun_at_s is not None and call.begun_at_s < stuck_since_s for call in self._running
        )

    def _perform(self, call: _Call[T]) -> None:
        """The life of a call on its worker."""
        with self._lock:
            if call.given_up:
                return
            call.begun_at_s = time.monotonic()
            self._running.append(call)  # type: ignore[arg-type]
        try:
            call.make(self._tier)
            answered = not isinstance(call.error, TierUnavailableError)
            with self._lock:
                call.finished = not call.given_up
                if call.given_up:
                    call.result = call.error = None
                    if answered:
                        self._breaker.hurry()
                    if call.writes is not None:
                        self._removals.append(call.writes)
            call.ended.release()
            if answered:
                self._settle(call)
        finally:
            with self._lock:
                self._running.remove(call)  # type: ignore[arg-type]

    def _leave(self, call: _Call[T], waited_s: float) -> None:
        """The caller takes the result, or gives the call up."""
        with self._lock:
            if call.finished:
                fault = isinstance(call.error, TierUnavailableError)
                if isinstance(call.error, TierTimeoutError) and call.error.begun and call.writes is not None:
                    self._doubtful.add(call.writes)  # the tier itself has given up, and does not know either
                    self._removals.append(call.writes)
                was_down_s = self._breaker.judge(probes=call.probes, fault=fault, answered=not fault)
            else:
                call.given_up = True
                if call.begun_at_s is None:
                    call.operation = None  # and what it was to write
                elif call.writes is not None:
                    self._doubtful.add(call.writes)
                was_down_s = self._breaker.judge(probes=call.probes, fault=waited_s >= self.timeout_s / 2)
        if was_down_s is not None:
            self._on_recovery(was_down_s)

    def _settle(self, call: _Call[T]) -> None:
        """Deletes doubtful chunks, as part of a call that the tier has answered."""
        while True:
            with self._lock:
                if not self._removals:
                    return
                key = self._removals.popleft()
                call.begun_at_s = time.monotonic()
            try:
                self._tier.delete(key)
            except BaseException as exc:  # noqa: BLE001  what the tier should not raise is raised by the next call
                with self._lock:
                    self._removals.append(key)
                    if not isinstance(exc, TierError):
                        self._unheard = exc
                return
            self._on_removal(key)
            with self._lock:
                self._doubtful.discard(key)
