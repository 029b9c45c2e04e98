"""One decode step of all layers through retrieval's kernels, beside dense attention, at the shape of an 8B model.

Keys are SYNTHETIC: tokens in runs of 16 share a direction, a query asks for some of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...retrieval.attention import PartialAttention, attend
from ...retrieval.kernels import attend_triton, code_ops_triton, ops_triton, quantized_ops_triton, top_triton
from ...retrieval.kernels.code_ops import code_counts, code_importance, pack_codes
from ...retrieval.kernels.ops import tiled
from ...retrieval.kernels.quantized_ops import GROUP_TOKENS, channel_mixing, quantize_keys
from .rows import Row, median_ms, part_of, until

_RUN_TOKENS, _SINKS, _WINDOW, _CODES, _RANK = 16, 16, 128, 512, 32

_Choose = Callable[[int], Tensor]
"""Ids of the tokens chosen in a layer, `[H, K]`, without waiting for the device."""


@dataclass(frozen=True, slots=True)
class _Layers:
    """`[H, S, D]` keys and values and `[Hq, D]` queries of every layer, after rotation."""

    queries: list[Tensor]
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def scale(self) -> float:
        return float(self.queries[0].shape[1] ** -0.5)


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """One row for each context length and method: time of all layers, ratio to the fastest dense attention of two ways,
    and the share of the softmax that the chosen tokens, sinks and window recover.

    On a device a step is captured as a graph, dense ones too, and the time is that of a replay; `eager_ms` is without.
    """
    device = torch.device("cpu" if is_cpu else "cuda")
    layers, heads, group, dim = (1, 2, 2, 16) if is_cpu else (32, 8, 4, 128)
    rows: list[Row] = []
    for tokens in (640,) if is_cpu else (32768, 131072):
        context = _context(layers, heads, group, dim, tokens, device)
        budget = 64 if is_cpu else 2048
        ways = {way.__name__: _timed(partial(_dense_step, context, way), device) for way in (_by_gqa, _grouped)}
        best = min(ways, key=lambda way: ways[way]["ms"])
        dense = ways[best]
        rows.append({"name": f"dense, {best.strip('_')}", "tokens": tokens, **dense})
        methods: dict[str, Callable[[], tuple[_Choose, int]]] = {
            "quantized keys": partial(_quantized, context, budget),
            "landmarks": partial(_landmarks, context, budget),
            "codes": partial(_codes, context, budget),
            "rows of few dimensions": partial(_low_rank, context, budget),
        }
        for name, prepare in methods.items():
            step = partial(_row, name, tokens, prepare, context, dense["ms"], device)
            rows += until(stop_s, [step])
        del context, methods
    return part_of(rows, layers=layers, kv_heads=heads, query_heads=heads * group, head_dim=dim, synthetic=True)


def _row(
    name: str,
    tokens: int,
    prepare: Callable[[], tuple[_Choose, int]],
    context: _Layers,
    dense_ms: float,
    device: torch.device,
) -> Row:
    choose, window = prepare()
    ids = choose(0)
    out, lse = _sparse(context, 0, ids, window)
    true = _reference(context, 0, ids, window)
    error = float((out - true[0]).abs().max() / true[0].abs().max())
    whole = attend(context.queries[0], context.keys[0], context.values[0], scale=context.scale)[1]
    taken = _timed(partial(_sparse_step, context, choose, window), device)
    more = {}
    if device.type == "cuda":
        more["choose_ms"] = _timed(partial(_choosing_step, context, choose), device)["ms"]
    return {
        "name": name,
        "tokens": tokens,
        "passed": error <= 1e-2 and ids.shape[1] > 0,
        "error": error,
        "chosen_tokens": ids.shape[1],
        "recovered_share": float((lse - whole).exp().mean()),
        **taken,
        **more,
        "dense_ms": dense_ms,
        "ratio": dense_ms / taken["ms"],
    }


def _timed(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Times of a step: as a graph on a device, and `eager_ms` launched one by one."""
    eager = median_ms(step, device)
    if device.type != "cuda":
        return eager
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # what is made at first use must not be captured
        step()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return {**median_ms(graph.replay, device), "eager_ms": eager["ms"]}


