"""A small private file of JSON that several processes read, and change under one lock."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class JsonFile:
    """JSON in a file that its owner alone may read. Not for several threads at a time: callers bring a lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None

    def news(self) -> Any | None:
        """What the file holds, if it has changed since the last call.

        None if it has not, or cannot be read: half a change must not take away what was there.
        """
        try:
            stat = self.path.stat()
            stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino
            if stamp == self._stamp:
                return None
            content = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        self._stamp = stamp
        return content

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Within, no other process changes the file."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _give(descriptor, self.path.parent)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def write(self, content: Any) -> None:
        """Replaces the content, whole or not at all."""
        temporary = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(content, file, indent=1)
            _give(file.fileno(), self.path.parent)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        stat = self.path.stat()
        self._stamp = stat.st_mtime_ns, stat.st_size, stat.st_ino


def _give(descriptor: int, directory: Path) -> None:
    """What root writes belongs to whose the directory is: the service, which may run as somebody else, must read it."""
    owner = directory.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.fchown(descriptor, owner.st_uid, owner.st_gid)
