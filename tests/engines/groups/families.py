"""Families of models that run in stock vLLM in these tests, tiny and random; docs/models.md prints them.

`python -m kvloom.tests.engines.groups.families` writes the table anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW = 100  # tokens; neither chunks nor blocks divide it


@dataclass(frozen=True)
class Family:
    """A model that vLLM serves with its defaults.

    Attributes
    ----------
    architecture, config : see `make_model`.
    groups : kinds of KV cache groups that vLLM makes of it.
    blocks : of the whole cache, so few that eight requests of 290 tokens do not fit.
    """

    architecture: str
    config: dict[str, Any]
    groups: tuple[str, ...]
    blocks: int


_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 128}
_LLAMA4 = {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size": 128, "intermediate_size_mlp": 256}

FAMILIES: dict[str, Family] = {
    "Gemma 3": Family("gemma3", {"sliding_window": WINDOW}, ("full", "window"), 200),
    "GPT-OSS": Family("gpt-oss", {"sliding_window": WINDOW, **_MOE}, ("full", "window"), 90),
    "Cohere2": Family("cohere2", {"sliding_window": WINDOW}, ("full", "window"), 200),
    "Llama 4": Family("llama4", {"attention_chunk_size": 96, **_LLAMA4}, ("full", "local"), 110),
    "Mistral with windows": Family("mistral", {"sliding_window": WINDOW}, ("window",), 36),
}

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
    "rope_theta": 500000.0,
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama, two ranks": ("llama", {}, {"tensor_parallel_size": 2}),
    "Llama, compiled": ("llama", {"rope_parameters": LLAMA3}, {"enforce_eager": False}),
    "Mistral, larger blocks than chunks": ("mistral", {}, {"block_size": 128}),
    "Qwen2": ("qwen2", {}, {}),
    "Qwen3, YaRN": ("qwen3", {"rope_parameters": YARN}, {}),
    "Phi-3": ("phi3", {}, {}),
    "Gemma": ("gemma", {}, {}),
    "GLM-4, part of a head rotated": ("glm4", {"partial_rotary_factor": 0.5}, {}),
    "Gemma 3, one group for all windows, not fused": (  # layers with a window rotate otherwise than those without
        "gemma3",
        {"sliding_window": 128},
        {"disable_hybrid_kv_cache_manager": True},
    ),
}
"""Models of one KV cache group: architecture, config and engine options of each."""

PAGE = Path(__file__).parents[3] / "docs" / "models.md"
_BEGIN, _END = "<!-- vllm: begin -->", "<!-- vllm: end -->"
_KINDS = {"full": "full attention", "window": "sliding window", "local": "chunked local attention"}


def section() -> str:
    """The table of docs/models.md."""
    lines = ["| family | layers | prefix | fusion |", "|---|---|---|---|"]
    for title in CASES:
        fusion = "off" if "not fused" in title else "exact at ratio 1"
        lines.append(f"| {title.removesuffix(', not fused')} | one group | exact | {fusion} |")
    for title, family in FAMILIES.items():
        lines.append(f"| {title} | {', '.join(_KINDS[group] for group in family.groups)} | exact | off |")
    return "\n".join(lines)


def committed() -> str:
    """The table as docs/models.md has it."""
    return PAGE.read_text().split(_BEGIN)[1].split(_END)[0].strip()


def write() -> None:
    """Put the table into docs/models.md."""
    text = PAGE.read_text()
    before, after = text.split(_BEGIN)[0], text.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n\n{section()}\n\n{_END}{after}")


if __name__ == "__main__":
    write()
