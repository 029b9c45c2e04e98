"""Keys of two bits a channel as an index: every token is scored by its own key, roughly."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..attention import PartialAttention
from ..growable import GrowableTensor
from ..kernels.ops import landmark_scores, top_pooled
from ..kernels.quantized_ops import (
    GROUP_TOKENS,
    WORD_CODES,
    channel_mixing,
    dequantize_keys,
    parts_of,
    quantize_keys,
    scores_and_parts,
)
from ..selector import LayerShape, Pooling, Selection, top_ids
from .values import QuantizedValues

VALUE_BITS = 1  # of a channel


class QuantizedKeyIndex:
    """`Selector` of single tokens by their keys after rotation, in two bits a channel.

    After YAKV (arXiv 2604.08426), which finds that low-rank keys and means of neighbours miss tokens where many values
    are asked for, and that two bits of every key do not. Nothing is learned: a random orthonormal mixing makes all
    channels alike (as in QuIP, arXiv 2307.13304), the mean of 256 neighbours takes up what their keys have in common,
    and each token has a scale of its own (RaBitQ, arXiv 2405.12497). So no context is too different from another one,
    and distances are exact. An eighth of the bytes of keys in 16 bits is read to choose.

    Tokens lie in groups of 256 at multiples of 256 of the context. Those of the last group are kept as they are and
    scored exactly until it is full.

    Every token has a score, so what is not chosen is known by its weight. It is attended to, too, by values of one bit
    a channel (RetroInfer, arXiv 2505.02922, estimates clusters by their mean keys and values, and some of them only). A
    head that attends to many tokens alike loses little that way, and no head takes few tokens for all.

    Parameters
    ----------
    start : first token of the context that it covers.
    value_bits : of each channel of a value, 1; 0 for no estimate of the rest.
    pooling : see `pooled`.
    device : where it lies, and its keys and queries.
    """

    name = "quantized"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        value_bits: int = VALUE_BITS,
        pooling: Pooling = "max",
        device: torch.device | None = None,
    ) -> None:
        if start < 0:
            raise ValueError(f"start is {start}; expected at least 0")
        if value_bits not in (0, 1):
            raise ValueError(f"value_bits is {value_bits}; expected 0 or 1")
        self.shape, self.start, self._pooling = shape, start, pooling
        self._mix = channel_mixing(shape.head_dim).to(device)
        self._first = start // GROUP_TOKENS * GROUP_TOKENS  # position of the first slot of the first group
        words, heads = -(-shape.head_dim // WORD_CODES), shape.kv_heads
        self._words, self._scales, self._means = GrowableTensor(1), GrowableTensor(1), GrowableTensor(1)
        self._words.add(torch.empty(heads, 0, words, GROUP_TOKENS, dtype=torch.int32, device=device))
        self._scales.add(torch.empty(heads, 0, GROUP_TOKENS, dtype=torch.float16, device=device))
        self._means.add(torch.empty(heads, 0, shape.head_dim, dtype=torch.float16, device=device))
        self._tail = torch.empty(heads, 0, shape.head_dim, device=device)  # keys as they are, float32
        self._tokens = 0
        self._values = QuantizedValues(start - self._first) if value_bits else None

    def __len__(self) -> int:
        return self._tokens

    @property
    def held_bytes(self) -> int:
        of_keys = self._words.nbytes + self._scales.nbytes + self._means.nbytes + self._tail.nbytes
        return of_keys + (0 if self._values is None else self._values.held_bytes)

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        pending = torch.cat((self._tail, keys.float()), 1) if self._tail.shape[1] else keys.float()
        lead = 0 if len(self._words) else self.start - self._first  # places before the first of them in their group
        whole = max(0, (lead + pending.shape[1]) // GROUP_TOKENS * GROUP_TOKENS - lead)
        of_values = None if self._values is None else self._values.coded(values, whole)
        if whole:
            first = GROUP_TOKENS - lead
            self._quantize(pending[:, None, :first])
            if whole > first:
                self._quantize(pending[:, first:whole].unflatten(1, (-1, GROUP_TOKENS)))
        self._tail = pending[:, whole:].clone()
        if of_values is not None and self._values is not None:
            self._values.add(of_values)
        self._tokens += keys.shape[1]

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        return self.select_beside(queries, position, budget, None)

    def select_beside(self, queries: Tensor, position: int, budget: int, near: Tensor | None) -> Selection:
        self.shape.check_query(queries, budget)
        heads, tokens = self.shape.kv_heads, len(self)
        if budget >= tokens or not budget:
            return Selection(top_ids(torch.empty(heads, tokens), budget, self.start), 0)
        scores, parts = self._scored(queries)
        columns = top_pooled(scores, heads, budget, pooling=self._pooling, near=near, parts=parts)
        rest = None if self._values is None else partial(self._rest, self._values, scores, parts)
        return Selection(columns + self._first, self.held_bytes, heads * self._tail.shape[1], rest)

    @property
    def approximate_keys(self) -> Tensor:
        """The keys that its scores are of, `[H, T, D]` float32."""
        first = self.start - self._first
        read = dequantize_keys(self._words.all, self._scales.all, self._means.all).flatten(1, 2)[:, first:] @ self._mix
        return torch.cat((read, self._tail), 1)

    @property
    def approximate_values(self) -> Tensor:
        """What stands for the values of tokens that are not chosen, `[H, T, Dv]` float32.

        Raises
        ------
        ValueError : there is no estimate of the rest.
        """
        if self._values is None:
            raise ValueError("value_bits is 0; expected 1: nothing stands for what is not chosen")
        return self._values.approximate

    def scores(self, queries: Tensor) -> tuple[Tensor, int]:
        """Scaled scores `[Hq, N]` of the tokens from a position on, and that position; -inf before `start`."""
        return self._scored(queries)[0][:, : self.start - self._first + self._tokens], self._first

    def _scored(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Scores from `_first` on, filled up to whole groups with -inf, and their parts, see `scores_and_parts`."""
        wide, scale = queries.float(), self.shape.scale
        whole, tail = len(self._words), self._tail.shape[1]
        lead = self.start - self._first  # columns before the first token
        padding = 0 if not tail else GROUP_TOKENS if whole else -(-(lead + tail) // GROUP_TOKENS) * GROUP_TOKENS
        stored = (self._words.all, self._scales.all, self._means.all)
        skip = lead if whole else 0
        scores, parts = scores_and_parts(wide @ self._mix.T, *stored, scale=scale, skip=skip, padding=padding)
        if tail:
            behind = whole * GROUP_TOKENS
            last = scores[:, behind:]
            last.fill_(-torch.inf)
            begin = 0 if whole else lead
            last[:, begin : begin + tail] = landmark_scores(wide, self._tail, scale=scale)
            size = scores.shape[1] // parts.shape[2]  # tokens of a part, by the kernel
            parts[:, :, behind // size :] = parts_of(last, size)
        return scores, parts

    def _rest(self, values: QuantizedValues, scores: Tensor, parts: Tensor, ids: Tensor) -> PartialAttention:
        """Attention over all tokens but `ids` by their scores from `_first` on, and approximate values."""
        return values.attend(scores, parts, torch.where(ids < 0, -1, ids - self._first))

    def _quantize(self, keys: Tensor) -> None:
        """Adds groups `[H, n, size, D]`; of the first group, the slots before `start` are made of its mean."""
        mixed = keys @ self._mix.T
        means = mixed.mean(2).half()
        if not bool(means.isfinite().all()):
            raise ValueError("mean keys leave the range of float16; the context they come from cannot be searched")
        missing = GROUP_TOKENS - keys.shape[2]
        if missing:
            mixed = torch.cat((means.float()[:, :, None].expand(-1, -1, missing, -1), mixed), 2)
        words, scales = quantize_keys(mixed, means.float())
        self._words.add(words)
        self._scales.add(scales)
        self._means.add(means)
