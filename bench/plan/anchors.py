"""What others have published, beside what a plan says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...evaluation.page import Row, Table
from .machines import GPUS, Assumptions
from .setup import gpu_machine
from .shapes import KNOWN, spelled_shape


@dataclass(frozen=True, slots=True)
class Anchor:
    """A published figure.

    Attributes
    ----------
    predict : what a plan says.
    source : who published it.
    """

    what: str
    published: int
    predict: Callable[[], float]
    source: str

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what is published."""
        return self.predict() / self.published - 1


_LATENT = "layers=61,kv_heads=1,head_dim=576,value_dim=0,params=671e9"


def _spelled(layers: int) -> str:
    return f"layers={layers},kv_heads=8,head_dim=128,params={layers * 1e9:g}"


def token_bytes(text: str) -> float:
    """Bytes of a token's KV in a spelled shape."""
    return float(spelled_shape(text).spec().token_bytes)


def params(name: str) -> float:
    """Weights of a known model."""
    return KNOWN[name]().params


def fused_layer_ms(name: str, gpus: int) -> float:
    """Milliseconds a layer to compute 15 % of 4,096 tokens on A40."""
    shape, roomy = (
        KNOWN[name](),
        replace(GPUS["a40-48g"], memory=1e12),
    )  # weights in 8 bits fit, which are computed in 16
    cost = gpu_machine(shape, roomy, Assumptions(step_s=0.0), gpus).prefill
    return 1e3 * cost.scattered_s(0.15 * 4096, 4096) / shape.layers


def load_layer_ms(name: str) -> float:
    """Milliseconds a layer to read 4,096 tokens from a disk of 4.8 GB/s."""
    shape = KNOWN[name]()
    return 1e3 * 4096 * shape.spec().token_bytes / shape.layers / 4.8e9


_TABLE, _CONTROLLER = "arXiv 2505.09343, table 1", "arXiv 2405.16444, loading controller"

ANCHORS = (
    Anchor("bytes a token, Llama-3.1-8B", 131072, lambda: token_bytes(_spelled(32)), "its configuration"),
    Anchor("bytes a token, DeepSeek-V3 (MLA)", 70272, lambda: token_bytes(_LATENT), _TABLE),
    Anchor("bytes a token, Qwen2.5-72B", 327680, lambda: token_bytes(_spelled(80)), _TABLE),
    Anchor("bytes a token, Llama-3.1-405B", 516096, lambda: token_bytes(_spelled(126)), _TABLE),
    Anchor("weights, Llama-3.1-8B", 8030261248, lambda: params("llama-3.1-8b"), "its checkpoint"),
    Anchor("weights, Llama-3.1-70B", 70553706496, lambda: params("llama-3.1-70b"), "its checkpoint"),
    Anchor("weights, Mistral-7B", 7241732096, lambda: params("mistral-7b"), "its checkpoint"),
    Anchor("weights, Qwen2.5-7B", 7615616512, lambda: params("qwen2.5-7b"), "its checkpoint"),
    Anchor("ms a layer, 15 % of 4K computed, 7B", 3, lambda: fused_layer_ms("llama-2-7b", 1), _CONTROLLER),
    Anchor("ms a layer, 15 % of 4K computed, 70B", 7, lambda: fused_layer_ms("llama-3.1-70b", 2), _CONTROLLER),
    Anchor("ms a layer, 4K read from a disk, 7B", 16, lambda: load_layer_ms("llama-2-7b"), _CONTROLLER),
    Anchor("ms a layer, 4K read from a disk, 70B", 4, lambda: load_layer_ms("llama-3.1-70b"), _CONTROLLER),
)
"""Published figures. Times are of A40 GPUs and a disk of 4.8 GB/s, by other software."""


def anchor_table() -> Table:
    """Published figures beside a plan's, with the difference."""
    cells: list[Row] = []
    for each in ANCHORS:
        planned = each.predict()
        shown = f"{planned:,.4g}" if each.published < 100 else f"{planned:,.0f}"
        cells.append([each.what, f"{each.published:,}", shown, f"{each.error:+.1%}", each.source])
    return Table(["figure", "published", "planned", "off by", "source"], cells, "published figures", left=(0, 4))
