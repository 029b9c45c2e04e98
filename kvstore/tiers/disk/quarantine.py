"""Copies of containers that were found corrupt, the newest ones, for a post-mortem."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ....core import ChunkKey
from .files import Files, read_fully, write_fully
from .index import Place
from .segments import Segments

_KEPT_FILES = 16


def keep_copy(files: Files, folder: Path, segments: Segments, key: ChunkKey, place: Place) -> None:
    """Copies what lies at `place` to a file named after time and key."""
    data = memoryview(bytearray(place.nbytes))
    with segments.reading(place.segment) as fd:
        data = data[: read_fully(files.preadv, fd, data, place.offset)]
    fd = files.open(folder / f"{time.time_ns():020d}-{key.hex()}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        write_fully(files, fd, [data], 0)
    finally:
        files.close(fd)
    for name in sorted(files.listdir(folder))[:-_KEPT_FILES]:
        files.unlink(folder / name)
