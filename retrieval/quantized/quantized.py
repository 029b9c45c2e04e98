"""Keys of two bits a channel as an index: every token is scored by its own key, roughly."""

from __future__ import annotations

import torch
from torch import Tensor

from ..growable import GrowableTensor
from ..kernels.ops import landmark_scores, top_pooled
from ..kernels.quantized_ops import (
    GROUP_TOKENS,
    WORD_CODES,
    channel_mixing,
    dequantize_keys,
    quantize_keys,
    quantized_scores,
)
from ..selector import LayerShape, Pooling, Selection, top_ids


class QuantizedKeyIndex:
    """`Selector` of single tokens by their keys after rotation, in two bits a channel.

    After YAKV (arXiv 2604.08426), which finds that low-rank keys and means of neighbours miss tokens where many values
    are asked for, and that two bits of every key do not. Nothing is learned: a random orthonormal mixing makes all
    channels alike (as in QuIP, arXiv 2307.13304), the mean of 256 neighbours takes up what their keys have in common,
    and each token has a scale of its own (RaBitQ, arXiv 2405.12497). So no context is too different from another one,
    and distances are exact. An eighth of the bytes of keys in 16 bits is read to choose.

    Tokens lie in groups of 256 at multiples of 256 of the context. Those of the last group are kept as they are and
    scored exactly until it is full.

    Parameters
    ----------
    start : first token of the context that it covers.
    pooling : see `pooled`.
    device : where it lies, and its keys and queries.
    """

    name = "quantized"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        pooling: Pooling = "max",
        device: torch.device | None = None,
    ) -> None:
        if start < 0:
            raise ValueError(f"start is {start}; expected at least 0")
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

    def __len__(self) -> int:
        return self._tokens

    @property
    def held_bytes(self) -> int:
        return self._words.nbytes + self._scales.nbytes + self._means.nbytes + self._tail.nbytes

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        pending = torch.cat((self._tail, keys.float()), 1) if self._tail.shape[1] else keys.float()
        if not len(self._words):
            size = GROUP_TOKENS - (self.start - self._first)
            if pending.shape[1] >= size:
                self._quantize(pending[:, None, :size])
                pending = pending[:, size:]
        whole = pending.shape[1] // GROUP_TOKENS * GROUP_TOKENS if len(self._words) else 0
        if whole:
            self._quantize(pending[:, :whole].unflatten(1, (-1, GROUP_TOKENS)))
        self._tail = pending[:, whole:].clone()
        self._tokens += keys.shape[1]

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        heads, tokens = self.shape.kv_heads, len(self)
        if budget >= tokens or not budget:
            return Selection(top_ids(torch.empty(heads, tokens), budget, self.start), 0)
        scores, first = self.scores(queries)
        ids = top_pooled(scores, heads, budget, pooling=self._pooling)
        return Selection(ids + first, self.held_bytes, heads * self._tail.shape[1])

    @property
    def approximate_keys(self) -> Tensor:
        """The keys that its scores are of, `[H, T, D]` float32."""
        first = self.start - self._first
        read = dequantize_keys(self._words.all, self._scales.all, self._means.all).flatten(1, 2)[:, first:] @ self._mix
        return torch.cat((read, self._tail), 1)

    def scores(self, queries: Tensor) -> tuple[Tensor, int]:
        """Scaled scores `[Hq, N]` of the tokens from a position on, and that position; -inf before `start`."""
        wide, scale = queries.float(), self.shape.scale
        if not len(self._words):
            return landmark_scores(wide, self._tail, scale=scale), self.start
        found = quantized_scores(wide @ self._mix.T, self._words.all, self._scales.all, self._means.all, scale=scale)
        found[:, : self.start - self._first] = -torch.inf
        if self._tail.shape[1]:
            found = torch.cat((found, landmark_scores(wide, self._tail, scale=scale)), 1)
        return found, self._first

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
