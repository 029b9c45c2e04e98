"""What share of its tokens a fusion has to compute: what certificates of fusions say, see `kvloom certify --fusion`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..calibration.certificate import Certificate
from .blender import Blender
from .selection import by_deviation

FUSION = "fusion"
"""What these certificates bear in the place of a codec's name."""


def choosing_once(ratio: float) -> Blender:
    """Fuses as engines do that cannot drop tokens on their way: tokens are chosen once, behind the first layer, and the
    same ones go through all that follow. What certificates are measured with.
    """
    return Blender(ratio, by_deviation, spread_ratio=0.0)


def parameters_of_fusion(ratio: float) -> Mapping[str, Any]:
    """What a certificate is bound to beside the model."""
    return {"ratio": ratio, "select": "deviation", "check_layer": 1}


def certified_ratio(certificate: Certificate, check_layer: int) -> float | None:
    """The share that it permits where tokens are chosen at that layer; None if it permits none."""
    parameters = certificate.parameters
    if certificate.codec != FUSION or not certificate.passed:
        return None
    ratio = parameters.get("ratio")
    if not isinstance(ratio, float | int) or not 0.0 <= ratio <= 1.0:
        return None
    is_ours = dict(parameters) == {**parameters_of_fusion(ratio), "check_layer": check_layer}
    return float(ratio) if is_ours else None
