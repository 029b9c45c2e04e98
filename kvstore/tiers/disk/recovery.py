"""What a kill or a power loss leaves behind, found without reading payload; and moving chunks out of dying segments."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, suppress
from itertools import pairwise

from ....core import ChunkKey
from ....errors import ChunkCorruptError, TierError
from .files import Files, read_exactly
from .index import Index, Place
from .journal import Journal
from .records import Op
from .segments import Segments


def recover(files: Files, journal: Journal, segments: Segments) -> None:
    """Removes chunks without bytes, abandoned segments, and what takes space in a segment without being a chunk."""
    with journal.exclusive() as index:
        lost = lost_chunks(files, segments, index)
        if lost:
            journal.append([(Op.DELETE, key, None) for key in lost])
        segments.sweep(journal)
        places = defaultdict(list)
        for place in index.places.values():
            places[place.segment].append(place)
        for number, held in places.items():
            with suppress(FileNotFoundError):
                segments.punch_gaps(number, held)


def lost_chunks(files: Files, segments: Segments, index: Index) -> list[ChunkKey]:
    """Chunks that lie beyond the end of their segment."""
    ends = {}
    for number in segments.numbers():
        with suppress(FileNotFoundError):
            ends[number] = files.stat(segments.path(number)).st_size
    return [key for key, place in index.places.items() if place.offset + place.nbytes > ends.get(place.segment, 0)]


def overlapping_chunks(index: Index) -> list[ChunkKey]:
    """Chunks that begin within another."""
    spans = sorted((place.at, place.taken_bytes, key) for key, place in index.places.items())
    return [
        key
        for ((number, offset), taken, _), (at, _, key) in pairwise(spans)
        if at[0] == number and at[1] < offset + taken
    ]


def compact(files: Files, journal: Journal, segments: Segments, number: int) -> None:
    """Moves what lives in a segment that is more than half dead, so that it can be unlinked; for want of punching.

    If that fails, the chunks are where they are, and the next chunk that leaves the segment is the next occasion.
    """
    with suppress(OSError, ChunkCorruptError, TierError), segments.claimed(number) as fd:
        if fd is None:
            return
        held = journal.in_segment(number)
        if 2 * sum(place.taken_bytes for _, place in held) > files.fstat(fd).st_size:
            return
        with ExitStack() as copies:
            moves = []
            for key, place in held:
                data = memoryview(bytearray(place.nbytes))
                read_exactly(files.preadv, fd, place.offset, data, 0)  # verified by whoever reads it
                to, offset = copies.enter_context(segments.written(place.taken_bytes, [data], journal))
                moves.append((key, place, Place(to, offset, place.nbytes, place.info)))
            # before the journal says so: after a power loss it must not send readers to what has not arrived
            segments.sync_files({place.segment for _, _, place in moves})
            with journal.exclusive() as index:
                still = [move for move in moves if move[0] in index.places and index.places[move[0]].at == move[1].at]
                journal.append([(Op.MOVE, key, to_place) for key, _, to_place in still])
        journal.sync()
        files.unlink(segments.path(number))
