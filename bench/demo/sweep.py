"""Curves of the demo's report: what a request costs and gives as documents and the recompute ratio change."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ...connectors.hf.connector import TransformersConnector
from ...evaluation.fused_answers import FULL, HOST_BYTES, NAIVE, PREFIX, Method, blend, own, score
from ...evaluation.intervals import spread
from ...evaluation.models import load_model, token_counter
from ...evaluation.page import Plot, Point
from ...evaluation.report import Metric
from ...evaluation.texts import read_documents
from ...evaluation.wording import frame_of
from ...evaluation.workload import task_cases
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ...kvstore.tiers.host import HostTier


def sweep(model_dir: Path | None, docs: Path | None, store_dir: Path, *, quick: bool) -> tuple[Plot, Plot]:
    """TTFT against the number of chunks, and exact match against the recompute ratio."""
    model, tokenizer = load_model(model_dir)
    texts = None if docs is None else read_documents(docs)
    count_tokens, frame = token_counter(tokenizer), frame_of(tokenizer)
    times: dict[str, list[Point]] = {}
    quality: dict[str, list[Point]] = {}
    with KVStore([HostTier(HOST_BYTES), DiskTier(store_dir)]) as store:
        connector = TransformersConnector(model, tokenizer, store, lead_ids=frame.lead_ids)
        longest = connector.layers.max_tokens - 128
        for chunks in (2, 4) if quick else (2, 4, 8, 16):
            context = min(chunks * (128 if quick else 512), longest)
            cases = task_cases(
                texts,
                count_tokens,
                kind="record",
                count=2 if quick else 3,
                context_tokens=context,
                num_documents=chunks,
                seed=1,
                frame=frame,
            )
            connector.precompute([d for case in cases for d in case.documents])
            for s in score(connector, cases, [FULL, PREFIX, NAIVE, blend(0.15), own(0.15)]):
                middle, low, high = (1e3 * t for t in spread([o.ttft_s for o in s.outcomes]))
                times.setdefault(s.method.name, []).append(Point(chunks, middle, low, high))
        cases = task_cases(
            texts,
            count_tokens,
            kind="record",
            count=2 if quick else 24,
            context_tokens=min(1024, longest),
            seed=2,
            frame=frame,
        )
        connector.precompute([d for case in cases for d in case.documents])
        ratios = (0.0, 0.15, 1.0) if quick else (0.0, 0.02, 0.05, 0.1, 0.15, 0.3, 0.5, 1.0)
        ways: dict[str, Callable[[float], Method]] = {
            "kvloom": own,
            "CacheBlend": blend,
            "first tokens": partial(blend, chooser="first"),
            "random tokens": partial(blend, chooser="random"),
        }
        for name, way in ways.items():
            methods = [FULL, *map(way, ratios)]
            for ratio, s in zip(ratios, score(connector, cases, methods)[1:], strict=True):
                share = Metric.of_share(sum(s.known), len(s.known))
                quality.setdefault(name, []).append(Point(ratio, share.value, share.low, share.high))
    return (
        Plot("documents", "TTFT, ms", times, "Documents of equal length; the band is the 10th to 90th percentile."),
        Plot("recompute ratio", "exact match", quality, "Cross-document records; the band is the 95 % interval."),
    )
