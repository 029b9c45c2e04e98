"""Work that goes on after the request that asked for it: to be polled, followed and cancelled."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from .problems import ProblemError, not_found

State: TypeAlias = Literal["running", "finished", "failed", "cancelled"]

_REMEMBERED = 1024  # of each tenant
_MOST_RUNNING = 256


@dataclass(eq=False)
class Job:
    """One piece of work. `progress` is what is known of it, as JSON takes it; `version` counts its changes."""

    id: str
    pool: str
    kind: str
    cancel: Callable[[], object]
    began_at_s: float
    state: State = "running"
    progress: dict[str, Any] = field(default_factory=dict)
    version: int = 0

    def as_json(self) -> dict[str, Any]:
        return {"id": self.id, "kind": self.kind, "state": self.state, "began_at_s": self.began_at_s, **self.progress}


class Jobs:
    """The jobs of all tenants; of each, the oldest that have ended are forgotten. From any thread."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._jobs: dict[str, Job] = {}

    def add(self, pool: str, kind: str, cancel: Callable[[], object], **progress: Any) -> Job:
        """Raises `ProblemError` if a tenant has too many running."""
        with self._condition:
            own = [job for job in self._jobs.values() if job.pool == pool]
            ended = [job for job in own if job.state != "running"]
            running = len(own) - len(ended)
            if running >= _MOST_RUNNING:
                raise ProblemError(429, "too-many-jobs", f"{running} jobs are running; wait for one to end")
            job = Job(secrets.token_hex(16), pool, kind, cancel, time.time(), progress=progress)
            self._jobs[job.id] = job
            for old in ended[: max(len(own) + 1 - _REMEMBERED, 0)]:
                del self._jobs[old.id]
        return job

    def get(self, pool: str, job_id: str, kind: str | None = None) -> Job:
        """Raises `ProblemError` if there is none, or not of this tenant."""
        with self._condition:
            job = self._jobs.get(job_id)
        if job is None or job.pool != pool or kind not in (None, job.kind):
            raise not_found("the job")
        return job

    def update(self, job: Job, state: State | None = None, **progress: Any) -> None:
        """A job that has ended changes no more."""
        with self._condition:
            if job.state != "running":
                return
            job.progress = {**job.progress, **progress}
            job.state = state or job.state
            job.version += 1
            self._condition.notify_all()

    def wait(self, job: Job, version: int, timeout_s: float) -> int:
        """Waits until a job is of another version, at most `timeout_s`; the version."""
        with self._condition:
            self._condition.wait_for(lambda: job.version != version or job.state != "running", timeout_s)
            return job.version

    def cancel_all(self) -> None:
        with self._condition:
            running = [job for job in self._jobs.values() if job.state == "running"]
        for job in running:
            job.cancel()
