"""The projection graph against IVF and HNSW: keys compared for a recall, bytes, and what building costs.

On planted contexts (SYNTHETIC, see `planted.py`) and on the queries and keys of a real model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...core import KeyIndex
from ...retrieval.per_head import search_with_cost
from ...retrieval.roargraph.key_graph import GraphSettings, KeyGraph
from ...retrieval.roargraph.roargraph import RoarGraphIndex
from .faiss_index import HnswIndex, IvfIndex
from .planted import Asking, PlantedContext, Recipe, mahalanobis_gap, planted

Way: TypeAlias = Literal["graph", "ivf", "hnsw"]
K = 100
KNOBS: dict[Way, Sequence[int]] = {
    "graph": (125, 140, 160, 180, 200, 250, 300, 400, 600, 1000),
    "ivf": (4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048),
    "hnsw": (100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600),
}


@dataclass(frozen=True, slots=True)
class Point:
    """One setting of an index, means over queries asked one by one.

    Attributes
    ----------
    knob : `Ls`, `nprobe` or `efSearch`.
    recall : share of the 100 best keys that was found.
    mass : share of the softmax over all keys that falls on what was found.
    scan_ratio : keys compared, of all; centroids of inverted lists not counted.
    search_s : seconds a query.
    """

    knob: int
    recall: float
    mass: float
    scan_ratio: float
    search_s: float


def sweep(way: Way, index: KeyIndex, queries: Tensor, keys: Tensor, *, scale: float, target: float) -> list[Point]:
    """Settings of rising recall, up to the first that reaches `target`. `queries` `[Q, D]`, `keys` `[S, D]`."""
    scores = queries.float() @ keys.float().T
    best = scores.topk(min(K, len(keys)), dim=1).indices
    weights = (scores * scale).softmax(1)
    points: list[Point] = []
    for knob in KNOBS[way]:
        _turn(index, knob)
        found, seconds = [], 0.0
        for query in queries.float().split(1):
            began_s = time.perf_counter()
            found.append(search_with_cost(index, query, K))
            seconds += time.perf_counter() - began_s
        ids = torch.cat([f.ids for f in found])
        marked = torch.zeros(len(ids), len(keys) + 1, dtype=torch.bool)
        marked.scatter_(1, torch.where(ids < 0, len(keys), ids), True)
        mass = float(weights.masked_fill(~marked[:, :-1], 0.0).sum(1).mean())
        recall = float(marked.gather(1, best).float().mean())
        compared = sum(f.compared_keys for f in found) / len(found)
        points.append(Point(knob, recall, mass, compared / len(keys), seconds / len(found)))
        if recall >= target:
            break
    return points


def scan_at(points: Sequence[Point], recall: float) -> float | None:
    """Share of keys compared at a recall, between two settings in proportion; None if none reaches it."""
    for before, after in zip((None, *points), points, strict=False):
        if after.recall >= recall:
            if before is None or after.recall == before.recall:
                return after.scan_ratio
            part = (recall - before.recall) / (after.recall - before.recall)
            return before.scan_ratio + part * (after.scan_ratio - before.scan_ratio)
    return None


def prefill_s(tokens: int, *, query_heads: int, head_dim: int = 128, sample_tokens: int = 8192) -> float:
    """Seconds of dense causal attention (float32) of that many query heads over a prompt, as torch does it.

    One head is measured at no more than `sample_tokens`; beyond that it is EXTRAPOLATED, quadratically.
    """
    measured = min(tokens, sample_tokens)
    q, k, v = torch.randn(3, 1, 1, measured, head_dim)
    seconds = []
    for _ in range(3):
        began_s = time.perf_counter()
        scaled_dot_product_attention(q, k, v, is_causal=True)
        seconds.append(time.perf_counter() - began_s)
    return sorted(seconds)[1] * query_heads * (tokens / measured) ** 2


def planted_figures(
    tokens: int,
    *,
    ways: Sequence[Way] = ("graph", "ivf", "hnsw"),
    target: float = 0.95,
    queries: int = 32,
    asking: Asking = "far",
    recipe: Recipe | None = None,
    settings: GraphSettings | None = None,
    seed: int = 0,
) -> dict[str, object]:
    """Figures of one KV head of a SYNTHETIC context: `scan` by way at `target` recall@100, its `points`, `build_s`.

    Of the graph also `bytes_per_token_layer_8b` (8 KV heads), `build_time_vs_prefill` (of the 4 query heads of the
    group), and `group_scan_ratio`: keys that a whole group of queries compares, at the last setting.
    """
    context = planted(tokens, queries=queries, seed=seed, asking=asking, recipe=recipe)
    shape, keys, asked = context.shape, context.keys[0], context.queries[: context.shape.group].flatten(0, 1)
    far, near = mahalanobis_gap(context)
    figures: dict[str, object] = {"tokens": tokens, "asking": asking, "synthetic": True}
    figures |= {"mahalanobis_of_queries": far, "mahalanobis_of_keys": near}
    scans: dict[str, float | None] = {}
    builds: dict[str, float] = {}
    curves: dict[str, list[dict[str, float]]] = {}
    for way in ways:
        index, builds[way] = _built(way, context, settings)
        points = sweep(way, index, asked, keys, scale=shape.scale, target=target)
        scans[way], curves[way] = scan_at(points, target), [asdict(point) for point in points]
        if isinstance(index, KeyGraph):
            group = [
                index.search_with_cost(step.float(), K).compared_keys
                for step in context.queries[: shape.group].unbind(1)
            ]
            dense_s = prefill_s(tokens, query_heads=shape.group)
            figures["group_scan_ratio"] = sum(group) / len(group) / tokens
            figures["bytes_per_token_layer_8b"] = index.held_bytes / tokens * 8
            figures["prefill_s"], figures["build_time_vs_prefill"] = dense_s, builds[way] / dense_s
    return figures | {"scan": scans, "build_s": builds, "points": curves}


def model_figures(
    layers: Sequence[tuple[Tensor, Tensor]],
    *,
    window_tokens: int,
    queries: int,
    sinks: int = 4,
    target: float = 0.95,
    ways: Sequence[Way] = ("graph", "ivf", "hnsw"),
    settings: GraphSettings | None = None,
    heads: int | None = None,
) -> list[dict[str, object]]:
    """Search for real queries `[Hq, S, D]` and keys `[H, S, D]` of a model's layers, one row a layer and KV head.

    The last `queries` of a layer are asked; all before them are the prompt. What its sinks and its window hold is
    attended to anyway, and in no index.
    """
    rows: list[dict[str, object]] = []
    for layer, (all_queries, all_keys) in enumerate(layers):
        kv_heads, total, head_dim = all_keys.shape
        group, prompt = len(all_queries) // kv_heads, total - queries
        for head in range(min(kv_heads, heads or kv_heads)):
            keys = all_keys[head, sinks : prompt - window_tokens].float()
            of_group = all_queries[head * group : (head + 1) * group].float()
            row: dict[str, object] = {"layer": layer, "head": head, "keys": len(keys), "synthetic": False}
            for way in ways:
                index = _empty(way, head_dim, replace(settings or GraphSettings(), exact_beams=0))
                index.add(keys)
                if isinstance(index, KeyGraph):
                    at = ((torch.arange(prompt // 10) + 0.5) / (prompt // 10)).sqrt().mul(prompt).long().unique()
                    at = at[at >= sinks]
                    visible = (at + 1 - sinks).clamp(max=len(keys)).repeat_interleave(group)
                    index.build(of_group[:, at].transpose(0, 1).reshape(-1, head_dim), visible)
                asked = of_group[:, prompt:].flatten(0, 1)
                points = sweep(way, index, asked, keys, scale=head_dim**-0.5, target=target)
                row |= {f"{way}_scan": scan_at(points, target), f"{way}_mass": points[-1].mass}
            rows.append(row)
    return rows


def _empty(way: Way, dim: int, settings: GraphSettings | None) -> KeyGraph | IvfIndex | HnswIndex:
    makes: dict[Way, Callable[[], KeyGraph | IvfIndex | HnswIndex]] = {
        "graph": lambda: KeyGraph(dim, settings),
        "ivf": lambda: IvfIndex(dim),
        "hnsw": lambda: HnswIndex(dim),
    }
    return makes[way]()


def _built(way: Way, context: PlantedContext, settings: GraphSettings | None) -> tuple[KeyIndex, float]:
    """The index of the first KV head, and the seconds that building it took."""
    if way == "graph":
        settings = replace(settings or GraphSettings(), keep_every=1)  # the context has one query in some already
        selector = RoarGraphIndex(replace(context.shape, kv_heads=1), settings=settings)
        selector.add(context.keys[:1], context.values[:1])
        selector.observe(context.train_queries[: context.shape.group], context.train_positions)
        began_s = time.perf_counter()
        selector.build()
        return selector.graphs[0], time.perf_counter() - began_s
    index = _empty(way, context.shape.head_dim, None)
    index.add(context.keys[0])
    began_s = time.perf_counter()
    index.search(context.queries[0, :1].float(), 1)
    return index, time.perf_counter() - began_s


def _turn(index: KeyIndex, knob: int) -> None:
    if isinstance(index, KeyGraph):
        index.settings = replace(index.settings, Ls=knob)
    elif isinstance(index, IvfIndex):
        index.nprobe = knob
    elif isinstance(index, HnswIndex):
        index.efSearch = knob
