"""The other side of `lmcache_process.py`: LMCache in its own environment, asked for seconds."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

import torch

from ...evaluation.environment import ROOT

DEFAULT_PYTHON = Path(".venv-engines/lmcache/bin/python")
INSTALL = "in a checkout: make engines (or tests/engines/lmcache.sh FOLDER)"
START_S, ANSWER_S = 120.0, 120.0
CLOSE_S = 20.0
OF_THIS_ENVIRONMENT = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}


class PeerError(RuntimeError):
    """LMCache cannot be asked, or said that something went wrong."""


class Peer:
    """A process of another environment that answers questions in seconds.

    Parameters
    ----------
    python : the interpreter of that environment.
    arguments : of the script. Of the default one: where LMCache may write, and memory for its host backend; how many
        threads it computes with is added.
    module : of kvloom, what is run; by default the storage manager of `bench/tiers`.

    Raises
    ------
    PeerError : it does not start.
    """

    def __init__(self, python: Path, *arguments: object, module: str = "bench.tiers.lmcache_peer") -> None:
        self._resources = ExitStack()
        environment = self._resources.enter_context(environment_with_kvloom())
        self._stderr = self._resources.enter_context(TemporaryFile())  # noqa: SIM115  closed with the process
        try:
            self._process = subprocess.Popen(
                [str(python), "-m", f"kvloom.{module}", *map(str, arguments), str(torch.get_num_threads())],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                env=environment,
            )
        except OSError as exc:
            self._resources.close()
            raise PeerError(f"LMCache's process does not start: {exc}") from exc
        self._unread = b""
        try:
            self.version = str(self._answer(START_S)["version"])
        except BaseException:
            self.close()
            raise

    def ask(self, do: str, **question: object) -> float:
        """The seconds that it took.

        Raises
        ------
        PeerError : it says that something went wrong, or nothing for `ANSWER_S`.
        """
        pipe = self._process.stdin
        if pipe is None:
            raise PeerError("LMCache's process has no standard input")
        try:
            pipe.write(json.dumps({"do": do, **question}).encode() + b"\n")
        except BrokenPipeError as exc:
            raise self._died() from exc
        answer = self._answer(ANSWER_S)
        if "error" in answer:
            raise PeerError(f"LMCache cannot {do}: {answer['error']}")
        return float(str(answer["seconds"]))

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._resources.close()

    def _answer(self, timeout_s: float) -> dict[str, object]:
        pipe = self._process.stdout
        if pipe is None:
            raise PeerError("LMCache's process has no standard output")
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as ready:
            ready.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not ready.select(max(0.0, deadline - time.monotonic())):
                    self._process.kill()
                    raise PeerError(f"LMCache's process said nothing for {timeout_s:g} s")
                found = os.read(pipe.fileno(), 1 << 16)
                if not found:
                    raise self._died()
                self._unread += found
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer: dict[str, object] = json.loads(line)
        except ValueError as exc:
            raise PeerError(f"LMCache's process said {line!r}; expected JSON") from exc
        return answer

    def _died(self) -> PeerError:
        try:
            code = self._process.wait(timeout=CLOSE_S)
        except subprocess.TimeoutExpired:  # it has only closed its end
            self._process.kill()
            code = self._process.wait()
        self._stderr.seek(0)
        words = self._stderr.read().decode(errors="replace").strip().splitlines()
        return PeerError(f"LMCache's process ended with exit code {code}: {words[-1] if words else 'without a word'}")


@contextmanager
def environment_with_kvloom() -> Iterator[dict[str, str]]:
    """Variables for a process of LMCache's environment, which finds this kvloom, whether that has one or not."""
    own = {name: value for name, value in os.environ.items() if name not in OF_THIS_ENVIRONMENT}
    with TemporaryDirectory(prefix="kvloom-peer-") as folder:
        (Path(folder) / "kvloom").symlink_to(ROOT, target_is_directory=True)
        yield own | {"PYTHONPATH": folder, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}


def find_python(given: Path | None) -> Path | None:
    """The interpreter of LMCache's environment; None if there is no such environment.

    Raises
    ------
    ValueError : the file that was named is not there.
    """
    if given is not None and not given.is_file():
        raise ValueError(f"no interpreter {given}; name the python of an environment that has LMCache")
    if given is None and not DEFAULT_PYTHON.is_file():
        return None
    return given or DEFAULT_PYTHON
