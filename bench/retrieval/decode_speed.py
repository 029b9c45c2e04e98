"""Decode attention through a selector against dense attention: one layer, one step, everything charged, by pieces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, pairwise
from typing import Protocol

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...evaluation.report import Metric
from ...retrieval.attention import PartialAttention, attend, merge
from ...retrieval.kernels.ops import gather_attend
from ...retrieval.paged_kv import PagedKV
from ...retrieval.selector import LayerShape, LearnsFromQueries, Selector
from ..harness.rounds import interleave, timed

SELECT, RETRIEVED, ENDS, MERGE = "select", "gather and attend", "sinks and window", "merge"
PIECES = (SELECT, RETRIEVED, ENDS, MERGE)
_PAGE_TOKENS = 256  # a chunk of the store
_WIDENED_NUMBERS = 1 << 27  # keys of 128K tokens and 8 heads of 128: with values 1 GiB
_OTHER_LAYERS_BYTES = 64 << 20  # read before each step, since the other layers leave nothing of this one in the caches


class Context(Protocol):
    """One layer of a sequence and queries behind it, as `planted` makes them.

    `keys` `[H, S, D]` and `values` `[H, S, Dv]` after rotation, of 16 bits; `train_queries` `[Hq, Q, D]` of the prompt
    at `train_positions`, `queries` `[Hq, N, D]` at `positions`.
    """

    @property
    def shape(self) -> LayerShape: ...
    @property
    def keys(self) -> Tensor: ...
    @property
    def values(self) -> Tensor: ...
    @property
    def train_queries(self) -> Tensor: ...
    @property
    def train_positions(self) -> Tensor: ...
    @property
    def queries(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Ends:
    """Tokens that are always attended to: the first `sink_tokens` and the last `window_tokens` of the context."""

    sink_tokens: int = 16
    window_tokens: int = 256


@dataclass(frozen=True, slots=True)
class DecodeSpeed:
    """A selector at one size and the smallest budget that reaches the mass asked for, or the largest if none does.

    Attributes
    ----------
    mass : share of the softmax over the whole context that falls on what was attended to, mean over heads and queries.
    error_ratio : norm of the output's error over the norm of the dense output, in float32.
    build_s : adding all tokens, and building.
    read_bytes : a step's, to choose and then of the chosen, the sinks and the window, mean over queries.
    seconds : of each of `PIECES`, by step.
    dense_s : of the fastest dense way, by step; `dense` is its name, and `dense_ways` the medians of all.
    """

    tokens: int
    selector: str
    budget: int
    mass: float
    error_ratio: float
    build_s: float
    held_bytes: int
    read_bytes: int
    seconds: Mapping[str, Sequence[float]]
    dense_s: Sequence[float]
    dense: str
    dense_ways: Mapping[str, float]

    def piece(self, name: str) -> Metric:
        """Median, 10th and 90th percentile of a piece."""
        return Metric.of_samples(self.seconds[name], unit="s")

    @property
    def step_s(self) -> list[float]:
        """Seconds of each step, all pieces together."""
        return [sum(pieces) for pieces in zip(*(self.seconds[name] for name in PIECES), strict=True)]

    @property
    def speedup(self) -> Metric:
        """Median of the ratios of dense and sparse time within each step."""
        ratios = [dense / sparse for dense, sparse in zip(self.dense_s, self.step_s, strict=True)]
        return Metric.of_samples(ratios, unit="times", baseline=self.dense)

    def row(self) -> dict[str, object]:
        """Plain, for JSON lines."""
        found: dict[str, object] = {"tokens": self.tokens, "selector": self.selector, "budget": self.budget}
        found |= {"mass": self.mass, "error_ratio": self.error_ratio, "build_s": self.build_s}
        found |= {"held_bytes": self.held_bytes, "read_bytes": self.read_bytes, "steps": len(self.dense_s)}
        for name in PIECES:
            found |= _spread(name.replace(" ", "_") + "_s", self.piece(name))
        found |= _spread("step_s", Metric.of_samples(self.step_s, unit="s"))
        found |= {"dense": self.dense} | _spread("dense_s", Metric.of_samples(self.dense_s, unit="s"))
        found |= {f"dense_s {way}": spent for way, spent in self.dense_ways.items()}
        return found | _spread("speedup", self.speedup)


def decode_speed(
    sizes: Sequence[int],
    factories: Mapping[str, Callable[[LayerShape, int], Selector]],
    tensors: Callable[[int], Context],
    *,
    mass: float = 0.95,
    budgets: Sequence[int] = (256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384),
    ends: Ends | None = None,
    bar: Progress,
) -> Iterator[DecodeSpeed]:
    """Every selector at every size; dense and sparse steps in turn, with the same threads.

    Parameters
    ----------
    sizes : tokens of the context.
    factories : a selector without tokens, of a shape and from a start; by the name to show.
    tensors : a context of so many tokens. Of 512K tokens at the 8B shape it takes 2 GiB, which dense ways share.
    mass : to be reached by the smallest of `budgets` (ascending).
    """
    ends = ends or Ends()
    for tokens in sizes:
        context = tensors(tokens)
        if tokens <= ends.sink_tokens + ends.window_tokens:
            raise ValueError(f"size {tokens}; expected more than the sinks and the window, {ends}")
        whole = _whole(context)
        ways = _dense_ways(context)
        dense = min(ways, key=lambda way: min(timed(partial(ways[way], 0)) for _ in range(3)))
        for name, make in factories.items():
            selector = make(context.shape, ends.sink_tokens)
            build_s = timed(partial(_fill, selector, context, tokens - ends.window_tokens))
            yield _measured(context, selector, name, build_s, whole, ways, dense, mass, budgets, ends, bar)
            del selector


def _measured(
    context: Context,
    selector: Selector,
    name: str,
    build_s: float,
    whole: Sequence[PartialAttention],
    ways: Mapping[str, Callable[[int], Tensor]],
    dense: str,
    mass: float,
    budgets: Sequence[int],
    ends: Ends,
    bar: Progress,
) -> DecodeSpeed:
    step = _Step(context, selector, ends)
    for budget in budgets:
        found = [step.run(n, budget) for n in range(len(whole))]
        reached = float(torch.stack([(f.lse - w[1]).exp().mean() for f, w in zip(found, whole, strict=True)]).mean())
        if reached >= mass:
            break
    error = sum(float((f.out - w[0]).norm() / w[0].norm()) for f, w in zip(found, whole, strict=True)) / len(whole)
    read_bytes = sum(f.read_bytes for f in found) // len(found)
    seconds: dict[str, list[float]] = {piece: [] for piece in PIECES}
    others = torch.ones(_OTHER_LAYERS_BYTES // 4)
    turn = cycle(range(len(whole)))

    def sparse() -> float:
        others.sum()
        spent = step.run(next(turn), budget).seconds
        for piece in PIECES:
            seconds[piece].append(spent[piece])
        return sum(spent.values())

    def of_dense() -> float:
        others.sum()
        return timed(partial(ways[dense], 0))

    spent = interleave({"sparse": sparse, dense: of_dense}, len(whole), bar, f"{name} {context.keys.shape[1]}")
    medians = {way: float(np.median([timed(partial(work, 0)) for _ in range(3)])) for way, work in ways.items()}
    kept = {piece: all_of[1:] for piece, all_of in seconds.items()}  # the first round does not count
    return DecodeSpeed(
        context.keys.shape[1], name, budget, reached, error, build_s, selector.held_bytes, read_bytes, kept,
        spent[dense], dense, medians,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    out: Tensor
    lse: Tensor
    read_bytes: int
    seconds: Mapping[str, float]


class _Step:
    """A decode step of one layer: choose, attend to the chosen where they lie, to the ends, merge."""

    def __init__(self, context: Context, selector: Selector, ends: Ends) -> None:
        (H, S, _), self._context, self._selector = context.keys.shape, context, selector
        self._pages = PagedKV(_PAGE_TOKENS)
        self._pages.append(context.keys, context.values)
        places = torch.cat((torch.arange(ends.sink_tokens), torch.arange(S - ends.window_tokens, S)))
        self._ends = places.expand(H, -1).contiguous()

    def run(self, n: int, budget: int) -> _Found:
        context, scale = self._context, self._context.shape.scale
        queries, position = context.queries[:, n].contiguous(), int(context.positions[n])
        marks = [time.perf_counter()]
        chosen = self._selector.select(queries, position, budget)
        marks.append(time.perf_counter())
        retrieved = self._pages.attend(queries, chosen.ids, scale=scale)
        marks.append(time.perf_counter())
        around = gather_attend(queries, context.keys, context.values, self._ends, scale=scale)
        marks.append(time.perf_counter())
        out = merge([retrieved, around, *([] if chosen.rest is None else [chosen.rest(chosen.ids)])])[0]
        marks.append(time.perf_counter())
        seconds = dict(zip(PIECES, (after - before for before, after in pairwise(marks)), strict=True))
        tokens = int((chosen.ids >= 0).sum()) + self._ends.numel()
        token_bytes = (context.keys.shape[2] + context.values.shape[2]) * context.keys.element_size()
        lse = torch.logaddexp(retrieved[1], around[1])  # an estimate of the rest recovers no mass
        return _Found(out, lse, chosen.read_bytes + tokens * token_bytes, seconds)


def _fill(selector: Selector, context: Context, stop: int) -> None:
    selector.add(context.keys[:, selector.start : stop], context.values[:, selector.start : stop])
    if isinstance(selector, LearnsFromQueries):
        selector.observe(context.train_queries, context.train_positions)
        selector.build()


def _whole(context: Context) -> list[PartialAttention]:
    """Dense attention in float32 of every query, by pieces of one head: a long context is never widened as a whole."""
    shape, steps, found = context.shape, context.queries.shape[1], []
    for h in range(shape.kv_heads):
        # all steps are asked at once, as if they were query heads of one group
        queries = context.queries[h * shape.group : (h + 1) * shape.group].flatten(0, 1)
        pieces = zip(context.keys[h].split(1 << 16), context.values[h].split(1 << 16), strict=True)
        parts = [attend(queries, keys[None], values[None], scale=shape.scale) for keys, values in pieces]
        found.append([part.unflatten(0, (shape.group, steps)) for part in merge(parts)])
    out, lse = (torch.cat(each) for each in zip(*found, strict=True))
    return [(out[:, n], lse[:, n]) for n in range(steps)]


def _dense_ways(context: Context) -> dict[str, Callable[[int], Tensor]]:
    """`scaled_dot_product_attention` in each way that might be fastest: 16 bits as the tokens lie and, where that fits
    in memory, 32; with its own sharing of heads, and with the group as queries of one head.
    """
    ways: dict[str, Callable[[int], Tensor]] = {}
    dtypes = [context.keys.dtype] + ([torch.float32] if context.keys.numel() <= _WIDENED_NUMBERS else [])
    for dtype in dtypes:
        keys, values, asked = (t.to(dtype) for t in (context.keys, context.values, context.queries))
        name = str(dtype).removeprefix("torch.")
        ways[f"{name}, enable_gqa"] = partial(_by_gqa, asked, keys, values, context.shape)
        ways[f"{name}, grouped"] = partial(_grouped, asked, keys, values, context.shape)
    return ways


def _by_gqa(queries: Tensor, keys: Tensor, values: Tensor, shape: LayerShape, n: int) -> Tensor:
    return scaled_dot_product_attention(
        queries[None, :, n : n + 1], keys[None], values[None], scale=shape.scale, enable_gqa=True
    )


def _grouped(queries: Tensor, keys: Tensor, values: Tensor, shape: LayerShape, n: int) -> Tensor:
    asked = queries[:, n].view(1, shape.kv_heads, shape.group, -1)
    return scaled_dot_product_attention(asked, keys[None], values[None], scale=shape.scale)


def _spread(name: str, metric: Metric) -> dict[str, object]:
    return {name: metric.value, f"{name}_p10": metric.low, f"{name}_p90": metric.high}
