"""What a hit takes, and loads, in a model most of whose layers have sliding windows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from ...evaluation.page import Row, Table
from ...evaluation.report import Metric
from ..harness.rounds import interleave
from .bed import CHUNK_TOKENS, KVLOOM_MEMORY, KVLOOM_WHOLE, PLAIN, Bed
from .families import VOCABULARY, make_tiny_model
from .inputs import Prompts
from .tables import times_table
from .times import FULL, HOST, Timed, expect_loaded

WHAT = "time to first token, with windows"
WINDOWED = "random model, five of six layers with windows"
WHOLE = "kvloom, prefix from the host tier, windows kept whole (--disable-hybrid-kv-cache-manager)"


@dataclass(frozen=True, slots=True)
class WindowSizes:
    """How much is measured: `config` is that of a random Gemma 3; `compares`: with windows kept whole, too."""

    config: Mapping[str, Any]
    prompt_tokens: int
    rounds: int
    compares: bool = True


FULL_WINDOWS = WindowSizes(
    {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "sliding_window": 512,
        "max_position_embeddings": 8192,
    },
    prompt_tokens=4632,
    rounds=5,
)
QUICK_WINDOWS = WindowSizes({"sliding_window": 128}, prompt_tokens=1048, rounds=2, compares=False)


@dataclass(frozen=True, slots=True)
class WindowedHit:
    """Times to the first token, and bytes that kvloom loaded for the prompt, by way; of vLLM alone none."""

    timed: Timed
    loaded_bytes: Mapping[str, int]

    def ratio(self) -> Metric:
        """Time of a hit over that of computing the prompt, the median of the ratios within each round."""
        return self.timed.ratio(HOST, FULL)

    def byte_ratio(self) -> Metric | None:
        """Bytes of a hit over those where windows are kept whole; None if that was not measured."""
        whole = self.loaded_bytes.get(WHOLE)
        return None if whole is None else Metric(self.loaded_bytes[HOST] / whole, unit="times", baseline=WHOLE)

    def note(self) -> str:
        """How many bytes a hit loaded, and of what."""
        words = f"A hit in the model with windows loaded {self.loaded_bytes[HOST] / 2**20:,.1f} MiB"
        whole = self.loaded_bytes.get(WHOLE)
        return f"{words}." if whole is None else f"{words}; with all tokens of all layers, {whole / 2**20:,.1f} MiB."

    def table(self) -> Table:
        table = times_table(self.timed)
        rows: list[Row] = []
        for row, way in zip(table.rows, self.timed.seconds, strict=True):
            nbytes = self.loaded_bytes.get(way)
            rows.append([*row, "" if nbytes is None else f"{nbytes / 2**20:,.1f}"])
        return Table([*table.columns, "MiB loaded"], rows, table.caption)

    def rows(self) -> list[dict[str, object]]:
        """Plain values by name."""
        return [row | {"loaded_bytes": self.loaded_bytes.get(str(row["way"]))} for row in self.timed.rows()]


def time_windowed_hit(place: Path, sizes: WindowSizes, bar: Progress) -> WindowedHit:
    """Ask plain vLLM and kvloom for the same prompt in turn, each with an empty cache of vLLM's own.

    Raises
    ------
    VLLMError : an engine failed, or served a request otherwise than its row says.
    """
    make_tiny_model(place / "windowed", "gemma3", **sizes.config)
    engines = {FULL: PLAIN, HOST: KVLOOM_MEMORY}
    if sizes.compares:
        engines[WHOLE] = KVLOOM_WHOLE
    prompt = Prompts(VOCABULARY, (), seed=5).ids(sizes.prompt_tokens)
    found = len(prompt) // CHUNK_TOKENS * CHUNK_TOKENS
    loaded_bytes: dict[str, int] = {}
    (place / "windows").mkdir()
    with Bed(WINDOWED, place / "windowed", place / "windows", max_tokens=sizes.prompt_tokens + 256) as bed:

        def ask(way: str) -> float:
            engine = bed[engines[way]]
            engine.reset()
            served = engine.generate([prompt])
            if way != FULL:
                expect_loaded(way, served, [{"host": found}])
                loaded_bytes[way] = served.loaded_bytes
            return served.seconds

        for way, name in engines.items():
            bed[name].generate([prompt])
            if way != FULL:
                bed[name].settle()
        ways = {way: lambda way=way: ask(way) for way in engines}
        seconds = interleave(ways, sizes.rounds, bar, f"time to first token, {WINDOWED}")
    return WindowedHit(Timed(WHAT, WINDOWED, len(prompt), FULL, seconds), loaded_bytes)
