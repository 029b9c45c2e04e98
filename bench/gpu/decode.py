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

from ...retrieval.attention import PartialAttention, attend, merge
from ...retrieval.kernels.code_ops import code_counts, code_importance, pack_codes, vq_select
from ...retrieval.kernels.ops import gather_attend, landmark_scores, tile_scores, tiled, top_pooled
from .rows import Row, median_ms, part_of, until

_RUN_TOKENS, _SINKS, _WINDOW, _CODES, _RANK = 16, 16, 128, 512, 32


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
    """
    device = torch.device("cpu" if is_cpu else "cuda")
    layers, heads, group, dim = (2, 2, 2, 16) if is_cpu else (32, 8, 4, 128)
    rows: list[Row] = []
    for tokens in (512,) if is_cpu else (32768, 131072):
        context = _context(layers, heads, group, dim, tokens, device)
        budget = 64 if is_cpu else 2048
        ways = {way.__name__: median_ms(partial(_dense_step, context, way), device) for way in (_by_gqa, _grouped)}
        best = min(ways, key=lambda way: ways[way]["ms"])
        dense = ways[best]
        rows.append({"name": f"dense, {best.strip('_')}", "tokens": tokens, **dense})
        methods: dict[str, Callable[[], Callable[[int], Tensor]]] = {
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
    prepare: Callable[[], Callable[[int], Tensor]],
    context: _Layers,
    dense_ms: float,
    device: torch.device,
) -> Row:
    choose = prepare()
    ids = choose(0)
    out, lse = _sparse(context, 0, ids)
    true = _reference(context, 0, ids)
    error = float((out - true[0]).abs().max() / true[0].abs().max())
    whole = attend(context.queries[0], context.keys[0], context.values[0], scale=context.scale)[1]
    taken = median_ms(partial(_sparse_step, context, choose), device)
    return {
        "name": name,
        "tokens": tokens,
        "passed": error <= 1e-2 and ids.shape[1] > 0,
        "error": error,
        "chosen_tokens": ids.shape[1],
        "recovered_share": float((lse - whole).exp().mean()),
        **taken,
        "dense_ms": dense_ms,
        "ratio": dense_ms / taken["ms"],
    }


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


def _sparse_step(context: _Layers, choose: Callable[[int], Tensor]) -> None:
    for layer in range(len(context.keys)):
        _sparse(context, layer, choose(layer))


def _ends(context: _Layers) -> Tensor:
    """Ids of sinks and window, `[H, N]`."""
    (heads, tokens, _), device = context.keys[0].shape, context.keys[0].device
    ends = torch.cat((torch.arange(_SINKS, device=device), torch.arange(tokens - _WINDOW, tokens, device=device)))
    return ends.expand(heads, -1).contiguous()


def _sparse(context: _Layers, layer: int, ids: Tensor) -> PartialAttention:
    """Attention over sinks, window and the chosen tokens, `ids` `[H, K]` of those between."""
    queries, keys, values = context.queries[layer], context.keys[layer], context.values[layer]
    near = gather_attend(queries, keys, values, _ends(context), scale=context.scale)
    return merge([near, gather_attend(queries, keys, values, ids, scale=context.scale)])


def _reference(context: _Layers, layer: int, ids: Tensor) -> PartialAttention:
    keys, values = context.keys[layer], context.values[layer]
    rows = torch.cat((_ends(context), ids), 1)[..., None].expand(-1, -1, keys.shape[2])
    return attend(context.queries[layer], keys.gather(1, rows), values.gather(1, rows), scale=context.scale)


def _landmarks(context: _Layers, budget: int) -> Callable[[int], Tensor]:
    """The best runs of 8 tokens by their mean keys."""
    means = [keys[:, _SINKS:-_WINDOW].unflatten(1, (-1, 8)).mean(2) for keys in context.keys]
    within = torch.arange(8, device=means[0].device)

    def choose(layer: int) -> Tensor:
        scores = landmark_scores(context.queries[layer], means[layer], scale=context.scale)
        runs = top_pooled(scores, len(means[layer]), budget // 8)
        return _SINKS + (8 * runs[..., None] + within).flatten(1)

    return choose


def _codes(context: _Layers, budget: int) -> Callable[[int], Tensor]:
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
        table = landmark_scores(context.queries[layer], books[layer], scale=context.scale)
        importance = code_importance(table, counts[layer])
        tokens = context.keys[layer].shape[1] - _SINKS - _WINDOW
        return _SINKS + vq_select(importance, packed[layer], tokens, counts[layer], budget)

    return choose


def _low_rank(context: _Layers, budget: int) -> Callable[[int], Tensor]:
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

    def choose(layer: int) -> Tensor:
        heads, tokens = len(tiles[layer]), context.keys[layer].shape[1] - _SINKS - _WINDOW
        asked = (context.queries[layer].float().view(heads, -1, bases[layer].shape[1]) @ bases[layer]).flatten(0, 1)
        firsts = torch.zeros(heads, 1, dtype=torch.int64, device=asked.device)
        scores = tile_scores(asked, tiles[layer], firsts, torch.full_like(firsts, tokens), scale=context.scale)
        return _SINKS + top_pooled(scores, heads, budget)

    return choose


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(1)
