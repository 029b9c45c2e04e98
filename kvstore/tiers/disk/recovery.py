"""What a kill or a power loss leaves behind, found without reading payload; chunks out of dying segments; copies of
damaged ones.
"""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from ....core import ChunkKey
from ....errors import ChunkCorruptError, TierError
from .files import Files, read_exactly, read_fully, write_fully
from .index import Change, Index, Op, PayloadLocation, location_of, taken_bytes
from .journal import Journal
from .segments import Segments

_KEPT_COPIES = 16


def recover(files: Files, journal: Journal, segments: Segments) -> None:
    """Removes chunks without bytes, abandoned segments, and what takes space in a segment without being a chunk."""
    with journal.exclusive() as index:
        lost = lost_chunks(files, segments, index)
        if lost:
            journal.append([Change(Op.DELETE, key, None) for key in lost])
        segments.sweep(journal)
        for number in tuple(index.live_bytes):
            with suppress(FileNotFoundError):
                segments.punch_gaps(number, journal)


def lost_chunks(files: Files, segments: Segments, index: Index) -> list[ChunkKey]:
    """Chunks that lie beyond the end of their segment."""
    ends = {}
    for number in segments.numbers():
        with suppress(FileNotFoundError):
            ends[number] = files.stat(segments.path(number)).st_size
    return [key for key, (segment, offset, nbytes, *_) in index.rows.items() if offset + nbytes > ends.get(segment, 0)]


def overlapping_chunks(index: Index) -> list[ChunkKey]:
    """Chunks that begin within another."""
    spans = sorted((*row[:3], key) for key, row in index.rows.items())
    return [
        key
        for (segment, offset, nbytes, _), (next_segment, next_offset, _, key) in pairwise(spans)
        if segment == next_segment and next_offset < offset + taken_bytes(nbytes)
    ]


def compact(files: Files, journal: Journal, segments: Segments, number: int) -> None:
    """Moves what lives in a segment that is more than half dead, so that it can be unlinked; for want of punching.

    If that fails, the chunks are where they are, and the next chunk that leaves the segment is the next occasion.
    """
    with suppress(OSError, ChunkCorruptError, TierError):
        file = segments.claim(number)
        if file is None:
            return
        held = journal.in_segment(number)
        if 2 * sum(taken_bytes(row[2]) for _, row in held) > files.fstat(file).st_size:
            return
        moves = []
        for key, row in held:
            location = location_of(row)
            data = memoryview(bytearray(location.nbytes))
            read_exactly(files.preadv, file, location.offset, data, 0)  # verified by whoever reads it
            segment, offset = segments.reserve(location.nbytes, journal)
            segments.write(segment, offset, [data])
            moves.append((row, Change(Op.MOVE, key, (segment.number, offset, *row[2:]))))
        # before the journal says so: after a power loss it must not send readers to what has not arrived
        segments.sync_files({change.row[0] for _, change in moves if change.row is not None})
        with journal.exclusive() as index:
            journal.append([change for row, change in moves if index.rows.get(change.key) == row])
        journal.sync()
        files.unlink(segments.path(number))


def keep_copy(files: Files, folder: Path, segments: Segments, key: ChunkKey, location: PayloadLocation) -> None:
    """Copies a damaged container to a file named after time and key; the newest copies are kept, for a post-mortem."""
    data = memoryview(bytearray(location.nbytes))
    file = segments.opened(location.segment)
    data = data[: read_fully(files.preadv, file, data, location.offset)]
    copy = files.open(folder / f"{time.time_ns():020d}-{key.hex()}", "x+b")
    write_fully(files, copy, [data], 0)
    for name in sorted(files.listdir(folder))[:-_KEPT_COPIES]:
        files.unlink(folder / name)