def _context(layers: int, heads: int, group: int, dim: int, tokens: int, device: torch.device) -> _Layers:
    random = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=random, device=device)
    queries, keys, values = [], [], []
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    for _ in range(layers):
        topics = normal(heads, tokens // _RUN_TOKENS, dim).repeat_interleave(_RUN_TOKENS, 1)
        keys.append((topics + 0.4 * normal(heads, tokens, dim)).to(dtype))
        values.append(normal(heads, tokens, dim).to(dtype))
        wanted = topics[:, tokens // 3].repeat_interleave(group, 0)
        queries.append((2.0 * wanted + 0.3 * normal(heads * group, dim)).to(dtype))
    return _Layers(queries, keys, values)


def _dense_step(context: _Layers, way: Callable[..., Tensor]) -> None:
    for queries, keys, values in zip(context.queries, context.keys, context.values, strict=True):
        way(queries, keys[None], values[None], context.scale)


def _by_gqa(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    return scaled_dot_product_attention(queries[None, :, None], keys, values, scale=scale, enable_gqa=True)


def _grouped(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """The query heads of a group as tokens of one head."""
    return scaled_dot_product_attention(queries.view(1, keys.shape[1], -1, keys.shape[3]), keys, values, scale=scale)


def _sparse_step(context: _Layers, choose: _Choose, window: int) -> None:
    for layer in range(len(context.keys)):
        _sparse(context, layer, choose(layer), window)


def _choosing_step(context: _Layers, choose: _Choose) -> None:
    for layer in range(len(context.keys)):
        choose(layer)


def _sparse(context: _Layers, layer: int, ids: Tensor, window: int) -> PartialAttention:
    """Attention over sinks, window and the chosen tokens, `ids` `[H, K]` of those between."""
    queries, keys, values = context.queries[layer], context.keys[layer], context.values[layer]
    return attend_triton.gather_attend(queries, keys, values, ids, context.scale, sinks=_SINKS, window=window)


def _reference(context: _Layers, layer: int, ids: Tensor, window: int) -> PartialAttention:
    keys, values = context.keys[layer], context.values[layer]
    (heads, tokens, _), device = keys.shape, keys.device
    ends = torch.cat((torch.arange(_SINKS, device=device), torch.arange(tokens - window, tokens, device=device)))
    rows = torch.cat((ends.expand(heads, -1), ids), 1)[..., None].expand(-1, -1, keys.shape[2])
    return attend(context.queries[layer], keys.gather(1, rows), values.gather(1, rows), scale=context.scale)


def _quantized(context: _Layers, budget: int) -> tuple[_Choose, int]:
    """The best tokens by their keys of two bits a channel, in whole groups; what is behind them is in the window."""
    tokens, dim = context.keys[0].shape[1:]
    groups = (tokens - _SINKS - _WINDOW) // GROUP_TOKENS
    mix, stored = channel_mixing(dim).to(context.keys[0].device), []
    for keys in context.keys:
        inner = keys[:, _SINKS : _SINKS + groups * GROUP_TOKENS].unflatten(1, (groups, GROUP_TOKENS))
        mixed = inner.float() @ mix.T
        means = mixed.mean(2).half()
        stored.append((*quantize_keys(mixed, means.float()), means))
    turned = mix.T.to(context.queries[0].dtype)

    def choose(layer: int) -> Tensor:
        asked = context.queries[layer] @ turned
        scores, parts = quantized_ops_triton.quantized_scores(asked, *stored[layer], context.scale)
        return top_triton.top_pooled(scores, len(stored[layer][0]), budget, "max", parts=parts, start=_SINKS)

    return choose, tokens - _SINKS - groups * GROUP_TOKENS


def _landmarks(context: _Layers, budget: int) -> tuple[_Choose, int]:
    """The best runs of 8 tokens by their mean keys."""
    means = [keys[:, _SINKS:-_WINDOW].unflatten(1, (-1, 8)).mean(2) for keys in context.keys]
    within = torch.arange(8, device=means[0].device)

    def choose(layer: int) -> Tensor:
        scores = ops_triton.landmark_scores(context.queries[layer], means[layer], context.scale)
        runs = top_triton.top_pooled(scores, len(means[layer]), budget // 8, "max")
        return _SINKS + (8 * runs[..., None] + within).flatten(1)

    return choose, _WINDOW


def _codes(context: _Layers, budget: int) -> tuple[_Choose, int]:
    """The tokens of the best codes; centroids are keys of the context itself."""
    books, packed, counts = [], [], []
    for keys in context.keys:
        inner = keys[:, _SINKS:-_WINDOW].float()
        count = min(_CODES, inner.shape[1] // _RUN_TOKENS)
        book = inner[:, torch.linspace(0, inner.shape[1] - 1, count).long()]
        halves = book.square().sum(-1) / 2
        codes = torch.cat([(part @ book.mT - halves[:, None]).argmax(-1) for part in inner.split(8192, 1)], 1)
        packed.append(pack_codes(codes, 12))
        counts.append(code_counts(packed[-1], inner.shape[1], count))
        books.append(book.to(keys.dtype))

    def choose(layer: int) -> Tensor:
        table = ops_triton.landmark_scores(context.queries[layer], books[layer], context.scale)
        importance = code_importance(table, counts[layer])
        tokens = context.keys[layer].shape[1] - _SINKS - _WINDOW
        return _SINKS + code_ops_triton.vq_select(importance, packed[layer], 12, tokens, counts[layer], budget, ())

    return choose, _WINDOW


def _low_rank(context: _Layers, budget: int) -> tuple[_Choose, int]:
    """All tokens by their keys in a few directions, as a sketch compares its candidates."""
    bases, tiles = [], []
    for queries, keys in zip(context.queries, context.keys, strict=True):
        rank = min(_RANK, keys.shape[2])
        directions = torch.nn.functional.normalize(queries.float().view(len(keys), -1, keys.shape[2]), dim=-1)
        random = torch.randn(len(keys), keys.shape[2], rank, device=keys.device, generator=_seeded(keys.device))
        random[..., : directions.shape[1]] = directions.mT[..., :rank]
        basis = torch.linalg.qr(random)[0]
        bases.append(basis)
        tiles.append(tiled((keys[:, _SINKS:-_WINDOW].float() @ basis).half()))

    inner = context.keys[0].shape[1] - _SINKS - _WINDOW
    everything = torch.arange(inner, device=context.keys[0].device).expand(len(tiles[0]), -1).contiguous()

    def choose(layer: int) -> Tensor:
        heads, basis = len(tiles[layer]), bases[layer]
        asked = (context.queries[layer].float().view(heads, -1, basis.shape[1]) @ basis).flatten(0, 1)
        scores = ops_triton.tile_scores(asked, tiles[layer], everything, context.scale)
        return top_triton.top_pooled(scores, heads, budget, "max", start=_SINKS)

    return choose, _WINDOW


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
