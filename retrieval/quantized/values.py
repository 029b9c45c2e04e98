"""Values of one bit a channel: what stands for those of tokens that are not chosen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention import PartialAttention
from ..growable import GrowableTensor
from ..kernels.quantized_ops import GROUP_TOKENS, attend_to_rest, channel_mixing, dequantize_values, quantize_values


@dataclass(frozen=True, slots=True, eq=False)
class _Coded:
    """Groups of values, see `quantize_values`, and those behind the last whole one, as they are."""

    words: Tensor
    scales: Tensor
    means: Tensor
    behind: Tensor


class QuantizedValues:
    """Values in one bit a channel behind an orthonormal mixing, the mean of 256 neighbours taken off (RaBitQ, arXiv
    2405.12497, with the scale of the least squared error: sums over many tokens need no exact products).

    Those of the last, incomplete group are quantised anew whenever there are more of them.

    Parameters
    ----------
    lead : places before the first value in its group.
    """

    def __init__(self, lead: int) -> None:
        self._lead = lead
        self._words, self._scales, self._means = GrowableTensor(1), GrowableTensor(1), GrowableTensor(1)
        self._tail = self._read = torch.empty(0)  # those of the incomplete group, and what stands for them, mixed

    @property
    def held_bytes(self) -> int:
        """Bytes that a sum reads."""
        return sum(part.nbytes for part in (self._words, self._scales, self._means, self._read))

    @property
    def approximate(self) -> Tensor:
        """What stands for the values, `[H, T, Dv]` float32."""
        read = dequantize_values(self._words.all, self._scales.all, self._means.all).flatten(1, 2)
        skipped = self._lead if len(self._words) else 0
        return torch.cat((read[:, skipped:], self._read), 1) @ self._mix(self._read)

    def coded(self, values: Tensor, whole: int) -> _Coded:
        """The next values `[H, T, Dv]` behind those before, of which `whole` complete groups; changes nothing.

        Raises
        ------
        ValueError : they are not finite, or leave the range of float16.
        """
        pending = torch.cat((self._tail, values.float()), 1) if self._tail.numel() else values.float()
        lead = 0 if len(self._words) else self._lead
        first = min(whole, GROUP_TOKENS - lead)
        groups = [self._group(pending[:, None, :first])]
        if whole > first:
            groups.append(self._group(pending[:, first:whole].unflatten(1, (-1, GROUP_TOKENS))))
        count = None if whole else 0
        words, scales, means = (torch.cat(parts, 1)[:, :count] for parts in zip(*groups, strict=True))
        if not bool(means.isfinite().all()) or not bool(values.sum(dtype=torch.float32).isfinite()):
            raise ValueError("mean values leave the range of float16; the context they come from cannot be searched")
        return _Coded(words, scales, means, pending[:, whole:].clone())

    def add(self, coded: _Coded) -> None:
        self._words.add(coded.words)
        self._scales.add(coded.scales)
        self._means.add(coded.means)
        self._tail = coded.behind
        first = GROUP_TOKENS - self._tail.shape[1]
        self._read = dequantize_values(*self._group(self._tail[:, None]))[:, 0, first:]

    def attend(self, scores: Tensor, parts: Tensor, ids: Tensor) -> PartialAttention:
        """Attention over all tokens but the columns `ids`, by scores from the first group on; see `attend_to_rest`."""
        coded = (self._words.all, self._scales.all, self._means.all)
        begin = GROUP_TOKENS * len(self._words) or self._lead
        out, lse = attend_to_rest(scores, parts, ids, *coded, self._read, begin=begin)
        return out @ self._mix(out), lse

    def _group(self, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Words, scales and means of groups `[H, n, size, Dv]`; slots that are missing come first, and are the mean."""
        mixed = values @ self._mix(values).T
        means = (mixed.sum(2) / max(1, mixed.shape[2])).half()
        missing = GROUP_TOKENS - values.shape[2]
        if missing:
            mixed = torch.cat((means.float()[:, :, None].expand(-1, -1, missing, -1), mixed), 2)
        return *quantize_values(mixed, means.float()), means

    @staticmethod
    def _mix(like: Tensor) -> Tensor:
        return channel_mixing(like.shape[-1]).to(like.device)
