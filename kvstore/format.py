"""Encoded chunks as bytes, and back with every byte verified.

    offset  bytes
         0      8  magic
         8      4  format version
        12      4  header_bytes: where the data begins, a multiple of 64
        16     32  ChunkKey
        48      8  total_bytes
        56      8  xxh3_64 of [0, 56) and [64, header_bytes)
        64      8  bytes of the JSON           <- from here on a standard safetensors file
        72      .  JSON, padded with spaces
    header_bytes   data: the tensors in the order of the JSON, without gaps, widest dtype first, so that each is aligned

Integers are little-endian. The JSON's `__metadata__` holds codec, meta, the names of the layered tensors and the
checksums (xxh3_64): one for each layer of a layered tensor, one for each other tensor. A checksum finds accidents, not
forgery; a forged header may be believed, but can neither raise anything but `ChunkCorruptError` nor make a reader
allocate more than the container is long.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from ..core import ChunkKey, EncodedChunk
from ..errors import ChunkCorruptError, CodecError
from .encoding.copies import copy_bytes, on_cpu

ReadAt: TypeAlias = Callable[[memoryview, int], None]
"""Fills the buffer with the container's bytes from that offset on, or raises."""

Empty: TypeAlias = Callable[[int], Tensor]
"""`[nbytes]` uint8 on the cpu, of any content."""

FORMAT_VERSION = 1
MAX_HEADER_BYTES = 1 << 24

_MAGIC = b"kvloom\r\n"
_PREAMBLE = struct.Struct("<8sII32sQQ")
_SEALED_BYTES = _PREAMBLE.size - 8  # what comes before the checksum
_JSON_START = _PREAMBLE.size + 8
_ALIGNMENT_BYTES = 64
_FIRST_READ_BYTES = 1 << 14  # holds the whole header of a chunk of 32 layers
_PIECE_BYTES = 1 << 19  # half of a second-level cache
_MAX_DIMS = 16
_CACHED_LAYOUT_BYTES = 1 << 13  # what a forged header makes the cache hold is bounded, too
_METADATA = b'{"__metadata__":'
_NO_CHECKSUM = "0" * 16

_DTYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the container, and the checksums of its sections.

    Attributes
    ----------
    offset : of its first byte in the container.
    checksums : one for each layer if it is layered, otherwise one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    layered: bool
    offset: int
    checksums: tuple[str, ...]

    @property
    def section_bytes(self) -> int:
        shape = self.shape[1:] if self.layered else self.shape
        return math.prod(shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Header:
    """A verified header: everything but the data. `raw` is what was verified."""

    codec: str
    meta: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    raw: bytes

    def matches(self, read_at: ReadAt) -> bool:
        """Whether the container still begins with the bytes that were verified; cheaper than to verify them again."""
        found = bytearray(len(self.raw))
        read_at(memoryview(found), 0)
        return found == self.raw


def _fresh(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


class Container:
    """The container of a chunk, about to be written; only tensors on CUDA devices are copied.

    Attributes
    ----------
    nbytes : of the whole.

    Raises
    ------
    CodecError : a tensor is not contiguous, neither on the cpu nor on a CUDA device, or of a dtype that is not stored;
        a layered one is missing, or the header is too large.
    """

    __slots__ = ("_blob", "_buffers", "_header_bytes", "_key", "_layout", "_metadata", "_sections", "nbytes")

    def __init__(self, key: ChunkKey, blob: EncodedChunk) -> None:
        if not blob.layered <= blob.tensors.keys():
            raise CodecError(f"layered tensors {sorted(blob.layered)} are not all among {sorted(blob.tensors)}")
        blob = on_cpu(blob)
        names = sorted(blob.tensors, key=lambda name: (-blob.tensors[name].dtype.itemsize, name))
        self._key = key
        self._blob = blob  # what the buffers look at
        self._buffers = {name: _raw_bytes(name, blob.tensors[name]) for name in names}
        self._sections = {name: _section_count(name, blob) for name in names}
        fields = {"codec": blob.codec, "meta": json.dumps(dict(blob.meta)), "layered": json.dumps(sorted(blob.layered))}
        self._metadata = _METADATA + json.dumps(fields, separators=(",", ":"))[:-1].encode() + b',"checksums":'
        tensors = ((name, blob.tensors[name].dtype, tuple(blob.tensors[name].shape)) for name in names)
        self._layout = b"}" + _layout_text(tuple(tensors))
        no_checksums = {name: [_NO_CHECKSUM] * count for name, count in self._sections.items()}
        self._header_bytes = _JSON_START + len(self._text(no_checksums))
        if self._header_bytes > MAX_HEADER_BYTES:
            raise CodecError(f"header of {self._header_bytes} bytes; at most {MAX_HEADER_BYTES} are stored")
        self.nbytes = self._header_bytes + sum(map(len, self._buffers.values()))

    def buffers(self) -> list[memoryview]:
        """Header and tensors, in file order."""
        checksums = {name: _checksums(data, self._sections[name]) for name, data in self._buffers.items()}
        return [memoryview(self._header(checksums)), *self._buffers.values()]

    def copy_into(self, target: memoryview) -> None:
        """Fills `nbytes` of memory. Each piece is summed right after it was copied, while it is in the cache."""
        checksums, end = {}, self._header_bytes
        for name, data in self._buffers.items():
            begin, end = end, end + len(data)
            copied = target[begin:end]
            size = len(data) // max(self._sections[name], 1)
            if size <= _PIECE_BYTES:  # sections are pieces
                checksums[name] = _checksums(copied, self._sections[name], data)
            else:
                checksums[name] = []
                for section in range(0, len(data), size):
                    digest = xxhash.xxh3_64()
                    for start in range(section, section + size, _PIECE_BYTES):
                        stop = min(start + _PIECE_BYTES, section + size)
                        copy_bytes(copied[start:stop], data[start:stop])
                        digest.update(copied[start:stop])
                    checksums[name].append(digest.hexdigest())
        copy_bytes(target[: self._header_bytes], memoryview(self._header(checksums)))

    def _header(self, checksums: Mapping[str, list[str]]) -> bytes:
        text = self._text(checksums)
        body_header = len(text).to_bytes(8, "little") + text
        fields = _MAGIC, FORMAT_VERSION, self._header_bytes, self._key, self.nbytes, 0
        preamble = _PREAMBLE.pack(*fields)[:_SEALED_BYTES]
        checksum = xxhash.xxh3_64_intdigest(preamble + body_header).to_bytes(8, "little")
        return preamble + checksum + body_header

    def _text(self, checksums: Mapping[str, list[str]]) -> bytes:
        """The JSON, as long for any checksums."""
        text = self._metadata + json.dumps(json.dumps(checksums)).encode() + self._layout
        return text + b" " * (-(_JSON_START + len(text)) % _ALIGNMENT_BYTES)


def to_buffers(key: ChunkKey, blob: EncodedChunk) -> list[memoryview]:
    """The container of a chunk as header and tensor buffers, in file order; errors as `Container`."""
    return Container(key, blob).buffers()


def to_bytes(key: ChunkKey, blob: EncodedChunk) -> bytes:
    """The container of a chunk; errors as `Container`."""
    return b"".join(to_buffers(key, blob))


def from_bytes(key: ChunkKey, data: bytes | bytearray | memoryview) -> EncodedChunk:
    """The chunk in a container, copied and verified.

    Raises
    ------
    ChunkCorruptError : the container is not, byte for byte, the one that `to_bytes` made under this key.
    """
    source = memoryview(data).cast("B")

    def read_at(buffer: memoryview, offset: int) -> None:
        buffer[:] = source[offset : offset + len(buffer)]

    return read_container(read_at, len(source), key)


def read_container(read_at: ReadAt, total_bytes: int, key: ChunkKey, empty: Empty = _fresh) -> EncodedChunk:
    """The whole chunk of the container of `key`, which is `total_bytes` long; its tensors share one buffer.

    Each piece is verified right after it was read, while it still is in the processor's cache.

    Parameters
    ----------
    empty : where the buffer comes from.

    Raises
    ------
    ChunkCorruptError : anything about it is doubtful.
    """
    _expect(total_bytes >= _JSON_START, f"container of {total_bytes} bytes is shorter than a header")
    data = empty(total_bytes)
    view = _byte_view(data)
    filled = 0

    def fill(stop: int) -> None:
        nonlocal filled
        while filled < stop:
            piece = view[filled : filled + _PIECE_BYTES]
            read_at(piece, filled)
            filled += len(piece)

    def read_filled(buffer: memoryview, offset: int) -> None:
        fill(offset + len(buffer))
        buffer[:] = view[offset : offset + len(buffer)]

    header = read_header(read_filled, total_bytes, key)
    tensors = {}
    for name, stored in header.tensors.items():
        end, size = stored.offset, stored.section_bytes
        for section, checksum in enumerate(stored.checksums):
            begin, end = end, end + size
            if size <= _PIECE_BYTES:
                if filled < end:
                    fill(end)
                found = xxhash.xxh3_64_hexdigest(view[begin:end])
            else:
                digest = xxhash.xxh3_64()
                for start in range(begin, end, _PIECE_BYTES):
                    stop = min(start + _PIECE_BYTES, end)
                    fill(stop)
                    digest.update(view[start:stop])
                found = digest.hexdigest()
            if found != checksum:
                raise ChunkCorruptError(f"checksum of {name}, section {section}, is wrong")
        tensors[name] = data[stored.offset : end].view(stored.dtype).view(stored.shape)
    layered = frozenset(name for name, stored in header.tensors.items() if stored.layered)
    return EncodedChunk(header.codec, tensors, dict(header.meta), layered)


def read_header(read_at: ReadAt, total_bytes: int, key: ChunkKey) -> Header:
    """The verified header of the container of `key`, which is `total_bytes` long.

    Raises
    ------
    ChunkCorruptError : anything about it is doubtful.
    """
    _expect(total_bytes >= _JSON_START, f"container of {total_bytes} bytes is shorter than a header")
    head = bytearray(min(total_bytes, _FIRST_READ_BYTES))
    read_at(memoryview(head), 0)
    magic, version, header_bytes, stored_key, stored_bytes, checksum = _PREAMBLE.unpack_from(head)
    _expect(magic == _MAGIC, "magic bytes are wrong")
    _expect(version == FORMAT_VERSION, f"format version is {version}, this release reads {FORMAT_VERSION}")
    _expect(stored_key == key, f"container holds {stored_key.hex()}, asked for {key.hex()}")
    _expect(stored_bytes == total_bytes, f"container has {total_bytes} bytes, its header says {stored_bytes}")
    _expect(
        _JSON_START <= header_bytes <= min(total_bytes, MAX_HEADER_BYTES) and not header_bytes % _ALIGNMENT_BYTES,
        f"header of {header_bytes} bytes in a container of {total_bytes}",
    )
    if header_bytes > len(head):
        rest = bytearray(header_bytes - len(head))
        read_at(memoryview(rest), len(head))
        head += rest
    body_header = head[_PREAMBLE.size : header_bytes]
    _expect(xxhash.xxh3_64_intdigest(head[:_SEALED_BYTES] + body_header) == checksum, "checksum of the header is wrong")
    _expect(int.from_bytes(body_header[:8], "little") == header_bytes - _JSON_START, "length of the JSON is wrong")
    try:
        return _parse(bytes(head[:header_bytes]), total_bytes)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise ChunkCorruptError(f"header is not of this format: {exc!r}") from exc


def layer_ranges(header: Header, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges `[begin, end)` of the container that `read_layers` reads, without empty ones."""
    ranges = []
    for stored in header.tensors.values():
        sections, size = range(len(stored.checksums)), stored.section_bytes
        if stored.layered:
            sections = sections[start:stop]
        if size and len(sections):
            ranges.append((stored.offset + sections.start * size, stored.offset + sections.stop * size))
    return ranges


def read_layers(read_at: ReadAt, header: Header, start: int, stop: int, empty: Empty = _fresh) -> EncodedChunk:
    """Layers `[start, stop)` of a chunk as `EncodedChunk.layers` gives them; one read for each tensor.

    Parameters
    ----------
    empty : where their buffers come from.

    Raises
    ------
    ChunkCorruptError : the checksum of a section that was read is wrong.
    """
    tensors = {}
    for name, stored in header.tensors.items():
        sections = range(len(stored.checksums))
        if stored.layered:
            sections = sections[start:stop]
        size = stored.section_bytes
        data = empty(size * len(sections))
        view = _byte_view(data)
        if len(view):
            read_at(view, stored.offset + sections.start * size)
        for index, section in enumerate(sections):
            found = xxhash.xxh3_64_hexdigest(view[index * size : (index + 1) * size])
            _expect(found == stored.checksums[section], f"checksum of {name}, section {section}, is wrong")
        shape = (len(sections), *stored.shape[1:]) if stored.layered else stored.shape
        tensors[name] = data.view(stored.dtype).view(shape)
    layered = frozenset(name for name, stored in header.tensors.items() if stored.layered)
    return EncodedChunk(header.codec, tensors, {**header.meta, "first_layer": str(start)}, layered)


def _parse(raw: bytes, total_bytes: int) -> Header:
    header_bytes = len(raw)
    metadata, text = _split(raw[_JSON_START:])
    layout, names, end = _layout(text)
    codec, meta = metadata["codec"], json.loads(metadata["meta"])
    layered, checksums = json.loads(metadata["layered"]), json.loads(metadata["checksums"])
    _expect(isinstance(codec, str) and all(isinstance(text, str) for text in meta.values()), "meta is not text")
    _expect(set(names) == checksums.keys() >= set(layered), "tensors and checksums do not match")
    tensors = {}
    for name, stored in zip(names, layout, strict=True):
        is_layered, sums = name in layered, tuple(checksums[name])
        sections = stored.shape[0] if is_layered else 1
        _expect(len(sums) == sections, f"{name} has {len(sums)} checksums; expected {sections}")
        tensors[name] = StoredTensor(stored.dtype, stored.shape, is_layered, header_bytes + stored.offset, sums)
    _expect(header_bytes + end == total_bytes, f"tensors end at {header_bytes + end}, the container at {total_bytes}")
    return Header(codec, meta, tensors, raw)


def _split(text: bytes) -> tuple[dict[str, str], bytes]:
    """The metadata, and the JSON of the tensors."""
    metadata, comma, tensors = text.partition(b'},"')  # within strings, quotes are escaped
    if comma and metadata.startswith(_METADATA):
        found: dict[str, str] = json.loads(metadata[len(_METADATA) :] + b"}")
        return found, b'{"' + tensors.rstrip(b" ")
    fields = json.loads(text)
    found = fields.pop("__metadata__")
    return found, json.dumps(fields).encode()


@lru_cache(maxsize=256)
def _layout_text(tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    """The JSON of what is in the container, from the comma behind the metadata on."""
    fields, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"," + text[1:] if fields else text[1:]


def _layout(text: bytes) -> tuple[tuple[StoredTensor, ...], tuple[str, ...], int]:
    """As `_read_layout`; layouts that many chunks have in common are read once, and are short."""
    return _cached_layout(text) if len(text) <= _CACHED_LAYOUT_BYTES else _read_layout(text)


def _read_layout(text: bytes) -> tuple[tuple[StoredTensor, ...], tuple[str, ...], int]:
    """Tensors of a container, as far as the JSON of the tensors tells; their names, and the bytes of all.

    Chunks of one geometry share this text, and parsing it takes as long as copying a hundred kilobytes.
    """
    tensors, end, width = [], 0, 8
    fields = json.loads(text)
    for name, entry in fields.items():
        dtype, shape, (begin, stop) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
        _expect(all(type(n) is int and n >= 0 for n in (*shape, begin, stop)), f"numbers of {name} are wrong")
        _expect(len(shape) <= _MAX_DIMS and math.prod(max(n, 1) for n in shape) < 1 << 48, f"{name} is too large")
        _expect(begin == end and stop - begin == math.prod(shape) * dtype.itemsize, f"offsets of {name} are wrong")
        _expect(dtype.itemsize <= width, f"{name} is not in the order of dtypes")
        tensors.append(StoredTensor(dtype, shape, False, begin, ()))
        end, width = stop, dtype.itemsize
    return tuple(tensors), tuple(fields), end


_cached_layout = lru_cache(maxsize=256)(_read_layout)


def _raw_bytes(name: str, tensor: Tensor) -> memoryview:
    if name == "__metadata__" or tensor.dtype not in _DTYPE_NAMES or tensor.dim() > _MAX_DIMS:
        raise CodecError(f"tensor {name!r}, {tensor.dtype} {list(tensor.shape)}, cannot be stored")
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise CodecError(f"tensor {name!r} on {tensor.device} must be contiguous on the cpu")
    return _byte_view(tensor.detach().view(-1).view(torch.uint8))


def _byte_view(tensor: Tensor) -> memoryview:
    data: NDArray[np.uint8] = tensor.numpy()
    return data.data


def _section_count(name: str, blob: EncodedChunk) -> int:
    """How many checksums a tensor has: one for each layer, or one."""
    if name not in blob.layered:
        return 1
    if not blob.tensors[name].dim():
        raise CodecError(f"tensor {name!r} has no layers")
    return len(blob.tensors[name])


def _checksums(data: memoryview, sections: int, source: memoryview | None = None) -> list[str]:
    """Of sections of equal length; with a source, each is copied from there first."""
    size = len(data) // max(sections, 1)
    found = []
    for begin in range(0, sections * size, size) if size else [0] * sections:
        section = data[begin : begin + size]
        if source is not None:
            copy_bytes(section, source[begin : begin + size])
        found.append(xxhash.xxh3_64_hexdigest(section))
    return found


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ChunkCorruptError(message)
