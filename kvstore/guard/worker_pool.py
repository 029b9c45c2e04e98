"""A few threads that do what others need not wait for."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

_IDLE_S = 10.0  # a thread without work ends after it, so that a store that nobody closed holds no threads for ever


class Workers:
    """At most `count` daemon threads with one queue, first come, first served.

    Threads start when there is work for them. They do not keep the interpreter from exiting, whatever they wait for.
    A process that was forked has no threads and takes no tasks: it opens what it needs itself.

    Parameters
    ----------
    queued_tasks : tasks that may wait; further ones are refused.
    """

    def __init__(self, name: str, count: int, *, queued_tasks: int) -> None:
        self.count = count
        self._name = name
        self._queued_tasks = queued_tasks
        self._pid = os.getpid()
        self._wake = threading.Condition(threading.Lock())  # guards all that follows
        self._tasks: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    @property
    def forked(self) -> bool:
        """Whether this is not the process that made it; the lock may have been held by a thread that is not here."""
        return os.getpid() != self._pid

    def submit(self, task: Callable[[], None], *, first: bool = False, last: bool = False) -> bool:
        """Queues a task, which must not raise; False if it was refused.

        `first`: it goes to the front of the queue. `last`: nothing is taken after it, and it is taken even if the queue
        is full.
        """
        if self.forked:
            return False
        with self._wake:
            if self._closed or (len(self._tasks) >= self._queued_tasks and not last):
                return False
            self._closed = last
            self._tasks.appendleft(task) if first else self._tasks.append(task)
            if self._idle >= len(self._tasks) or (len(self._threads) < self.count and self._start()):
                self._wake.notify()
            elif not self._threads:
                self._tasks.remove(task)
                return False
        return True

    def close(self, timeout_s: float | None = None) -> bool:
        """Takes no more tasks and waits until those it has are done; whether they are. None: as long as it takes.

        Past the timeout the threads go on, and end after the last task.
        """
        if self.forked:
            return True
        with self._wake:
            self._closed = True
            threads = list(self._threads)
            self._wake.notify_all()
        until_s = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in threads:
            thread.join(None if until_s is None else max(0.0, until_s - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def _start(self) -> bool:
        thread = threading.Thread(target=self._work, name=f"{self._name}-{len(self._threads)}", daemon=True)
        self._threads.add(thread)
        try:
            thread.start()
        except RuntimeError:  # the system gives no more threads; those that run do the work
            self._threads.discard(thread)
            return False
        return True

    def _work(self) -> None:
        try:
            while True:
                task = self._next()
                if task is None:
                    return
                task()
                del task  # an idle thread keeps nothing alive
        finally:
            with self._wake:
                self._threads.discard(threading.current_thread())

    def _next(self) -> Callable[[], None] | None:
        """The next task; None when there will be none, and this thread is not counted on any more."""
        with self._wake:
            self._idle += 1
            while not self._tasks and not self._closed and self._wake.wait(_IDLE_S):
                pass
            self._idle -= 1
            if self._tasks:
                return self._tasks.popleft()
            self._threads.discard(threading.current_thread())
            return None
