"""The worker processes of a service: started, watched, started again, and drained."""

from __future__ import annotations

import asyncio
import logging
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

from starlette.types import ASGIApp

from ..context import WorkerStatus
from ..settings import ServiceSettings
from ..transfer.pool_memory import PoolMemory
from .channel import Kind, frame
from .exchange import WorkerLink
from .worker import tell_settings

_LOG = logging.getLogger("kvloom.service")
_START_S = 60.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 10.0
_STEADY_S = 10.0  # a worker that has lived so long is started again at once
_PING_S, _SILENT_S = 2.0, 30.0
_PACKAGE = __package__.split(".")[0]
_PROGRAM = f"import sys; sys.path[:] = {{path!r}}; from {__package__}.worker import main; main({{descriptors}})"


@dataclass(eq=False)
class _Worker:
    link: WorkerLink
    process: subprocess.Popen[bytes]


class Workers:
    """For the event loop's thread alone.

    Parameters
    ----------
    listener : the socket that clients connect to. Not blocking; nobody here accepts from it.
    memory : what workers map, too.
    status : kept up to date.
    """

    def __init__(
        self,
        settings: ServiceSettings,
        listener: socket.socket,
        app: ASGIApp,
        memory: PoolMemory,
        status: WorkerStatus,
    ) -> None:
        self._settings, self._listener, self._app, self._memory = settings, listener, app, memory
        self._status = status
        self._alive: set[_Worker] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self.is_ending = False  # set as soon as the service is asked to end: what ends now is not started again
        status.configured = settings.workers
        listener.setblocking(False)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that accept connections."""
        return [worker.process.pid for worker in self._alive if worker.link.ready.is_set()]

    async def start(self) -> None:
        """Returns when all accept connections, or those that can do after a minute.

        Raises
        ------
        OSError : none does.
        """
        first = [asyncio.get_running_loop().create_future() for _ in range(self._settings.workers)]
        self._keepers = [asyncio.create_task(self._keep(ready)) for ready in first]
        await asyncio.wait(first, timeout=_START_S)
        if not self._status.alive:
            await self.drain(0.0)
            raise OSError("no worker process has started; the log says why")

    async def drain(self, timeout_s: float) -> None:
        """Lets open requests end for `timeout_s`; then ends all workers, and what they had asked for."""
        self.is_ending = True
        for worker in self._alive:
            worker.link.send(frame(Kind.DRAIN))
        if self._keepers:
            _, late = await asyncio.wait(self._keepers, timeout=timeout_s + 1.0)
            for worker in self._alive:
                worker.process.kill()
            for keeper in late:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """One worker after another, with pauses that grow while they do not live."""
        pause_s = _FIRST_PAUSE_S
        while not self.is_ending:
            began_s = time.monotonic()
            try:
                worker = await self._spawn()
            except OSError as exc:
                _LOG.error("a worker cannot be started: %s", exc)
            else:
                await self._follow(worker, ready)
            if self.is_ending:
                return
            self._status.restarts += 1
            pause_s = _FIRST_PAUSE_S if time.monotonic() - began_s > _STEADY_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s)

    async def _spawn(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            descriptors = theirs.fileno(), self._listener.fileno(), self._memory.descriptor
            program = _PROGRAM.format(path=sys.path, descriptors=", ".join(map(str, descriptors)))
            command = [sys.executable, "-c", program]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)  # noqa: S603  our own
            tell_settings(ours, self._settings)  # some hundred bytes, which the socket holds
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        link = WorkerLink(self._app, self._memory)
        await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=ours)
        return _Worker(link, process)

    async def _follow(self, worker: _Worker, ready: asyncio.Future[None]) -> None:
        """Until the worker is gone, and what it had asked for has ended."""
        link = worker.link
        self._alive.add(worker)
        watch = asyncio.create_task(self._watch(worker, ready))
        try:
            await link.lost.wait()
        finally:
            watch.cancel()
            self._alive.discard(worker)
            self._status.alive = len(self.process_ids)
            worker.process.kill()  # its channel is closed: it serves nobody any more
            link.close()
            code = await asyncio.get_running_loop().run_in_executor(None, worker.process.wait)
            if link.tasks:
                await asyncio.wait(link.tasks)
        if not self.is_ending:
            _LOG.warning("a worker has ended with %d and is started again", code)

    async def _watch(self, worker: _Worker, ready: asyncio.Future[None]) -> None:
        await worker.link.ready.wait()
        self._status.alive = len(self.process_ids)
        if not ready.done():
            ready.set_result(None)
        if self.is_ending:
            worker.link.send(frame(Kind.DRAIN))
        while True:
            worker.link.send(frame(Kind.PING))
            await asyncio.sleep(_PING_S)
            if time.monotonic() - worker.link.answered_at_s > _SILENT_S:
                _LOG.error("a worker has not answered for %.0f s, and is killed", _SILENT_S)
                worker.process.kill()
                return
