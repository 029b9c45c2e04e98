"""Outliers of a token in a fixed number of slots: which channel, and its value.

A fixed number makes the rows of all tokens equally long, so that the outliers of any token are found without a search;
rows of varying length (CSR) would need a table and could not be appended to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.ops import pack_bits, packed_bytes, unpack_bits

MAX_CHANNELS = 1 << 16
_ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001 in floating point, and seven slots


def slot_count(outlier_ratio: float, channels: int) -> int:
    """Slots a token: `ceil(outlier_ratio * channels)`, at most one for each channel."""
    return min(channels, math.ceil(outlier_ratio * channels - _ROUNDING))


def slot_bytes(slots: int, channels: int) -> int:
    """Bytes a token that `pack_channels` makes."""
    high = high_bits(channels)
    return slots + (packed_bytes(slots, high) if high else 0)


def pack_channels(indices: Tensor, channels: int) -> Tensor:
    """Channel numbers as bytes: the low 8 bits of each, then what is above them, packed (`pack_bits`).

    So 1,024 channels cost 10 bits a slot, and up to 256 channels 8.

    Parameters
    ----------
    indices : `[..., k]` int64, each below `channels`.
    channels : how many there are, at most `MAX_CHANNELS`.

    Returns
    -------
    `[..., slot_bytes(k, channels)]` uint8.
    """
    low, high = (indices & 0xFF).to(torch.uint8), high_bits(channels)
    if not high:
        return low
    return torch.cat([low, pack_bits((indices >> 8).to(torch.uint8), high)], -1)


def unpack_channels(packed: Tensor, slots: int, channels: int) -> Tensor:
    """The inverse of `pack_channels`: `[..., slots]` int32. They are below `channels` only if they were before.

    Raises
    ------
    ValueError : the last dimension is not what `slots` numbers take.
    """
    if packed.shape[-1] != slot_bytes(slots, channels):
        raise ValueError(f"{packed.shape[-1]} bytes; {slots} slots among {channels} channels take other than that")
    low, high = packed[..., :slots].to(torch.int32), high_bits(channels)
    if not high:
        return low
    return low | unpack_bits(packed[..., slots:], high, slots).to(torch.int32) << 8


def high_bits(channels: int) -> int:
    """Bits of a channel number above its low 8."""
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels a token; outlier slots number at most {MAX_CHANNELS}")
    return max(0, (channels - 1).bit_length() - 8) if channels else 0
