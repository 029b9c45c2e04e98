"""What was decided for the last requests of engines that share a folder, kept for `kvloom explain`. No engine.

`requests.jsonl` has a line of JSON for each request that is over; when it is long, it becomes `requests.1.jsonl`, and a
new one begins. Several processes append to it: each line is one write.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("kvloom")

_NAME, _OLDER_NAME = "requests.jsonl", "requests.1.jsonl"
_LINE_BYTES = 512  # more than nearly every line takes
_MOST_WAITING = 1000  # lines that wait for a disk that stalls; further ones are dropped


class RequestJournal:
    """Appends to the journal of a folder, in the background: a request never waits for a disk.

    Where the folder cannot be written to, that is logged once and nothing is kept.

    Parameters
    ----------
    folder : made when there is something to write.
    requests : at least so many are kept, and at most about twice as many.
    clock : Unix time.
    """

    def __init__(self, folder: Path, requests: int, *, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._most_bytes, self._clock = folder, requests * _LINE_BYTES, clock
        self._lock = threading.Lock()
        self._waiting: list[bytes] = []
        self._is_writing = self._is_broken = False

    def append(self, request_id: str, usage: Mapping[str, object]) -> None:
        """A request is over; `usage` as it is returned with it."""
        line = json.dumps({"request": request_id, "at_s": round(self._clock(), 3), **usage}) + "\n"
        with self._lock:
            if self._is_broken or len(self._waiting) >= _MOST_WAITING:
                return
            self._waiting.append(line.encode())
            if self._is_writing:
                return
            self._is_writing = True
        threading.Thread(target=self._write, name="kvloom-journal", daemon=True).start()

    def _write(self) -> None:
        while True:
            with self._lock:
                lines, self._waiting = self._waiting, []
                if not lines:
                    self._is_writing = False
                    return
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                for line in lines:
                    self._write_line(line)
            except OSError as exc:
                _LOG.warning("%s cannot be written: %s; kvloom explain knows nothing of this engine", self._path, exc)
                with self._lock:
                    self._is_broken, self._is_writing, self._waiting = True, False, []
                return

    @property
    def _path(self) -> Path:
        return self._folder / _NAME

    def _write_line(self, line: bytes) -> None:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line)
            if os.fstat(file).st_size > self._most_bytes:
                self._begin_anew(file)
        finally:
            os.close(file)

    def _begin_anew(self, file: int) -> None:
        """The file becomes the older one, unless another process does that, or has just done it."""
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._path.stat().st_ino == os.fstat(file).st_ino:
                self._path.replace(self._folder / _OLDER_NAME)


def read_journal(folder: Path) -> list[dict[str, Any]]:
    """What is known of the last requests of a folder, oldest first. Lines that are torn are left out.

    Raises
    ------
    ValueError : there is no journal.
    """
    found, is_there = [], False
    for name in (_OLDER_NAME, _NAME):
        try:
            lines = (folder / name).read_bytes().splitlines()
        except FileNotFoundError:
            continue
        is_there = True
        for line in lines:
            with suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("request"), str):
                    found.append(record)
    if not is_there:
        raise ValueError(
            f"{folder} has no {_NAME}; expected the disk_path, or journal_path, of an engine that has served requests"
        )
    return found
