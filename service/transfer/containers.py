"""Containers on their way between clients and the store: whole, in parts, verified, and held once."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import xxhash
from torch import Tensor

from ...core import ChunkKey, EncodedChunk
from ...errors import ChunkCorruptError
from ...kvstore.format import read_container, to_buffers

MEDIA_TYPE = "application/vnd.kvloom.chunk"
PIECE_BYTES = 1 << 18
MAX_HEADER_BYTES = 1 << 20  # 64 times that of a chunk of 32 layers: what parsing a forged one costs is bounded
_CACHED_HEADERS = 4096


@dataclass(frozen=True, slots=True)
class Container:
    """The bytes of a chunk as its buffers, in order; the first is the header."""

    buffers: tuple[memoryview, ...]
    total_bytes: int
    etag: str

    def parts(self, start: int, stop: int) -> list[memoryview]:
        """Bytes `[start, stop)`, from one buffer after the other, none copied."""
        found, begin = [], 0
        for buffer in self.buffers:
            found.append(buffer[max(start - begin, 0) : max(stop - begin, 0)])
            begin += len(buffer)
        return [part for part in found if len(part)]

    def pieces(self, start: int, stop: int) -> list[memoryview]:
        """As `parts`, in pieces of at most `PIECE_BYTES`."""
        return [
            part[at : at + PIECE_BYTES] for part in self.parts(start, stop) for at in range(0, len(part), PIECE_BYTES)
        ]


class IncomingContainer:
    """A container that arrives piece by piece, in memory that was used before.

    Parameters
    ----------
    memory : where `[nbytes]` uint8 come from; they go back when the last tensor of the chunk is gone.
    total_bytes : of the whole container.
    """

    def __init__(self, memory: Callable[[int], Tensor], total_bytes: int) -> None:
        self._data: Tensor = memory(total_bytes)
        self.view: memoryview = self._data.numpy().data
        self.filled_bytes = 0

    def append(self, piece: bytes | memoryview) -> None:
        """Raises `ValueError` if more arrives than was announced."""
        stop = self.filled_bytes + len(piece)
        if stop > len(self.view):
            raise ValueError(f"the body is longer than the {len(self.view)} bytes that were announced")
        self.view[self.filled_bytes : stop] = piece
        self.filled_bytes = stop

    def chunk(self, key: ChunkKey) -> tuple[EncodedChunk, memoryview]:
        """The verified chunk, whose tensors are the received bytes themselves, and its header.

        Raises
        ------
        ChunkCorruptError : it is not the whole, undamaged container of `key`.
        """

        def in_place(_: memoryview, offset: int) -> None:
            """The bytes are there already."""

        header_bytes = int.from_bytes(self.view[12:16], "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise ChunkCorruptError(f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are taken")
        blob = read_container(in_place, self.filled_bytes, key, lambda _: self._data)
        return blob, self.view[:header_bytes]


def etag_of(header: memoryview) -> str:
    """An entity tag that stands for the whole chunk: the header holds the checksum of every section."""
    return f'"{xxhash.xxh3_128_hexdigest(header)}"'


class ContainerCache:
    """Headers of chunks in memory, so that a chunk that is read again is not summed again.

    A header counts only for the very tensors that it was made of. Every method may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._headers: OrderedDict[ChunkKey, tuple[weakref.ref[Tensor], memoryview, str]] = OrderedDict()

    def note(self, key: ChunkKey, blob: EncodedChunk, header: memoryview) -> str:
        """Remembers the header of a chunk under its client's key, and returns its entity tag."""
        etag = etag_of(header)
        first = next(iter(blob.tensors.values()), None)
        if first is not None:
            with self._lock:
                self._headers[key] = weakref.ref(first), memoryview(bytes(header)), etag
                self._headers.move_to_end(key)
                if len(self._headers) > _CACHED_HEADERS:
                    self._headers.popitem(last=False)
        return etag

    def known(self, key: ChunkKey, blob: EncodedChunk) -> Container | None:
        """The container of a chunk of the store whose header is known; reads no byte of it.

        Parameters
        ----------
        key : of the store.
        """
        with self._lock:
            known = self._headers.get(key)
        first = next(iter(blob.tensors.values()), None)
        if known is None or first is None or known[0]() is not first:
            return None
        _, header, etag = known
        names = sorted(blob.tensors, key=lambda name: (-blob.tensors[name].dtype.itemsize, name))
        buffers = (header, *(_bytes_of(blob.tensors[name]) for name in names))
        return Container(buffers, sum(map(len, buffers)), etag)

    def container(self, key: ChunkKey, client_key: ChunkKey, blob: EncodedChunk) -> Container:
        """The container of a chunk of the store, under its client's key; sums what is not known.

        Parameters
        ----------
        key : of the store.
        """
        known = self.known(key, blob)
        if known is not None:
            return known
        buffers = tuple(to_buffers(client_key, blob))
        return Container(buffers, sum(map(len, buffers)), self.note(key, blob, buffers[0]))


def layers_container(client_key: ChunkKey, blob: EncodedChunk, start: int, stop: int) -> Container:
    """The container of layers `[start, stop)` alone."""
    return of_buffers(to_buffers(client_key, blob.layers(start, stop)))


def of_buffers(buffers: Sequence[memoryview]) -> Container:
    return Container(tuple(buffers), sum(map(len, buffers)), etag_of(buffers[0]))


def num_layers(blob: EncodedChunk) -> int:
    """Layers that the chunk can be read by; 0 if it has no layered tensor."""
    return min((len(blob.tensors[name]) for name in blob.layered), default=0)


def _bytes_of(tensor: Tensor) -> memoryview:
    view: memoryview = tensor.detach().view(-1).view(torch.uint8).numpy().data
    return view
