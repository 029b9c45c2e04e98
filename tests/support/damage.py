"""Finds and damages what a disk tier has written."""

from pathlib import Path

from kvloom.core import ChunkKey
from kvloom.kvstore.tiers.disk.index import Index
from kvloom.kvstore.tiers.disk.records import SLOT_BYTES, Records, read_header


def stored_at(folder: Path, key: ChunkKey) -> tuple[Path, int, int]:
    """Where the container of a chunk lies in a disk tier, open or not: file, offset and bytes."""
    data = memoryview((folder / "journal").read_bytes())
    index = Index()
    for _ in Records(read_header(data)[0]).read(data[SLOT_BYTES:], 1, index):
        pass
    place = index.places[key]
    return folder / "segments" / f"{place.segment:016d}.seg", place.offset, place.nbytes


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
