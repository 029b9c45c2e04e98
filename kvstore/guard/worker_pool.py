"""A few threads that do what others need not wait for."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from .locks import release_owned

_IDLE_S = 10.0  # a thread without work ends after it, so that a store that was never closed holds no threads for ever


class WorkerPool:
    """At most `count` daemon threads with one queue, first come, first served.

    Threads start when there is work for them. They do not keep the interpreter from exiting, whatever they wait for.
    A process that was forked has no threads and takes no tasks: it opens what it needs itself.

    Parameters
    ----------
    queued_tasks : tasks that may wait; further ones are refused.
    idle_s : seconds after which a thread without work ends.
    """

    def __init__(self, name: str, count: int, *, queued_tasks: int, idle_s: float = _IDLE_S) -> None:
        self.count = count
        self._name = name
        self._queued_tasks = queued_tasks
        self._idle_s = idle_s
        self._pid = os.getpid()
        self._lock = threading.RLock()  # of all that follows; a task is taken without it
        self._tasks: deque[Callable[[], None]] = deque()
        # One for each task; one too many does no harm. Not a Condition, whose lock an interrupted thread would keep.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._busy: set[threading.Thread] = set()
        self._closed = False

    @property
    def is_forked(self) -> bool:
        """Whether this is not the process that made it; the lock may have been held by a thread that is not here."""
        return os.getpid() != self._pid

    @property
    def threads(self) -> int:
        """Threads that are there."""
        return len(self._threads)

    @property
    def queued(self) -> int:
        """Tasks that wait for a thread."""
        return len(self._tasks)

    def submit(self, task: Callable[[], None], *, first: bool = False, last: bool = False) -> bool:
        """Queue a task, which must not raise; False if it was refused.

        `first`: it goes to the front of the queue. `last`: nothing is taken after it, and it is taken even if the queue
        is full.
        """
        if self.is_forked:
            return False
        try:
            with self._lock:
                if self._closed or (len(self._tasks) >= self._queued_tasks and not last):
                    return False
                self._tasks.appendleft(task) if first else self._tasks.append(task)
                self._closed = last
                idle = len(self._threads) - len(self._busy)
                if idle < len(self._tasks) and len(self._threads) < self.count:
                    self._start()
                if not self._threads:
                    self._tasks.remove(task)
                    return False
            self._wake.put(None)
        except BaseException:
            self.recover()
            raise
        return True

    def close(self, timeout_s: float | None = None) -> bool:
        """Take no more tasks and wait until those it has are done; whether they are. None: as long as it takes.

        Past the timeout the threads go on, and end after the last task.
        """
        if self.is_forked:
            return True
        try:
            with self._lock:
                self._closed = True
                threads = list(self._threads)
            for _ in threads:
                self._wake.put(None)
            until_s = None if timeout_s is None else time.monotonic() + timeout_s
            for thread in threads:
                thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
        except BaseException:
            self.recover()
            raise
        return not any(thread.is_alive() for thread in threads)

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: release what it holds, and wake a thread."""
        release_owned(self._lock)
        self._wake.put(None)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        try:
            self._threads.add(thread)
            thread.start()
        except RuntimeError:  # the system gives no more threads; those that run do the work
            self._threads.discard(thread)
        except BaseException:  # it may run all the same, and then adds itself
            self._threads.discard(thread)
            raise

    def _work(self) -> None:
        this = threading.current_thread()
        try:
            with self._lock:
                self._threads.add(this)
            while True:
                task = self._next(this)
                if task is None:
                    return
                task()
                del task  # an idle thread keeps nothing alive
        finally:
            with self._lock:
                self._busy.discard(this)
                self._threads.discard(this)

    def _next(self, this: threading.Thread) -> Callable[[], None] | None:
        """The next task; None when there will be none, and this thread is not counted on any more."""
        was_woken = False
        while True:
            with self._lock:
                self._busy.discard(this)
                if self._tasks:
                    self._busy.add(this)
                    task = self._tasks.popleft()
                    break
                if self._closed:
                    self._threads.discard(this)
                    return None
            try:
                self._wake.get(timeout=self._idle_s)
                was_woken = True
            except queue.Empty:
                with self._lock:
                    if not self._tasks:
                        self._threads.discard(this)
                        return None
        if not was_woken:
            with suppress(queue.Empty):  # so that what wakes does not pile up while there is always work
                self._wake.get_nowait()
        return task
