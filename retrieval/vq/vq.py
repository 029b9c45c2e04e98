"""Vector quantised keys: a code of 12 bits for each token and KV head, compared by a table of scores (A2ATS)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import get_args

import torch
from torch import Tensor

from ...errors import CodecError, SpecMismatchError
from ..kernels.code_ops import code_counts, code_importance, pack_codes, packed_code_bytes, unpack_codes, vq_select
from ..selector import LayerShape, Pooling, Selection
from .codebook import Codebook


class VqIndex:
    """`Selector` that represents each key by the nearest centroid of a calibrated codebook.

    A2ATS (arXiv 2502.12665): far keys are scored as if all had the distance b (windowed RoPE), so codes are of keys
    before rotation and hold no position: they are valid wherever a chunk is placed. Attention over the chosen tokens
    has the exact rotation; the window, where distances matter most, is not indexed.

    Deviations: bands of distances instead of one b, with a table of scores for each. One choice for each KV head
    instead of the union over its query heads, so that a budget of 3 % is 3 %. Of tokens with equal scores (the same
    code and band), the latest are taken.

    Parameters
    ----------
    codebook : of this layer; one without `bands` compares rotated keys.
    start : first token of the context that it covers.
    pooling : see `pooled`.

    Raises
    ------
    SpecMismatchError : the codebook has other heads.
    """

    name = "vq"

    def __init__(self, shape: LayerShape, codebook: Codebook, *, start: int = 0, pooling: Pooling = "max") -> None:
        heads, _, dim = codebook.centroids.shape
        if (heads, dim) != (shape.kv_heads, shape.head_dim):
            raise SpecMismatchError(
                f"the codebook is of {heads} heads of {dim}; expected {shape.kv_heads} of {shape.head_dim}"
            )
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
        self.shape, self.start, self.codebook, self._pooling = shape, start, codebook, pooling
        self._tokens = 0
        self._packed = torch.empty(heads, 0, dtype=torch.uint8)  # with room at the end

    def __len__(self) -> int:
        return self._tokens

    @property
    def packed(self) -> Tensor:
        """Codes of all tokens, `[H, bytes]` uint8, by `pack_codes`; a view, valid until tokens are added."""
        return self._packed[:, : packed_code_bytes(self._tokens, self.codebook.code_bits)]

    @property
    def occupancy(self) -> Tensor:
        """Tokens of each centroid, `[H, C]` int64; empty and very large ones show that the codebook does not fit."""
        codes = self._codes(0, self._tokens)
        held = torch.zeros(codes.shape[0], len(self.codebook), dtype=torch.int64)
        return held.scatter_add_(1, codes, torch.ones_like(codes))

    @property
    def held_bytes(self) -> int:
        """Packed codes; codebooks are the model's, one for all sequences."""
        return self.packed.nbytes

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        positions = torch.arange(self.start + self._tokens, self.start + self._tokens + keys.shape[1])
        self._append(self.codebook.codes(self._unrotated(keys, positions)))

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        heads = self.shape.kv_heads
        if budget >= self._tokens:
            everything = torch.arange(self.start, self.start + self._tokens).expand(heads, -1).contiguous()
            return Selection(everything, 0)
        if not budget:
            return Selection(torch.empty(heads, 0, dtype=torch.int64), 0)
        table, band_starts = self.score_table(queries, position)
        bits, packed = self.codebook.code_bits, self._packed
        counts = code_counts(packed, self._tokens, table.shape[1], bits=bits, band_starts=band_starts)
        importance = code_importance(table, counts, pooling=self._pooling)
        ids = vq_select(importance, packed, self._tokens, counts, budget, bits=bits, band_starts=band_starts)
        return Selection(ids + self.start, self.codebook.centroids.nbytes + self.packed.nbytes)

    def export(self, first: int, stop: int) -> Mapping[str, Tensor]:
        """See `TravelsWithChunks`."""
        if not self.start <= first <= stop <= self.start + self._tokens:
            raise ValueError(
                f"tokens [{first}, {stop}) are not covered; expected some of "
                f"[{self.start}, {self.start + self._tokens})"
            )
        codes = self._codes(first - self.start, stop - self.start)
        return {
            "vq.codes": pack_codes(codes, self.codebook.code_bits),
            "vq.codebook": self.codebook.fingerprint.clone(),
        }

    def restore(self, parts: Mapping[str, Tensor], tokens: int) -> None:
        heads, count, _ = self.codebook.centroids.shape
        bits = self.codebook.code_bits
        packed, codebook = parts.get("vq.codes"), parts.get("vq.codebook")
        if packed is None or codebook is None or not torch.equal(codebook, self.codebook.fingerprint):
            raise CodecError(f"{sorted(parts)} are no codes of this codebook; index the keys anew")
        if packed.dtype != torch.uint8 or packed.shape != (heads, packed_code_bytes(tokens, bits)):
            raise CodecError(
                f"codes are {packed.dtype} {list(packed.shape)}; expected torch.uint8 "
                f"[{heads}, {packed_code_bytes(tokens, bits)}] for {tokens} tokens"
            )
        codes = unpack_codes(packed, bits, tokens)
        if codes.numel() and int(codes.max()) >= count:
            raise CodecError(f"a code is {int(codes.max())}; expected codes below {count}")
        self._append(codes)

    def _unrotated(self, keys: Tensor, positions: Tensor) -> Tensor:
        if self.shape.rope is None or self.codebook.bands is None:
            return keys.float()
        return self.shape.rope.shift(keys.float(), -positions)

    def score_table(self, queries: Tensor, position: int) -> tuple[Tensor, list[int]]:
        """Scaled scores `[Hq, B C]` of the codes of all bands with tokens, farthest first, and `band_starts`."""
        rope = self.shape.rope
        if rope is not None and self.codebook.bands is not None:
            queries = rope.shift(queries.float()[:, None], -position)[:, 0]
        ranges = self._tokens_of_bands(position)
        used = [band for band, (first, stop) in enumerate(ranges) if first < stop][::-1]
        tables = self.codebook.tables(queries, rope, used) * self.shape.scale
        return tables.transpose(0, 1).flatten(1), [ranges[band][0] for band in used[1:]]

    def _tokens_of_bands(self, position: int) -> list[tuple[int, int]]:
        """Indices `[first, stop)` of the tokens of each band, nearest first."""
        bands = () if self.shape.rope is None else self.codebook.bands or ()
        farther = [min(max(position - self.start - low + 1, 0), self._tokens) for low, _ in bands[1:]]
        return [(first, stop) for stop, first in pairwise([self._tokens, *farther, 0])]

    def _codes(self, first: int, stop: int) -> Tensor:
        bits = self.codebook.code_bits
        even = first - first % 2  # where a byte begins
        return unpack_codes(self._packed[:, packed_code_bytes(even, bits) :], bits, stop - even)[:, first - even :]

    def _append(self, codes: Tensor) -> None:
        bits, added = self.codebook.code_bits, codes.shape[1]
        if self._tokens % 2:  # the last code shares a byte with the first new one
            codes = torch.cat((self._codes(self._tokens - 1, self._tokens), codes), dim=1)
        first = packed_code_bytes(self._tokens - self._tokens % 2, bits)
        stop = packed_code_bytes(self._tokens + added, bits)
        if stop > self._packed.shape[1]:
            room = max(stop, 2 * self._packed.shape[1])
            self._packed = torch.nn.functional.pad(self._packed, (0, room - self._packed.shape[1]))
        self._packed[:, first:stop] = pack_codes(codes, bits)
        self._tokens += added
