"""Who did what: one JSON line for each request that changes something, or that was refused."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any

_LOG = logging.getLogger("kvloom.service")
_MOST_BYTES = 64 << 20
_KEPT_FILES = 8
_STRANGERS_PER_S = 20


class AuditLog:
    """Appends to a private file, which moves to `NAME.1` when it has grown to 64 MiB, and so on to `NAME.8`.

    From any thread and process.

    Parameters
    ----------
    path : None writes nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._descriptor: int | None = None
        self._second = 0  # of what follows
        self._strangers = 0
        self._left_out = 0

    def write_stranger(self, **event: Any) -> None:
        """As `write`, at most twenty lines a second: who has no token cannot fill the log. It says what is missing."""
        with self._lock:
            second = int(time.monotonic())
            if second != self._second:
                self._second, self._strangers = second, 0
            self._strangers += 1
            if self._strangers > _STRANGERS_PER_S:
                self._left_out += 1
                return
            left_out, self._left_out = self._left_out, 0
        self.write(**event, **({"left_out_before": left_out} if left_out else {}))

    def write(self, **event: Any) -> None:
        """One line; a disk that refuses it is logged, and changes nothing for the client."""
        if self._path is None:
            return
        line = json.dumps({"at": round(time.time(), 3), **event}, separators=(",", ":")) + "\n"
        with self._lock:
            try:
                os.write(self._open(self._path), line.encode())
            except OSError as exc:
                _LOG.warning("the audit log cannot be written: %s", exc)

    def close(self) -> None:
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def _open(self, path: Path) -> int:
        if self._descriptor is not None:
            stat = os.fstat(self._descriptor)
            if stat.st_size < _MOST_BYTES and stat.st_nlink:
                return self._descriptor
            os.close(self._descriptor)
            self._descriptor = None
            if stat.st_nlink and path.exists() and path.stat().st_ino == stat.st_ino:
                for number in range(_KEPT_FILES - 1, 0, -1):
                    older = path.with_name(f"{path.name}.{number}")
                    if older.exists():
                        older.replace(path.with_name(f"{path.name}.{number + 1}"))
                path.replace(path.with_name(f"{path.name}.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o600)
        return self._descriptor
