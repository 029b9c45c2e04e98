"""A fixed number k of outliers a token: their channels and their values.

A fixed number makes the rows of all tokens equally long, so that the outliers of any token are found without a search;
rows of varying length (CSR) would need a table and could not be appended to.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.ops import pack_bits, packed_bytes, unpack_bits

MAX_CHANNELS = 1 << 16
_ROUNDING = 1e-9  # 0.07 * 100 is 7.000000000000001 in floating point, and seven outliers


def outliers_per_token(outlier_ratio: float, channels: int) -> int:
    """k, the outliers of a token: `ceil(outlier_ratio * channels)`, at most one for each channel."""
    return min(channels, math.ceil(outlier_ratio * channels - _ROUNDING))


def channel_bytes(k: int, channels: int) -> int:
    """Bytes that `pack_channels` makes of a token's k channel numbers."""
    high = high_bits(channels)
    return k + (packed_bytes(k, high) if high else 0)


def pack_channels(indices: Tensor, channels: int) -> Tensor:
    """Channel numbers as bytes: the low 8 bits of each, then what is above them, packed (`pack_bits`).

    So a number takes 10 bits among 1,024 channels, and 8 bits among up to 256.

    Parameters
    ----------
    indices : `[..., k]` int64, each below `channels`.
    channels : how many there are, at most `MAX_CHANNELS`.

    Returns
    -------
    `[..., channel_bytes(k, channels)]` uint8.
    """
    low, high = (indices & 0xFF).to(torch.uint8), high_bits(channels)
    if not high:
        return low
    return torch.cat([low, pack_bits((indices >> 8).to(torch.uint8), high)], -1)


def unpack_channels(packed: Tensor, k: int, channels: int) -> Tensor:
    """The inverse of `pack_channels`: `[..., k]` int32. Damaged bytes may give numbers that are not below `channels`.

    Raises
    ------
    ValueError : the last dimension is not what k numbers take.
    """
    if packed.shape[-1] != channel_bytes(k, channels):
        needed = channel_bytes(k, channels)
        raise ValueError(f"{packed.shape[-1]} bytes; {k} outliers among {channels} channels take {needed}")
    low, high = packed[..., :k].to(torch.int32), high_bits(channels)
    if not high:
        return low
    return low | unpack_bits(packed[..., k:], high, k).to(torch.int32) << 8


def high_bits(channels: int) -> int:
    """Bits of a channel number above its low 8."""
    if channels > MAX_CHANNELS:
        raise ValueError(f"{channels} channels a token; outliers can be numbered in at most {MAX_CHANNELS}")
    return max(0, (channels - 1).bit_length() - 8) if channels else 0
