"""What stands before the container of a chunk in an engine that keeps bytes by name: whose it is, until when.

    offset  bytes
         0      8  magic
         8      4  record_bytes: where the container begins, a multiple of 64
        12      4  bytes of the namespace
        16     32  ChunkKey
        48     32  key of the chunk that this one continues; zeros for none
        80      8  expires_at_s, 88: recompute_s; NaN for none
        96      8  container_bytes
       104      8  xxh3_64 of the rest of the record
       112      .  namespace, UTF-8, padded with zeros

Integers and floats are little-endian.
"""

from __future__ import annotations

import math
import struct

import xxhash

from ....core import ChunkInfo, ChunkKey
from ....errors import ChunkCorruptError

_MAGIC = b"kvlmrec\n"
_FIELDS = struct.Struct("<8sII32s32sddQ")
_CHECKSUM = struct.Struct("<Q")
_START = _FIELDS.size + _CHECKSUM.size
_ALIGNMENT_BYTES = 64
_MOST_NAMESPACE_BYTES = 255
_NONE = bytes(32)

MOST_RECORD_BYTES = -(-(_START + _MOST_NAMESPACE_BYTES) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
"""No record is longer, and every record with its container is at least so long."""


def to_record(key: ChunkKey, info: ChunkInfo, container_bytes: int) -> bytes:
    """The record of a chunk, a multiple of 64 bytes."""
    namespace = info.namespace.encode()
    record_bytes = -(-(_START + len(namespace)) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    expires_at_s = math.nan if info.expires_at_s is None else info.expires_at_s
    recompute_s = math.nan if info.recompute_s is None else info.recompute_s
    fields = _FIELDS.pack(
        _MAGIC, record_bytes, len(namespace), key, info.after or _NONE, expires_at_s, recompute_s, container_bytes
    )
    rest = namespace.ljust(record_bytes - _START, b"\0")
    return fields + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(fields + rest)) + rest


def read_record(head: bytes | memoryview, key: ChunkKey, total_bytes: int) -> tuple[ChunkInfo, int]:
    """What is remembered of a chunk, and where its container begins.

    Parameters
    ----------
    head : the first `MOST_RECORD_BYTES`, or all if there are fewer.
    total_bytes : of record and container.

    Raises
    ------
    ChunkCorruptError : it is not, byte for byte, a record of this key and of a container of that length.
    """
    head = bytes(head[:MOST_RECORD_BYTES])
    if len(head) < _START:
        raise ChunkCorruptError(f"{total_bytes} bytes are shorter than a record")
    magic, record_bytes, namespace_bytes, stored_key, after, expires_at_s, recompute_s, container_bytes = (
        _FIELDS.unpack_from(head)
    )
    (checksum,) = _CHECKSUM.unpack_from(head, _FIELDS.size)
    fits = _START + namespace_bytes <= record_bytes <= len(head) and not record_bytes % _ALIGNMENT_BYTES
    if magic != _MAGIC or not fits:
        raise ChunkCorruptError("the record before the container is none")
    if xxhash.xxh3_64_intdigest(head[: _FIELDS.size] + head[_START:record_bytes]) != checksum:
        raise ChunkCorruptError("checksum of the record is wrong")
    if stored_key != key or record_bytes + container_bytes != total_bytes:
        raise ChunkCorruptError(
            f"record is of {stored_key.hex()} and {record_bytes + container_bytes} bytes; expected {key.hex()} and "
            f"{total_bytes}"
        )
    try:
        namespace = head[_START : _START + namespace_bytes].decode()
    except UnicodeDecodeError as exc:
        raise ChunkCorruptError(f"namespace of the record is not text: {exc}") from exc
    return (
        ChunkInfo(
            None if after == _NONE else ChunkKey(after),
            namespace,
            None if math.isnan(expires_at_s) else expires_at_s,
            None if math.isnan(recompute_s) else recompute_s,
        ),
        record_bytes,
    )
