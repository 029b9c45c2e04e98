"""Work that LMCache hands over and asks for later: one thread, numbered results, and a descriptor that says when."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from ..serving.worker.threads import compute_alone

T = TypeVar("T")

_LOG = logging.getLogger("kvloom")


class TaskQueue(Generic[T]):
    """Tasks of one kind, in the order in which they came. Every method may be called from any thread.

    Attributes
    ----------
    event_fd : an eventfd, which counts finished tasks until it is read.
    """

    def __init__(self, name: str) -> None:
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._name = name
        self._lock = threading.Lock()
        self._next_id = 0
        self._done: dict[int, T] = {}
        self._is_closed = False
        self._queue: SimpleQueue[tuple[int, Callable[[], T], Callable[[], T]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"kvloom-lmcache-{name}", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether tasks are worked on."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[], T], failed: Callable[[], T]) -> int:
        """Number of a new task; its result is what `work` returns, or what `failed` does if `work` raises."""
        with self._lock:
            task, self._next_id = self._next_id, self._next_id + 1
            if self._is_closed:
                self._done[task] = failed()
            else:
                self._queue.put((task, work, failed))
        return task

    def pop(self, task: int) -> T | None:
        """The result of a task, once; None as long as there is none."""
        with self._lock:
            return self._done.pop(task, None)

    def pop_all(self) -> dict[int, T]:
        """All results that were not asked for yet, by task."""
        with self._lock:
            done, self._done = self._done, {}
        return done

    def close(self) -> None:
        """Finish what was submitted, then close the descriptor."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._queue.put(None)
        self._thread.join()
        os.close(self.event_fd)

    def _run(self) -> None:
        compute_alone()
        while (item := self._queue.get()) is not None:
            task, work, failed = item
            try:
                result = work()
            except Exception:  # noqa: BLE001 - LMCache waits for a result, and must get one
                _LOG.exception("a %s task of LMCache failed", self._name)
                result = failed()
            with self._lock:
                self._done[task] = result
            del item, work, failed, result  # they refer to LMCache's memory
            os.eventfd_write(self.event_fd, 1)
