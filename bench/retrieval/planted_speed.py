"""Search, speed and size at the 8B shape: SYNTHETIC contexts with planted queries, see `planted.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from ...evaluation.report import Metric
from ...retrieval.factor.key_factor import KeyFactor
from ...retrieval.landmarks import LandmarkIndex
from ...retrieval.selector import LayerShape
from ..codecs.samples import RANK, SPEC_8B, chunk_8b
from ..codecs.speed import QUERY_HEADS
from .decode_speed import DecodeSpeed, decode_speed
from .graph_speed import planted_figures
from .key_bytes import KeyBytes, key_bytes
from .methods import named
from .planted import planted

LEAST_MASS = 0.95
SMALL_BUILD = ("graph",)  # decoded over two KV heads: graphs of all eight take minutes to build
SINKS, WINDOW = 16, 256
OUTLIER_TOKENS = 48 * 8  # ShadowKV's, for each KV head
KEY_ROW_BITS = (16, 8, 4)
FAR, LIKE_KEYS = "far", "like keys"


@dataclass(frozen=True, slots=True)
class PlantedSizes:
    """How much is measured: tokens of contexts, of which two are searched and decoded over.

    Attributes
    ----------
    pair : the sizes of the figures that end in `_128k` and `_512k`.
    kv_heads, steps : of decoding; see `SMALL_BUILD`.
    asked : queries that are searched for.
    control : tokens of the context whose queries are like its keys.
    keys : tokens whose key bytes are counted.
    """

    pair: tuple[int, int]
    kv_heads: int
    steps: int
    asked: int
    control: int
    keys: int


FULL = PlantedSizes((131_072, 524_288), 8, 24, 32, 32_768, 131_072)
QUICK = PlantedSizes((1024, 2048), 1, 2, 4, 1024, 1024)


@dataclass(frozen=True, slots=True, eq=False)
class PlantedFound:
    """What was measured: searches as `planted_figures` gives them, decode steps, key bytes by (row bits, index)."""

    sizes: PlantedSizes
    searches: Sequence[Mapping[str, Any]]
    steps: Sequence[DecodeSpeed]
    keys: Mapping[tuple[int, str], KeyBytes] = field(default_factory=dict)

    def search(self, tokens: int, asking: str = FAR) -> Mapping[str, Any]:
        """The search over a context of this many tokens."""
        return next(s for s in self.searches if (s["tokens"], s["asking"]) == (tokens, asking))

    def metrics(self) -> dict[str, Metric]:
        """The figures, by name."""
        small, large = self.search(self.sizes.pair[0]), self.search(self.sizes.pair[1])
        found = {f"{way}_scan_at_recall95_128k": _scan(small, way) for way in small["scan"]}
        graph = _scan(small, "graph").value
        for way in ("ivf", "hnsw"):
            ratio = _scan(small, way).value / graph
            found[f"{way}_scan_vs_graph_128k"] = Metric(ratio, unit="times", baseline="graph")
        growth = _scan(large, "graph").value * self.sizes.pair[1] / (graph * self.sizes.pair[0])
        found["graph_scan_growth_128k_512k"] = Metric(growth, unit="times, keys compared")
        found["graph_bytes_per_token_layer_8b"] = Metric(small["bytes_per_token_layer_8b"], unit="bytes")
        found["build_time_vs_prefill"] = Metric(small["build_time_vs_prefill"], unit="share", baseline="graph, 128K")
        for name, tokens in zip(("128k", "512k"), self.sizes.pair, strict=True):
            best = self._fastest(tokens)
            found[f"decode_speedup_{name}"] = replace(best.speedup, baseline=f"{best.selector} against {best.dense}")
            found[f"decode_mass_{name}"] = Metric(best.mass, unit="share", baseline=best.selector)
        found["shadowkv_key_bytes_ratio"] = Metric(self.keys[16, "factor"].ratio, unit="times")
        found["shadowkv_key_bytes_ratio_int4"] = Metric(self.keys[4, "factor"].ratio, unit="times")
        return found

    def rows(self) -> list[dict[str, object]]:
        """Plain values by name."""
        rows: list[dict[str, object]] = [{"what": "search", **search} for search in self.searches]
        rows += [{"what": "decode", **step.row()} for step in self.steps]
        for (bits, index), parts in self.keys.items():
            rows.append(
                {"what": "key bytes", "row_bits": bits, "chosen_by": index, **asdict(parts), "ratio": parts.ratio}
            )
        return rows

    def _fastest(self, tokens: int) -> DecodeSpeed:
        """The fastest decode step that recovers enough mass; if none does, the one that recovers most."""
        of_size = [step for step in self.steps if step.tokens == tokens]
        enough = [step for step in of_size if step.mass >= LEAST_MASS]
        return max(enough, key=lambda s: s.speedup.value) if enough else max(of_size, key=lambda s: s.mass)


def measure_planted(sizes: PlantedSizes, bar: Progress) -> PlantedFound:
    """Searches with the graph, IVF and HNSW; decode steps; bytes of keys."""
    task = bar.add_task("planted contexts", total=6)

    def step(work: Callable[[], Any]) -> Any:
        found = work()
        bar.advance(task)
        return found

    small, large = sizes.pair
    searches = [
        step(partial(planted_figures, small, queries=sizes.asked)),
        # building HNSW over as many keys would take longer than all the rest
        step(partial(planted_figures, large, queries=sizes.asked, ways=("graph", "ivf"))),
        step(partial(planted_figures, sizes.control, queries=sizes.asked, asking="like keys")),
    ]
    decoded = {
        "landmarks": named("landmarks"),
        "sketch": named("sketch"),
        "graph": named("graph", threads=torch.get_num_threads()),
    }
    steps: list[DecodeSpeed] = []
    for tokens in sizes.pair:
        for heads, is_small in ((sizes.kv_heads, False), (min(2, sizes.kv_heads), True)):
            ways = {name: partial(make, 0) for name, make in decoded.items() if (name in SMALL_BUILD) == is_small}
            # of 16 bits, dense attention is several times as fast over bfloat16 as over float16
            contexts = partial(
                planted, kv_heads=heads, group=QUERY_HEADS // 8, queries=sizes.steps, dtype=torch.bfloat16
            )
            steps += decode_speed([tokens], ways, contexts, mass=LEAST_MASS, bar=bar)
        bar.advance(task)
    return PlantedFound(sizes, searches, steps, step(partial(all_key_bytes, sizes.keys)))


def all_key_bytes(tokens: int) -> dict[tuple[int, str], KeyBytes]:
    """ShadowKV's keys, by bits of a row and by what chooses: the factor itself, or landmarks with outliers."""
    spec = replace(SPEC_8B, num_layers=1)
    shape = LayerShape(8, QUERY_HEADS // 8, 128, 128**-0.5, spec.rope_of(0))
    chunk = chunk_8b(0, tokens=tokens, start=0, spec=spec)
    covered = slice(SINKS, tokens - WINDOW)
    landmarks = LandmarkIndex(shape, start=SINKS)
    landmarks.add(chunk.keys[0, :, covered], chunk.values[0, :, covered])
    found = {}
    for bits in KEY_ROW_BITS:
        factor = KeyFactor.fit(shape, chunk.keys[0, :, covered], rank=RANK, start=SINKS, row_bits=bits)
        pinned = SINKS + WINDOW
        found[bits, "factor"] = key_bytes(factor, pinned_tokens=pinned)
        found[bits, "landmarks"] = key_bytes(
            factor, pinned_tokens=pinned, outlier_tokens=OUTLIER_TOKENS, index_bytes=landmarks.held_bytes
        )
    return found


def _scan(search: Mapping[str, Any], way: str) -> Metric:
    """Share of keys compared for the recall wanted; if none of its settings reaches it, for what it does reach."""
    scan = search["scan"][way]
    if scan is not None:
        return Metric(scan, unit="share")
    last = search["points"][way][-1]
    return Metric(last["scan_ratio"], unit="share", baseline=f"a bound: recall is {last['recall']:.3f}")
