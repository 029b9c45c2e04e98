"""ShadowKV's low-rank keys as an index of single tokens: the factor that rebuilds keys also ranks them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...core import rotate_pairs
from ..growable import GrowableTensor
from ..selector import LayerShape, Pooling, Selection, pooled, top_ids
from .key_factor import KeyFactor

_PIECE_BLOCKS = 64  # scored at once


class FactorIndex:
    """`Selector` of single tokens by their rows of a `KeyFactor`, which it builds from the keys.

    With the query a fixed distance b from all keys (windowed RoPE, A2ATS, arXiv 2502.12665, 3.2), the score of a token
    is `(q R_b B_h^T) . a_t`: one projection of the query, then a product with each row, which all heads share. No keys,
    no landmarks, no storage beside the rows.

    Deviation: distances are exact to half a block of `block_tokens` tokens, unless `offset_tokens` is given. The query
    is rotated to the distance of each block's middle and projected once a block; each channel pair is multiplied by its
    mean rotation within the block, which damps fast pairs. On the reference model this chooses far better than any
    fixed distance.

    Until `build` the keys are kept and searched exactly. Tokens added afterwards are projected onto the basis; tokens
    that it cannot represent are kept exact.

    Parameters
    ----------
    start : first token of the context that it covers.
    rank : columns of the factor, r in the paper; None for 160 of 1024 channels, the paper's share.
    row_bits : 16, 8 or 4; see `KeyFactor`.
    block_tokens : tokens that share a distance.
    offset_tokens : b; the same distance for all tokens, within what the model was trained on. None for blocks.
    pooling : see `pooled`.
    """

    name = "factor"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        rank: int | None = None,
        row_bits: int = 16,
        max_residual: float = 0.5,
        block_tokens: int = 64,
        offset_tokens: int | None = None,
        pooling: Pooling = "max",
    ) -> None:
        channels = shape.kv_heads * shape.head_dim
        rank = max(1, round(channels * 160 / 1024)) if rank is None else rank
        if rank < 1 or block_tokens < 1 or start < 0:
            raise ValueError(
                f"rank is {rank}, block_tokens {block_tokens}, start {start}; expected at least 1, 1 and 0"
            )
        if row_bits not in (16, 8, 4):
            raise ValueError(f"row_bits is {row_bits}; expected 16, 8 or 4")
        self.shape, self.start, self.rank, self.row_bits, self.max_residual = shape, start, rank, row_bits, max_residual
        self._block_tokens, self._offset_tokens, self._pooling = block_tokens, offset_tokens, pooling
        # Replaced as a whole, because `build` may run while another thread selects
        self._held: GrowableTensor | KeyFactor = GrowableTensor(1)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def factor(self) -> KeyFactor | None:
        """None before `build`."""
        return self._held if isinstance(self._held, KeyFactor) else None

    @property
    def held_bytes(self) -> int:
        return self.factor.held_bytes if self.factor else 0

    @property
    def token_bytes(self) -> int:
        """See `KeySource`."""
        if self.factor is None:
            return self.shape.head_dim * 4
        return self.factor.rows_bytes // max(1, len(self.factor))

    def add(self, keys: Tensor, values: Tensor | None = None) -> None:
        self.shape.check_keys(keys)
        self._held.add(keys)

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """See `LearnsFromQueries`; does nothing, since the basis depends on the keys alone."""

    def build(self) -> None:
        """Builds the factor of the keys, unless there is one already or no token yet."""
        held = self._held
        if isinstance(held, GrowableTensor) and len(held):
            self._held = KeyFactor.fit(
                self.shape,
                held.all,
                rank=self.rank,
                start=self.start,
                row_bits=self.row_bits,
                max_residual=self.max_residual,
            )

    def keys_at(self, ids: Tensor) -> Tensor:
        """Keys of positions `[H, K]`, `[H, K, D]` float32; see `KeyFactor.keys_at`."""
        held = self._held
        if isinstance(held, KeyFactor):
            return held.keys_at(ids)
        places = (ids - self.start).clamp(min=0)[..., None].expand(-1, -1, self.shape.head_dim)
        return held.all.gather(1, places).float()

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        held = self._held
        if budget >= len(held):
            return Selection(top_ids(torch.empty(self.shape.kv_heads, len(held)), budget, self.start), 0)
        if isinstance(held, KeyFactor):
            scores = self.scores_by(held, queries, position)
            read = held.rows_bytes + held.basis.nbytes + held.exact_bytes
            compared = held.exact_keys.shape[0] * held.exact_keys.shape[1]
        else:
            scores = _products(queries, held.all)
            read, compared = held.nbytes, held.all.shape[0] * held.all.shape[1]
        ids = top_ids(pooled(scores * self.shape.scale, self.shape, self._pooling), budget, self.start)
        return Selection(ids, read, compared)

    def state(self) -> Mapping[str, Tensor]:
        """See `KeepsState`. Raises `ValueError` before `build`."""
        if self.factor is None:
            raise ValueError("there is no factor yet; call build first")
        return self.factor.state()

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """See `KeepsState`."""
        self._held = KeyFactor.from_state(self.shape, parts, start=self.start, max_residual=self.max_residual)
        self.rank, self.row_bits = self._held.rank, self._held.row_bits

    def scores_by(self, factor: KeyFactor, queries: Tensor, position: int) -> Tensor:
        """`[Hq, T]` float32, without the scale."""
        heads, group, size = self.shape.kv_heads, self.shape.group, self._block_tokens
        rope, basis, tokens = self.shape.rope, factor.by_head().float(), len(factor)
        plain = queries.float() if rope is None else rope.shift(queries.float()[:, None], -position)[:, 0]
        scores = torch.empty(self.shape.query_heads, tokens)
        for first in range(0, tokens, _PIECE_BLOCKS * size):
            stop = min(tokens, first + _PIECE_BLOCKS * size)
            rows = factor.rows(first, stop)
            blocks = -(-(stop - first) // size)
            rotated = plain[:, None] if rope is None else self._rotated(plain, position, first, blocks)
            projected = (rotated.reshape(heads, -1, self.shape.head_dim) @ basis.mT).view(
                heads * group, -1, factor.rank
            )
            if projected.shape[1] == 1:
                scores[:, first:stop] = projected[:, 0] @ rows.T
                continue
            padded = torch.nn.functional.pad(rows, (0, 0, 0, blocks * size - len(rows))).view(blocks, size, -1)
            found = (projected.transpose(0, 1) @ padded.mT).transpose(0, 1).flatten(1)
            scores[:, first:stop] = found[:, : stop - first]
        exact = factor.exact_keys
        if exact.shape[1]:
            scores[:, factor.exact_tokens - self.start] = _products(queries, exact)
        return scores

    def _rotated(self, plain: Tensor, position: int, first: int, blocks: int) -> Tensor:
        """Queries `[Hq, D]` rotated to their distances from blocks of tokens: `[Hq, blocks, D]`, or 1 for all."""
        rope = self.shape.rope
        if rope is None:
            return plain[:, None]
        if self._offset_tokens is not None:
            return rope.shift(plain[:, None], self._offset_tokens)
        size = self._block_tokens
        middles = self.start + first + (size - 1) / 2 + size * torch.arange(blocks, dtype=torch.float64)
        frequencies = torch.tensor(rope.inv_freq, dtype=torch.float64)
        half_sines = torch.sin(frequencies / 2)
        damping = torch.where(half_sines == 0, 1.0, torch.sin(size * frequencies / 2) / (size * half_sines))
        angles = (position - middles)[:, None] * frequencies
        cos, sin = (angles.cos() * damping).float(), (angles.sin() * damping).float()
        return rotate_pairs(plain[:, None].expand(-1, blocks, -1), cos, sin, rope.interleaved)


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Inner products of queries `[Hq, D]` with keys `[H, T, D]`: `[Hq, T]` float32."""
    return (queries.float().view(len(keys), -1, keys.shape[2]) @ keys.float().mT).flatten(0, 1)
