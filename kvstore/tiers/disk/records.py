"""The records of the journal: what happened to chunks, as bytes.

A journal is a sequence of slots of 128 bytes, little-endian; slot 0 is its header.

    header   checksum u64, magic 8s, format version u32, bytes a slot u32, generation u64, next segment u64, zeros
    record   checksum u64, op u8, part u8, flags u16, namespace u32, key 32s, after 32s, segment u64, offset u64,
             bytes of the container u64, expires_at_s f64, recompute_s f64, stamp u64

A checksum is the xxh3_64 of the other 120 bytes. The stamp is `generation << 40 | slot`: a record counts only in its
own slot of its own journal, so old blocks that a power loss brings back are none. A slot crosses no page and no sector.
A slot that is not valid is passed over. A namespace is written once, in parts of 64 bytes, and named by number then.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import xxhash

from ....core import ChunkKey
from ...placement.quota import MOST_NAMESPACE_BYTES
from .index import ALIGNMENT_BYTES, Change, Op, Row

SLOT_BYTES = 128

_FORMAT_VERSION = 2
_MAGIC = b"kvloom\nj"
_HEADER = struct.Struct("<Q8sIIQQ")
_RECORD = struct.Struct("<QBBHI32s32sQQQddQ")
_CHECKSUM_BYTES = 8
_PART_BYTES = 64
_MAX_BYTES = 1 << 48
_GENERATION_BITS, _SLOT_BITS = 24, 40
_HAS_AFTER, _HAS_EXPIRY, _HAS_COST = 1, 2, 4
_NO_KEY = bytes(32)
_NO_ROW: Row = (0, 0, 0, None, "", None, None)


class Records:
    """Makes and reads the records of one journal, and knows the numbers of its namespaces."""

    def __init__(self, generation: int) -> None:
        self.generation = generation % (1 << _GENERATION_BITS)
        self._names: dict[int, str] = {0: ""}
        self._numbers: dict[str, int] = {"": 0}
        self._parts: dict[int, bytes] = {}
        self._last_number = 0

    def header(self, next_segment: int) -> bytes:
        body = _HEADER.pack(0, _MAGIC, _FORMAT_VERSION, SLOT_BYTES, self.generation, next_segment)
        return _sealed(body.ljust(SLOT_BYTES, b"\0"))

    def to_bytes(self, slot: int, change: Change) -> bytes:
        """What to write at that slot: one record, after those that name a new namespace."""
        op, key, row = change
        segment, offset, nbytes, after, namespace, expires_at_s, recompute_s = row or _NO_ROW
        written = b""
        if namespace not in self._numbers:
            written = self._name(slot, namespace)
        flags = (
            _HAS_AFTER * (after is not None)
            | _HAS_EXPIRY * (expires_at_s is not None)
            | _HAS_COST * (recompute_s is not None)
        )
        return written + self._record(
            slot + len(written) // SLOT_BYTES, op, 0, flags, self._numbers[namespace], key, after or _NO_KEY,
            segment, offset, nbytes, expires_at_s or 0.0, recompute_s or 0.0,
        )  # fmt: skip

    def read(self, data: memoryview, slot: int) -> Iterator[tuple[int, int, ChunkKey, Row | None]]:
        """The valid records in `data`, which begins at that slot: where each ends, and the fields of `Change`."""
        stamp, begin = self.generation << _SLOT_BITS | slot, 0
        digest, names = xxhash.xxh3_64_intdigest, self._names
        for record in _RECORD.iter_unpack(data[: len(data) // SLOT_BYTES * SLOT_BYTES]):
            checksum, op, part, flags, number, key, after, segment, offset, nbytes, expires_at_s, cost_s, found = record
            end = begin + SLOT_BYTES
            if found == stamp and checksum == digest(data[begin + _CHECKSUM_BYTES : end]):
                if number > self._last_number:
                    self._last_number = number
                if op == Op.NAMESPACE:
                    self._learn(number, part, flags, key + after)
                    yield end, op, key, None
                elif op <= Op.MOVE and op and number in names and _is_location(segment, offset, nbytes):
                    yield end, op, key, (
                        segment,
                        offset,
                        nbytes,
                        after if flags & _HAS_AFTER else None,
                        names[number],
                        expires_at_s if flags & _HAS_EXPIRY else None,
                        cost_s if flags & _HAS_COST else None,
                    )  # fmt: skip
                else:  # deleted; or of a lost namespace, or of a later release: what the key was is no more
                    yield end, Op.DELETE, key, None
            stamp, begin = stamp + 1, end

    def _name(self, slot: int, text: str) -> bytes:
        self._last_number += 1
        number, data = self._last_number, text.encode()
        parts = [
            data[start : start + _PART_BYTES].ljust(_PART_BYTES, b"\0") for start in range(0, len(data), _PART_BYTES)
        ]
        self._names[number], self._numbers[text] = text, number
        return b"".join(
            self._record(slot + i, Op.NAMESPACE, i, len(data), number, part[:32], part[32:], 0, 0, 0, 0.0, 0.0)
            for i, part in enumerate(parts)
        )

    def _learn(self, number: int, part: int, length: int, text: bytes) -> None:
        known = self._parts.get(number, b"")
        if len(known) != part * _PART_BYTES or length > MOST_NAMESPACE_BYTES:
            return  # an earlier part is lost
        known += text
        self._parts[number] = known
        if len(known) >= length:
            name = known[:length].decode(errors="replace")
            self._names[number], self._numbers[name] = name, number

    def _record(
        self, slot: int, op: Op, part: int, flags: int, number: int, key: bytes, after: bytes, segment: int,
        offset: int, nbytes: int, expires_at_s: float, recompute_s: float,
    ) -> bytes:  # fmt: skip
        stamp = self.generation << _SLOT_BITS | slot
        times = expires_at_s, recompute_s
        return _sealed(_RECORD.pack(0, op, part, flags, number, key, after, segment, offset, nbytes, *times, stamp))


def read_header(data: memoryview) -> tuple[int, int, bool]:
    """Generation, next segment, and whether the header is sound; if not, the generation that the records have."""
    if len(data) >= SLOT_BYTES:
        checksum, magic, version, slot_bytes, generation, next_segment = _HEADER.unpack_from(data)
        sound = checksum == xxhash.xxh3_64_intdigest(data[_CHECKSUM_BYTES:SLOT_BYTES])
        if sound and (magic, version, slot_bytes) == (_MAGIC, _FORMAT_VERSION, SLOT_BYTES):
            return generation, next_segment, True
    for begin in range(SLOT_BYTES, len(data) - SLOT_BYTES + 1, SLOT_BYTES):
        record = _RECORD.unpack_from(data, begin)
        if record[0] == xxhash.xxh3_64_intdigest(data[begin + _CHECKSUM_BYTES : begin + SLOT_BYTES]):
            return record[-1] >> _SLOT_BITS, 1, False
    return 0, 1, False


def _sealed(data: bytes) -> bytes:
    body = data[_CHECKSUM_BYTES:]
    return xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little") + body


def _is_location(segment: int, offset: int, nbytes: int) -> bool:
    return 0 < segment < 1 << 63 and 0 < nbytes < _MAX_BYTES and offset < _MAX_BYTES and not offset % ALIGNMENT_BYTES
