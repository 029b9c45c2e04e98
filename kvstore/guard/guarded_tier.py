"""A tier around a tier that may stall: calls are given up in time, and a tier that is down is left alone."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Generic, TypeVar, cast

from ...core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry, Tier
from ...errors import TierError, TierTimeoutError, TierUnavailableError
from ..capabilities import ChecksItself, ReadsCached, ReadsLayers, ReportsChanges
from .circuit_breaker import CircuitBreaker
from .deadline import Deadline
from .locks import release_owned
from .worker_pool import WorkerPool

T = TypeVar("T")

_THREADS = 4
_QUEUED_CALLS = 256
_DOUBTFUL_CHUNKS = 1024


class _Call(Generic[T]):
    """One call of a tier. Until it has ended, the lock of the guarded tier guards all but `operation` and `ended`."""

    # state      begun_at_s  given_up  is_over  what goes on with it
    # queued     None        False     False    the next worker that is free
    # withdrawn  None        True      False    the worker that finds it, by doing nothing
    # running    set         False     False    its worker
    # late       set         True      False    its worker, which throws the result away
    # done       set         False     True     the caller, who takes the result
    # settled    set         True      True     the worker that deletes the chunk that it was to write

    __slots__ = ("begun_at_s", "ended", "error", "given_up", "is_over", "operation", "result", "writes")

    def __init__(self, operation: Callable[[Tier], T], writes: ChunkKey | None) -> None:
        self.operation: Callable[[Tier], T] | None = operation
        self.writes = writes
        self.begun_at_s: float | None = None
        self.given_up = False
        self.is_over = False
        self.result: T | None = None
        self.error: BaseException | None = None
        self.ended = threading.Lock()  # released at the end; one thread waits for it
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


class GuardedTier:
    """Calls another tier from a few threads, so that the caller can stop waiting.

    A call that has not ended in time is given up: `TierTimeoutError`, and its late result is thrown away. A chunk whose
    writing or deletion was given up is doubtful: the thread deletes it as soon as the tier answers, and until then it
    is not written again. So what was given up ends as absent, whatever the tier made of it. An exception that
    interrupts the caller gives the call up, too.

    While all threads have been waiting for longer than the timeout, the tier is stalled: further calls fail at once,
    and nothing piles up. After three faults in a row (unavailable or too late) the tier is down, and left alone for a
    time that grows from 0.1 s to 30 s with every probe that fails. A call that its caller gave less than half of
    `timeout_s` is no fault of the tier. What the tier has in memory (`ReadsCached`) is read in the calling thread: to
    wake another takes longer than to read a megabyte of the page cache.

    Every method of the tier may raise, beside its own errors:

    TierTimeoutError : it did not end in time.
    TierUnavailableError : the tier is not asked: stalled, down or closed, or the chunk is doubtful.

    Parameters
    ----------
    tier : what is guarded; owned.
    timeout_s : longest time that a caller waits for a call, queue included.
    deadline : of the calling thread, if it waits less than that.
    threads : calls that run at a time.
    most_doubtful : chunks; beyond that nothing is written until some are deleted.
    clock : seconds, monotonic.

    Attributes
    ----------
    on_recovery : called with the seconds that the tier was down, by the thread that found it up again.
    on_removal : called with a doubtful chunk that has been deleted, before it can be written again.
    """

    def __init__(
        self,
        tier: Tier,
        timeout_s: float,
        *,
        deadline: Deadline | None = None,
        threads: int = _THREADS,
        most_doubtful: int = _DOUBTFUL_CHUNKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds above 0")
        self.tier = tier
        self.name = tier.name
        self.timeout_s = timeout_s
        self.on_recovery: Callable[[float], object] = lambda _: None
        self.on_removal: Callable[[ChunkKey], object] = lambda _: None
        self._cached = tier.cached if isinstance(tier, ReadsCached) else None
        self._cached_layers = self._cached if isinstance(self._cached, ReadsLayers) else None
        self._reports_changes = isinstance(tier, ReportsChanges)
        self._deadline = deadline or Deadline(clock)
        self._most_doubtful = most_doubtful
        self._clock = clock
        self._pool = WorkerPool(f"kvloom-{tier.name}", threads, queued_tasks=_QUEUED_CALLS)
        self._lock = threading.RLock()  # of what follows; taken before the lock of the pool
        self._breaker = CircuitBreaker(clock)
        self._running: list[_Call[object]] = []
        self._doubtful: set[ChunkKey] = set()
        self._removals: deque[ChunkKey] = deque()  # doubtful chunks whose late call has ended
        self._pending_error: BaseException | None = None
        self._closing: _Call[None] | None = None
        self._close_is_queued = False

    # ------------------------------------------------------------------------------------------------ as a tier

    @property
    def capacity_bytes(self) -> int | None:
        return self.tier.capacity_bytes

    @property
    def used_bytes(self) -> int:
        return self.tier.used_bytes

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        if self._cached is not None and self.is_available:
            try:
                blob = self._cached.get(key)
                if blob is not None:
                    return blob
            except BlockingIOError:
                pass
        return self.call(lambda tier: tier.get(key))

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        """Layers `[start, stop)` of a chunk; of the whole one if the tier reads no layers alone."""
        if self._cached_layers is not None and self.is_available:
            try:
                blob = self._cached_layers.get_layers(key, start, stop)
                if blob is not None:
                    return blob
            except BlockingIOError:
                pass

        def get_layers(tier: Tier) -> EncodedChunk | None:
            if isinstance(tier, ReadsLayers):
                return tier.get_layers(key, start, stop)
            blob = tier.get(key)
            return None if blob is None else blob.layers(start, stop)

        return self.call(get_layers)

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> int | None:
        return self.call(lambda tier: tier.put(key, blob, info), writes=key)

    def delete(self, key: ChunkKey) -> bool:
        return self.call(lambda tier: tier.delete(key), writes=key)

    def __contains__(self, key: object) -> bool:
        return self.call(lambda tier: key in tier, is_brief=True)

    def entries(self) -> list[Entry]:
        return self.call(lambda tier: tier.entries())

    def check(self) -> list[str]:
        """What the tier finds inconsistent in itself, in words."""
        return self.call(lambda tier: tier.check() if isinstance(tier, ChecksItself) else [])

    def close(self) -> None:
        """Close the tier after the calls that are queued, and end the threads; an interrupted call may be repeated.

        Raises
        ------
        TierTimeoutError : the tier does not answer; it is closed, and the threads end, when it does.
        """
        if self._pool.is_forked:
            return  # the tier is the parent's
        until_s = time.monotonic() + self.timeout_s
        try:
            with self._lock:
                call = self._closing = self._closing or _Call(lambda tier: tier.close(), None)
            if self._pool.submit(partial(self._perform, call), last=True):
                self._close_is_queued = True
            elif not self._close_is_queued:
                self._perform(call)  # without a thread there is no call to wait behind
            is_over = call.is_over or call.ended.acquire(timeout=self.timeout_s) or call.is_over
            self._pool.close(max(0.0, until_s - time.monotonic()))
        except BaseException:
            release_owned(self._lock)
            raise
        if not is_over:
            raise TierTimeoutError(f"tier {self.name!r} does not answer; it is closed when it does", begun=True)
        call.outcome()

    # ------------------------------------------------------------------------------------------------- the guard

    @property
    def is_available(self) -> bool:
        """False while the tier is not asked: it is stalled, down or closed, or another process's."""
        if self._pool.is_forked:
            return False
        return self._closing is None and not self._is_stalled() and not self._breaker.is_open

    @property
    def is_down(self) -> bool:
        """Whether it has failed, and not answered since."""
        return self._breaker.is_down

    @property
    def running(self) -> int:
        """Calls that a thread is waiting for, given up or not."""
        return len(self._running)

    @property
    def threads(self) -> int:
        """Threads that are there."""
        return self._pool.threads

    @property
    def queued(self) -> int:
        """Calls that wait for a thread."""
        return self._pool.queued

    def doubtful(self) -> frozenset[ChunkKey]:
        """Chunks that the tier may hold although their writing or deletion was given up."""
        return frozenset(self._doubtful)

    def has_changes(self) -> bool:
        """Whether other processes may have changed what the tier holds."""
        return self._reports_changes and (self._cached is None or self._cached.has_changes())

    def call(
        self,
        operation: Callable[[Tier], T],
        *,
        writes: ChunkKey | None = None,
        is_brief: bool = False,
        timeout_s: float | None = None,
    ) -> T:
        """What `operation`, called with the tier by another thread, returns or raises.

        Parameters
        ----------
        writes : the chunk that it puts or deletes, if it does; one such call a chunk at a time.
        is_brief : it moves no chunk, and need not wait behind those that do.
        timeout_s : if it is to be given up earlier than the tier's timeout and the thread's deadline say.
        """
        if self._pool.is_forked:
            raise TierUnavailableError(f"tier {self.name!r} belongs to the process that opened it; open another")
        left_s = min(self.timeout_s, self._deadline.left_s())
        if timeout_s is not None:
            left_s = min(left_s, timeout_s)
        if left_s <= 0:
            raise TierTimeoutError(f"tier {self.name!r} was not asked: no time is left", begun=False)
        call = _Call(operation, writes)
        sent_at_s = self._clock()
        try:
            self._send(call, is_brief=is_brief)
            call.ended.acquire(timeout=left_s)
            self._leave(call, self._clock() - sent_at_s)
        except BaseException:
            release_owned(self._lock)
            self._leave(call, self._clock() - sent_at_s)  # again, as far as it has been done
            raise
        if call.given_up:
            raise TierTimeoutError(
                f"tier {self.name!r} has not answered within {left_s:.3g} s", begun=call.begun_at_s is not None
            )
        return call.outcome()

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: release what it holds."""
        release_owned(self._lock)
        self._pool.recover()

    def _send(self, call: _Call[T], *, is_brief: bool) -> None:
        with self._lock:
            error, self._pending_error = self._pending_error, None
            if error is not None:
                raise error
            refusal = self._refusal(call)
            if refusal is None:
                if self._pool.submit(partial(self._perform, call), first=is_brief):
                    return
                refusal = "takes no more calls: too many are waiting, or no thread can be started"
            raise TierUnavailableError(f"tier {self.name!r} {refusal}")

    def _refusal(self, call: _Call[T]) -> str | None:
        """Why the tier is not asked; None if it is, which may begin a probe."""
        writes = call.writes
        if self._closing is not None:
            return "is closed"
        if self._is_stalled():
            return f"is stalled: {len(self._running)} calls have been waiting for more than {self.timeout_s:.3g} s"
        if writes is not None and writes in self._doubtful:
            return (
                f"is not asked to write chunk {writes.hex()}: an earlier call was given up, and is still to be undone"
            )
        if writes is not None and len(self._doubtful) >= self._most_doubtful:
            return f"is not written to: {len(self._doubtful)} chunks whose writing was given up are still to be deleted"
        if not self._breaker.admit(call):
            return f"is down, and asked again in {self._breaker.wait_s():.3g} s"
        return None

    def _is_stalled(self) -> bool:
        stuck_since_s = self._clock() - self.timeout_s
        return len(self._running) == self._pool.count and all(
            call.begun_at_s is not None and call.begun_at_s < stuck_since_s for call in self._running
        )

    def _perform(self, call: _Call[T]) -> None:
        """The life of a call on its worker."""
        with self._lock:
            if call.given_up or call.begun_at_s is not None:
                return
            call.begun_at_s = self._clock()
            self._running.append(call)  # type: ignore[arg-type]
        try:
            call.make(self.tier)
            answered = not isinstance(call.error, TierUnavailableError)
            with self._lock:
                if call.given_up:
                    call.result = call.error = None
                    if answered:
                        self._breaker.retry_now()
                    if call.writes is not None:
                        self._removals.append(call.writes)
                call.is_over = True
            call.ended.release()
            if answered:
                self._delete_doubtful(call)
        finally:
            with self._lock:
                self._running.remove(call)  # type: ignore[arg-type]

    def _leave(self, call: _Call[T], waited_s: float) -> None:
        """The caller takes the result, or gives the call up. May be repeated if it was interrupted."""
        with self._lock:
            if call.is_over and not call.given_up:
                fault = isinstance(call.error, TierUnavailableError)
                if isinstance(call.error, TierTimeoutError) and call.error.begun and call.writes is not None:
                    self._doubtful.add(call.writes)  # the tier itself has given up, and does not know either
                    self._removals.append(call.writes)
                was_down_s = self._breaker.judge(call, fault=fault, answered=not fault)
            else:
                call.given_up = True
                if call.begun_at_s is None:
                    call.operation = None  # and what it was to write
                elif call.writes is not None and not call.is_over:
                    self._doubtful.add(call.writes)
                was_down_s = self._breaker.judge(call, fault=waited_s >= self.timeout_s / 2)
        if was_down_s is not None:
            self.on_recovery(was_down_s)

    def _delete_doubtful(self, call: _Call[T]) -> None:
        """Deletes doubtful chunks, as part of a call that the tier has answered."""
        while True:
            with self._lock:
                if not self._removals:
                    return
                key = self._removals.popleft()
                call.begun_at_s = self._clock()
            try:
                self.tier.delete(key)
            except BaseException as exc:  # noqa: BLE001  what the tier should not raise is raised by the next call
                with self._lock:
                    self._removals.append(key)
                    if not isinstance(exc, TierError):
                        self._pending_error = exc
                return
            self.on_removal(key)
            with self._lock:
                self._doubtful.discard(key)
