"""Finds, damages and makes what a disk tier has written."""

from collections.abc import Iterable
from pathlib import Path

from kvloom.core import ChunkKey
from kvloom.kvstore.tiers.disk.index import Change, Index, Op, Row
from kvloom.kvstore.tiers.disk.records import SLOT_BYTES, Records, read_header


def index_of(folder: Path) -> Index:
    """What the journal of a disk tier says, whether the tier is open or not."""
    data = memoryview((folder / "journal").read_bytes())
    index = Index()
    index.load(Records(read_header(data)[0]).read(data[SLOT_BYTES:], 1))
    return index


def write_journal(folder: Path, chunks: Iterable[tuple[ChunkKey, Row]]) -> None:
    """Replaces the journal of a disk tier that is closed."""
    records, written = Records(1), []
    for slot, (key, row) in enumerate(chunks, 1):
        written.append(records.to_bytes(slot, Change(Op.PUT, key, row)))
    (folder / "journal").write_bytes(b"".join([records.header(1), *written]))


def generation_of(folder: Path) -> int:
    """How often the journal of a disk tier was rewritten."""
    return read_header(memoryview((folder / "journal").read_bytes()))[0]


def stored_at(folder: Path, key: ChunkKey) -> tuple[Path, int, int]:
    """Where the container of a chunk lies in a disk tier, open or not: file, offset and bytes."""
    segment, offset, nbytes, *_ = index_of(folder).rows[key]
    return folder / "segments" / f"{segment:016d}.seg", offset, nbytes


def stored_bytes(folder: Path, key: ChunkKey) -> bytes:
    path, offset, nbytes = stored_at(folder, key)
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(nbytes)


def overwrite(folder: Path, key: ChunkKey, data: bytes, at: int = 0) -> None:
    """Damages the container of a chunk in place, from byte `at` on."""
    path, offset, _ = stored_at(folder, key)
    with path.open("r+b") as file:
        file.seek(offset + at)
        file.write(data)


def flip(folder: Path, key: ChunkKey, at: int, bits: int = 1) -> None:
    """Flips bits of one byte of the container of a chunk; a negative `at` counts from its end."""
    data = stored_bytes(folder, key)
    overwrite(folder, key, bytes([data[at] ^ bits]), at % len(data))
