"""How a fusion chooses the tokens that it recomputes, as settings and certificates state it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from ..calibration.certificate_gate import CertificateGate
from ..calibration.codec_form import canonical_json
from ..core import KVSpec
from .blender import Blender
from .choosers import CHOOSERS
from .correction import Correction

FUSION = "fusion"
"""Stands in these certificates in place of a codec's name."""

EngineChoice: TypeAlias = Literal[
    "deviation",
    "values",
    "first+values",
    "deviation+question",
    "values+question",
    "first+question",
    "borders+question",
    "question",
]
"""Choosers, by their names in `CHOOSERS`, that serving engines know, too."""

ENGINE_CHOICES: tuple[str, ...] = get_args(EngineChoice)

NEEDS_QUESTION = (
    "question",
    "first+question",
    "borders+question",
    "deviation+question",
    "values+question",
    "mean attention",
)
WITHOUT_DEVIATION = ("question", "first+question", "borders+question", "mean attention", "first", "none")


@dataclass(frozen=True, slots=True)
class FusionMethod:
    """A fusion that chooses tokens once and computes these tokens in all further layers.

    Serving engines fuse like this, because a token cannot leave their batch between two layers. Certificates are
    measured and bound to it.

    Attributes
    ----------
    ratio : share of the documents' tokens that is recomputed, 0 to 1; 1 is exact.
    select : name of the chooser.
    check_layer : whose keys and values it compares; without a meaning for `question`.
    correction : fingerprint of the `Correction` that cached documents get; empty for none.
    """

    ratio: float
    select: str = "borders+question"
    check_layer: int = 2
    correction: str = ""

    def __post_init__(self) -> None:
        if self.select not in CHOOSERS:
            raise ValueError(f"select is {self.select!r}; expected one of {', '.join(CHOOSERS)}")

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The parameters that a certificate of this fusion states, beside the model."""
        found: dict[str, Any] = {"ratio": self.ratio, "select": self.select, "check_layer": self.check_layer}
        return found | ({"correction": self.correction} if self.correction else {})

    @property
    def blender(self) -> Blender:
        """See `blender_with`, of a method without a correction."""
        return self.blender_with(None)

    def blender_with(self, correction: Correction | None) -> Blender:
        """A blender that fuses so.

        Raises
        ------
        ValueError : the correction is not that of the method.
        """
        given = "" if correction is None else correction.fingerprint
        if given != self.correction:
            raise ValueError(f"the method's correction is {self.correction or None}, the one given {given or None}")
        return Blender(self.ratio, CHOOSERS[self.select], 0.0, self.check_layer, correction)

    def full_layers(self, num_layers: int) -> int:
        """Layers that are computed for every token before tokens are chosen, in a model of so many layers."""
        return 0 if self.select in WITHOUT_DEVIATION else max(0, min(self.check_layer, num_layers - 2))

    def cost_ratio(self, num_layers: int, *, question_ratio: float = 0.0) -> float:
        """Share of full prefill's tokens that run through a layer, mean over layers.

        `question_ratio`: the question's tokens over the documents', where it is asked for the choice.
        """
        asked = question_ratio if self.select in NEEDS_QUESTION else 0.0
        full = self.full_layers(num_layers)
        return (full + self.ratio * (num_layers - 1 - full)) / num_layers + asked

    def at_cost(self, cost_ratio: float, num_layers: int, *, question_ratio: float = 0.0) -> FusionMethod | None:
        """The same method with the ratio that makes it cost as much; None if no ratio does."""
        free = replace(self, ratio=0.0).cost_ratio(num_layers, question_ratio=question_ratio)
        left = num_layers - 1 - self.full_layers(num_layers)
        ratio = (cost_ratio - free) * num_layers / left if left > 0 else math.nan
        return replace(self, ratio=round(min(ratio, 1.0), 3)) if ratio > 0 else None


EXACT = FusionMethod(1.0, "deviation")
"""Everything is computed, as long as nothing else is certified or asked for."""


def certified_fusion(
    gate: CertificateGate,
    spec: KVSpec,
    *,
    select: str | None = None,
    check_layer: int | None = None,
    correction: str = "",
) -> FusionMethod | None:
    """The cheapest fusion that a certificate covers for a model; None if none does.

    A certificate of the whole model covers each rank of tensor parallelism: ranks choose tokens together.

    Parameters
    ----------
    select, check_layer : the only ones wanted; None for any.
    correction : fingerprint of the one at hand; methods with another one are left out.
    """
    whole = replace(spec, num_kv_heads=spec.num_kv_heads * spec.shard[1], shard=(0, 1))
    found = []
    for one in gate.certificates:
        method = _method_of(one.parameters) if one.codec == FUSION else None
        if method is None or gate.covering((FUSION, canonical_json(method.parameters)), whole) is None:
            continue
        is_wanted = select in (None, method.select) and check_layer in (None, method.check_layer)
        if is_wanted and method.correction in ("", correction):
            found.append(method)
    return min(found, key=lambda method: (method.cost_ratio(spec.num_layers), method.ratio), default=None)


def _method_of(parameters: Mapping[str, Any]) -> FusionMethod | None:
    """The method of which a certificate states these parameters; None if it is none that engines know."""
    ratio, select, check_layer = (parameters.get(name) for name in ("ratio", "select", "check_layer"))
    correction = parameters.get("correction", "")
    known = 3 + ("correction" in parameters)
    if not isinstance(ratio, float | int) or not isinstance(check_layer, int) or len(parameters) != known:
        return None
    is_known = 0.0 <= ratio <= 1.0 and select in ENGINE_CHOICES and isinstance(correction, str)
    return FusionMethod(float(ratio), str(select), check_layer, correction) if is_known else None
