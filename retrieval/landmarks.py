"""ShadowKV's landmarks: every 8 tokens are represented by their mean key, unless they disagree with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import CodecError
from .growable import GrowableTensor
from .kernels.ops import landmark_scores
from .selector import LayerShape, Pooling, Selection, pooled

_PIECE_CHUNKS = 1024  # summarised at once: 8 heads of 128 channels in float32 take 32 MiB

_MEANS, _COSINES, _TAIL = "landmarks.means", "landmarks.cosines", "landmarks.tail"


class LandmarkIndex:
    """`Selector` of whole runs of `chunk_tokens` tokens by their mean key (ShadowKV, arXiv 2410.21465, 4.1 and 4.2).

    A run's landmark is the mean of its keys after rotation. Its outlier score is the least cosine between a member and
    that mean; the runs with the lowest scores of a KV head are outliers. They are always chosen, and take no part in
    the softmax over landmarks, which is made for each query head and pooled over the group. Then come the runs of the
    largest landmarks. Runs lie at multiples of `chunk_tokens` of the context, whatever `start` is.

    Defaults are the paper's: c = 8, o = 48; its budget is 1.56 % of the context, 256 runs at 128K. Where the caller
    pins the sinks, outliers are worth little: on the reference model `outlier_chunks=0` recovers slightly more.

    Deviations:

    - outliers are part of the budget, up to `outlier_ratio` of it, the share that the paper's 48 have of 304 runs; the
      paper attends to them on top;
    - the landmarks of outliers stay in the table, as more of them are outliers under a larger budget;
    - an incomplete run, at the end or at `start`, has a landmark of the tokens it has; the paper always attends to the
      last one, which here is in the caller's window;
    - the budget is used up to the last token, so the last run chosen may be cut.

    Parameters
    ----------
    start : first token of the context that it covers.
    chunk_tokens : c in the paper.
    outlier_chunks : o in the paper, for each KV head; 0 for none.
    outlier_ratio : share of the budget that they may take, 0 to 1.
    dtype : of the stored landmarks. Scores are computed in float32.
    pooling : see `pooled`.
    """

    name = "landmarks"

    def __init__(
        self,
        shape: LayerShape,
        *,
        start: int = 0,
        chunk_tokens: int = 8,
        outlier_chunks: int = 48,
        outlier_ratio: float = 48 / 304,
        dtype: torch.dtype = torch.float16,
        pooling: Pooling = "max",
    ) -> None:
        if chunk_tokens < 1 or outlier_chunks < 0 or start < 0:
            raise ValueError(
                f"chunk_tokens is {chunk_tokens}, outlier_chunks {outlier_chunks}, start {start}; expected at least "
                "1, 0 and 0"
            )
        if not 0 <= outlier_ratio <= 1:
            raise ValueError(f"outlier_ratio is {outlier_ratio}; expected 0 to 1")
        self.shape, self.start, self.chunk_tokens = shape, start, chunk_tokens
        self._pooling, self._outlier_chunks, self._outlier_ratio = pooling, outlier_chunks, outlier_ratio
        # Of complete runs. The keys of the last, incomplete one are kept, up to chunk_tokens - 1 of them.
        self._means, self._cosines, self._tokens = GrowableTensor(1), GrowableTensor(1), 0
        self._means.add(torch.empty(shape.kv_heads, 0, shape.head_dim, dtype=dtype))
        self._cosines.add(torch.empty(shape.kv_heads, 0))
        self._tail = torch.empty(shape.kv_heads, 0, shape.head_dim)
        self._outliers = torch.empty(shape.kv_heads, 0, dtype=torch.int32)  # the least cosine first

    def __len__(self) -> int:
        return self._tokens

    @property
    def held_bytes(self) -> int:
        return self._means.nbytes + self._cosines.nbytes + self._outliers.nbytes + self._tail.nbytes

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.shape.check_keys(keys)
        pending = torch.cat((self._tail, keys.float()), 1) if self._tail.shape[1] else keys
        means, cosines, tail = self._summary(pending, self._end - self._tail.shape[1])
        self._take(means, cosines, tail, keys.shape[1])

    def select(self, queries: Tensor, position: int, budget: int) -> Selection:
        self.shape.check_query(queries, budget)
        if budget >= len(self):
            ids = torch.arange(self.start, self._end).expand(self.shape.kv_heads, -1).contiguous()
            return Selection(ids, 0)
        scores = landmark_scores(queries, self._means.all, scale=self.shape.scale)
        if self._tail.shape[1]:
            own = landmark_scores(queries, self._tail.mean(1, keepdim=True), scale=self.shape.scale)
            scores = torch.cat((scores, own), 1)
        outliers = self.outliers(budget)
        scores.view(self.shape.kv_heads, self.shape.group, -1).scatter_(
            2, outliers[:, None].expand(-1, self.shape.group, -1), -torch.inf
        )
        importance = pooled(scores, self.shape, self._pooling).scatter_(1, outliers, torch.inf)
        # two runs may be incomplete
        runs = importance.topk(min(importance.shape[1], -(-budget // self.chunk_tokens) + 2), dim=1).indices
        ids = self._tokens_of(runs, budget)
        return Selection(ids, self._means.nbytes + self._tail.nbytes + 4 * outliers.numel())

    def outliers(self, budget: int) -> Tensor:
        """The runs that are always chosen under this budget, `[H, O]` int64, least similar to their mean first.

        They are counted from the run of `start`.
        """
        most = int(self._outlier_ratio * budget) // self.chunk_tokens
        return self._outliers[:, :most].long()

    def export(self, first: int, stop: int) -> Mapping[str, Tensor]:
        """See `TravelsWithChunks`. Raises `ValueError` for tokens that are not covered, or bounds within a run."""
        c = self.chunk_tokens
        inside = self.start <= first <= stop <= self._end
        if not inside or (first % c and first != self.start) or (stop % c and stop != self._end):
            raise ValueError(
                f"tokens {first} to {stop}; expected bounds among {self.start} and {self._end}, or multiples of "
                f"{c} between them"
            )
        runs = slice(first // c - self.start // c, stop // c - self.start // c)
        tail = self._tail if stop == self._end else self._tail[:, :0]
        return {_MEANS: self._means.all[:, runs], _COSINES: self._cosines.all[:, runs], _TAIL: tail}

    def restore(self, parts: Mapping[str, Tensor], tokens: int) -> None:
        """See `TravelsWithChunks`. The ranking of outliers is that of all tokens, those restored included."""
        if self._tail.shape[1] and tokens:
            raise ValueError(f"{len(self)} tokens end within a run; only `add` can go on from there")
        c, end = self.chunk_tokens, self._end + tokens
        heads, dim = self.shape.kv_heads, self.shape.head_dim
        runs = end // c - self._end // c
        tail = end - max(self._end, end // c * c)
        for name, dtype, shape in (
            (_MEANS, self._means.all.dtype, (heads, runs, dim)),
            (_COSINES, torch.float32, (heads, runs)),
            (_TAIL, torch.float32, (heads, tail, dim)),
        ):
            found = parts.get(name)
            if found is None or found.dtype != dtype or found.shape != shape:
                has = None if found is None else f"{found.dtype} {list(found.shape)}"
                raise CodecError(f"{name} is {has}; {tokens} tokens from {self._end} on have {dtype} {list(shape)}")
            if not bool(found.isfinite().all()):
                raise CodecError(f"{name} is not finite; index these tokens anew")
        self._take(parts[_MEANS], parts[_COSINES], parts[_TAIL], tokens)

    @property
    def _end(self) -> int:
        return self.start + self._tokens

    def _summary(self, keys: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        """Landmarks and outlier scores of the complete runs among the tokens from `first` on; the keys behind them."""
        c = self.chunk_tokens
        stop = max(0, (first + keys.shape[1]) // c * c - first)
        head = min(-first % c, stop)
        pieces = [keys[:, None, :head]] if head else []
        pieces += keys[:, head:stop].unflatten(1, (-1, c)).split(_PIECE_CHUNKS, 1)
        summaries = [_summarise(piece) for piece in pieces if piece.shape[1]]
        if not summaries:
            return self._means.all[:, :0], self._cosines.all[:, :0], keys[:, stop:].float().clone()
        means, cosines = (torch.cat(each, 1) for each in zip(*summaries, strict=True))
        means = means.to(self._means.all.dtype)
        if not bool(means.isfinite().all()):
            raise ValueError(f"mean keys leave the range of {means.dtype}; take landmarks of bfloat16 or float32")
        return means, cosines, keys[:, stop:].float().clone()

    def _take(self, means: Tensor, cosines: Tensor, tail: Tensor, tokens: int) -> None:
        known, count = len(self._cosines), cosines.shape[1]
        self._means.add(means)
        self._cosines.add(cosines)
        self._tail = tail.clone()
        self._tokens += tokens
        # The o lowest of all are among the o lowest so far and the new ones; equal scores rank by age.
        runs = torch.arange(known, known + count, dtype=torch.int32).expand(self.shape.kv_heads, -1)
        candidates = torch.cat((self._outliers, runs), 1)
        order = self._cosines.all.gather(1, candidates.long()).sort(dim=1, stable=True).indices
        self._outliers = candidates.gather(1, order[:, : self._outlier_chunks])

    def _tokens_of(self, runs: Tensor, budget: int) -> Tensor:
        """The first `budget` tokens of runs `[H, N]` in their order, then ascending."""
        c = self.chunk_tokens
        ids = ((runs + self.start // c)[..., None] * c + torch.arange(c)).flatten(1)
        if self.start % c or self._tail.shape[1]:
            is_outside = (ids < self.start) | (ids >= self._end)
            ids = ids.gather(1, is_outside.to(torch.uint8).sort(dim=1, stable=True).indices)
        return ids[:, :budget].sort(1).values


def _summarise(runs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean keys `[H, C, D]` of runs `[H, C, c, D]`, and least cosine `[H, C]` of a key with its mean; float32."""
    wide = runs.float()
    mean = wide.mean(2)
    products = (wide * mean[:, :, None]).sum(-1)
    norms = wide.norm(dim=-1) * mean.norm(dim=-1)[..., None]
    tiny = torch.finfo(torch.float32).tiny
    return mean, (products / norms.clamp(min=tiny)).amin(2)
