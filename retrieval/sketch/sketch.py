"""A two-stage index: codes name candidates, keys in few dimensions decide among them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from ...errors import CodecError
from ..growable import GrowableTensor
from ..kernels.ops import landmark_scores, top_pooled
from ..selector import LayerShape, Pooling, Selection, top_ids
from .key_sketch import NEAREST_TOKENS, KeySketch

_BLOCK_TOKENS = 1024  # added after `build`, until which they stay exact


class SketchIndex:
    """`Selector` in two stages over a `KeySketch`, which it learns from the prompt's own queries and keys.

    Codes as in A2ATS (arXiv 2502.12665) choose candidates. Keys before rotation in few dimensions, as in ShadowKV
    (arXiv 2410.21465) but for each head, choose among these. Both use the directions that the queries of the prompt
    read; this combination is our own.

    Scores treat all tokens as equally far: the query is rotated by the mean rotation over all distances at `build`,
    which damps fast channel pairs, or by `offset_tokens`. The softmax of `pooling` is over the candidates.

    Until `build` the keys are kept and searched exactly. Tokens added afterwards are searched exactly, too, until there
    are 1,024 of them, which are then added to the sketch. Without observed queries, the second moment of keys replaces
    that of queries, which finds fewer of the right tokens if queries are unlike keys.

    Parameters
    ----------
    start : first token of the context that it covers.
    rank : dimensions of a key for each KV head, 2 bytes each.
    centroids : at most, for each KV head; there are at least 8 keys a centroid.
    candidate_ratio : share of the tokens that are candidates in contexts of up to `ratio_tokens`; in longer ones their
        number grows with the square root of the context. At least `candidates_a_token` times the budget.
    offset_tokens : distance that is assumed for all tokens; None for the mean over all distances.
    pooling : see `pooled`.
    """

    name = "sketch"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        rank: int = 32,
        centroids: int = 4096,
        candidate_ratio: float = 0.12,
        ratio_tokens: int = 1 << 19,
        candidates_a_token: float = 4.0,
        offset_tokens: int | None = None,
        pooling: Pooling = "max",
    ) -> None:
        if rank < 1 or centroids < 1 or ratio_tokens < 1 or start < 0:
            raise ValueError(
                f"rank is {rank}, centroids {centroids}, ratio_tokens {ratio_tokens}, start {start}; expected at least "
                "1, 1, 1 and 0"
            )
        if not 0 < candidate_ratio <= 1 or not candidates_a_token >= 1:
            raise ValueError(
                f"candidate_ratio is {candidate_ratio}, candidates_a_token {candidates_a_token}; expected a share "
                "above 0, and at least 1"
            )
        if offset_tokens is not None and offset_tokens < 0:
            raise ValueError(f"offset_tokens is {offset_tokens}; expected a distance of at least 0")
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(get_args(Pooling))}")
        self.shape, self.start, self.rank, self.centroids = shape, start, rank, centroids
        self.candidate_ratio, self.ratio_tokens, self.candidates_a_token = (
            candidate_ratio,
            ratio_tokens,
            candidates_a_token,
        )
        self.offset_tokens, self._pooling = offset_tokens, pooling
        # The sketch and the keys behind it; replaced as a whole, because `build` may run while another thread selects
        self._held: tuple[KeySketch | None, GrowableTensor] = (None, GrowableTensor(1))
        self._moments = torch.zeros(shape.kv_heads, shape.head_dim, shape.head_dim, dtype=torch.float64)
        self._observed = 0

    def __len__(self) -> int:
        sketch, recent = self._held
        return (0 if sketch is None else len(sketch)) + len(recent)

    @property
    def sketch(self) -> KeySketch | None:
        """None before `build`."""
        return self._held[0]

    @property
    def held_bytes(self) -> int:
        return 0 if self.sketch is None else self.sketch.held_bytes

    def add(self, keys: Tensor, values: Tensor | None = None) -> None:
        self.shape.check_keys(keys)
        sketch, recent = self._held
        recent.add(keys)
        full = len(recent) // _BLOCK_TOKENS * _BLOCK_TOKENS
        if sketch is None or not full:
            return
        for block in recent.all[:, :full].split(_BLOCK_TOKENS, 1):
            sketch.add(block)
        self._held = sketch, _growable(recent.all[:, full:])

    def observe(self, queries: Tensor, positions: Tensor) -> None:
        """See `LearnsFromQueries`. Only the second moments of the queries are kept.

        Raises
        ------
        ValueError : other shapes, or numbers that are not finite.
        """
        shape = self.shape
        shape.check_observed(queries, positions)
        plain = queries.float() if shape.rope is None else shape.rope.shift(queries.float(), -positions)
        grouped = plain.reshape(shape.kv_heads, -1, shape.head_dim)
        self._moments += (grouped.mT @ grouped).double()
        self._observed += len(positions)

    def build(self) -> None:
        """Builds the sketch of the keys, unless there is one already or no token yet."""
        sketch, recent = self._held
        if sketch is not None or not len(recent):
            return
        b = self.offset_tokens
        far = max(NEAREST_TOKENS + 1, self.start + len(recent))
        made = KeySketch.fit(
            self.shape,
            recent.all,
            self._moments / (self._observed * self.shape.group) if self._observed else None,
            start=self.start,
            rank=self.rank,
            centroids=self.centroids,
            band=(NEAREST_TOKENS, far) if b is None else (b, b + 1),
        )
        self._held = made, _growable(recent.all[:, :0])

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        heads, (sketch, recent) = self.shape.kv_heads, self._held
        tokens = len(recent) + (0 if sketch is None else len(sketch))
        if budget >= tokens or not budget:
            return Selection(top_ids(torch.empty(heads, tokens), budget, self.start), 0)
        if sketch is None:
            scores = landmark_scores(queries.float(), recent.all, scale=self.shape.scale)
            return Selection(
                top_pooled(scores, heads, budget, pooling=self._pooling) + self.start, recent.nbytes, heads * tokens
            )
        scores, rows, read = sketch.search(queries, position, self.candidates(tokens, budget), self._pooling)
        if len(recent):
            own = landmark_scores(queries.float(), recent.all, scale=self.shape.scale)
            scores, read = torch.cat((scores, own), 1), read + recent.nbytes
        best = top_pooled(scores, heads, budget, pooling=self._pooling)
        ids = sketch.tokens_of(best, rows)
        return Selection(ids + self.start, read + 4 * ids.numel(), heads * len(recent))

    def candidates(self, tokens: int, budget: int) -> int:
        """Number of candidates among so many tokens, for each KV head."""
        wanted = self.candidate_ratio * math.sqrt(tokens * min(tokens, self.ratio_tokens))
        return min(tokens, max(round(wanted), round(self.candidates_a_token * budget)))

    def state(self) -> Mapping[str, Tensor]:
        """See `KeepsState`. Raises `ValueError` before `build`."""
        if self.sketch is None:
            raise ValueError("there is no sketch yet; call build first")
        return {f"sketch.{name}": tensor for name, tensor in self.sketch.state().items()}

    def restore_state(self, parts: Mapping[str, Tensor]) -> None:
        """See `KeepsState`; added keys that are not in the sketch stay exact, or are added to it by blocks.

        Raises
        ------
        CodecError : other tensors, a sketch of more tokens than were added, or a sketch was built already.
        """
        sketch, recent = self._held
        found = KeySketch.from_state(
            self.shape, {name.removeprefix("sketch."): t for name, t in parts.items()}, start=self.start
        )
        if sketch is not None or len(found) > len(recent):
            raise CodecError(f"a sketch of {len(found)} tokens for {len(recent)} that are not in one yet")
        self.rank, self.centroids = found.rank, found.centroids.shape[1]
        self._held = found, GrowableTensor(1)
        self.add(recent.all[:, len(found) :])


def _growable(keys: Tensor) -> GrowableTensor:
    rows = GrowableTensor(1)
    rows.add(keys)
    return rows
