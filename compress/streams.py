"""Byte streams of unequal length as tensors that can still be read layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..core import EncodedChunk
from ..errors import CodecError
from .envelope import expect_tensor

STREAM_NAMES = frozenset({"streams.rows", "streams.sizes", "streams.spill_at", "streams.spill"})
STREAM_LAYERED = STREAM_NAMES - {"streams.spill"}

_SHORT_LAYERS = 16  # one layer in so many may be shorter than its row


def pack_streams(streams: Sequence[Sequence[bytes]]) -> dict[str, Tensor]:
    """The streams of each layer, joined to a row of the same width for all layers; what exceeds a row is in the spill.

    Rows are as wide as the shortest layer, or from 16 layers on as the shortest after one in 16 is left out, so that
    a few layers that shrink well (the first ones) do not drive all others into the spill. So there is no padding below
    16 layers, and well under 1/16 elsewhere. A reader of some layers reads their rows and the whole spill: a few
    percent if layers shrink about equally, a third for six layers one of which shrinks twice as well as the others.

    Parameters
    ----------
    streams : equally many for each layer.

    Returns
    -------
    streams.rows : `[L, W]` uint8.
    streams.sizes : `[L, P]` int64, bytes of each stream of a layer.
    streams.spill_at : `[L]` int64, where in the spill the layer goes on.
    streams.spill : `[S]` uint8, not layered.
    """
    joined = [b"".join(layer) for layer in streams]
    sizes = torch.tensor([[len(stream) for stream in layer] for layer in streams], dtype=torch.int64)
    width = _row_bytes([len(layer) for layer in joined])
    rows = np.zeros((len(joined), width), np.uint8)
    for row, layer in zip(rows, joined, strict=True):
        part = np.frombuffer(layer[:width], np.uint8)
        row[: len(part)] = part
    rests = [layer[width:] for layer in joined]
    starts = np.cumsum([0, *map(len, rests)])[:-1]
    return {
        "streams.rows": torch.from_numpy(rows),
        "streams.sizes": sizes.reshape(len(joined), len(streams[0]) if streams else 0),
        "streams.spill_at": torch.from_numpy(starts.astype(np.int64)),
        "streams.spill": torch.from_numpy(np.frombuffer(b"".join(rests), np.uint8).copy()),
    }


def unpack_streams(blob: EncodedChunk, num_layers: int, count: int) -> list[list[memoryview]]:
    """The `count` streams of each of the `num_layers` layers that the blob holds.

    Raises
    ------
    CodecError : the tensors contradict one another.
    """
    if not blob.layered >= STREAM_LAYERED:
        raise CodecError(
            f"{blob.codec} chunk has layered tensors {sorted(blob.layered)}; expected {sorted(STREAM_LAYERED)}"
        )
    sizes = expect_tensor(blob, "streams.sizes", torch.int64, (num_layers, count)).tolist()
    starts = expect_tensor(blob, "streams.spill_at", torch.int64, (num_layers,)).tolist()
    rows, spill = blob.tensors["streams.rows"], blob.tensors["streams.spill"]
    expect_tensor(blob, "streams.rows", torch.uint8, (num_layers, rows.shape[-1]))
    expect_tensor(blob, "streams.spill", torch.uint8, (spill.numel(),))
    rest, width, found = spill.numpy().data, rows.shape[-1], []
    for row, layer, start in zip(rows.numpy(), sizes, starts, strict=True):
        beyond = max(0, sum(layer) - width)
        if min(layer, default=0) < 0 or not 0 <= start <= start + beyond <= len(rest):
            raise CodecError(
                f"{blob.codec} chunk: streams of {layer} bytes in a row of {width} and from {start} of the spill's "
                f"{len(rest)}"
            )
        joined = row.data if not beyond else memoryview(bytes(row) + rest[start : start + beyond])
        ends = np.cumsum([0, *layer]).tolist()
        found.append([joined[a:b] for a, b in pairwise(ends)])
    return found


def _row_bytes(lengths: Sequence[int]) -> int:
    return sorted(lengths)[len(lengths) // _SHORT_LAYERS] if lengths else 0
