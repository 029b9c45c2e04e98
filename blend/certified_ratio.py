"""The share of tokens that a fusion must recompute, as certificates of fusions state it (`kvloom certify --fusion`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..calibration.certificate import Certificate
from .blender import Blender
from .choosers import by_deviation

FUSION = "fusion"
"""Stands in these certificates in place of a codec's name."""


def choosing_once(ratio: float) -> Blender:
    """A blender that chooses tokens once, after the first layer, and computes these tokens in all further layers.

    Serving engines fuse like this, because a token cannot leave their batch between two layers. Certificates are
    measured with this blender.
    """
    return Blender(ratio, by_deviation, spread_ratio=0.0)


def parameters_of_fusion(ratio: float) -> Mapping[str, Any]:
    """The parameters that a certificate of fusion states, beside the model."""
    return {"ratio": ratio, "select": "deviation", "check_layer": 1}


def certified_ratio(certificate: Certificate, check_layer: int) -> float | None:
    """The recompute ratio that a certificate permits if tokens are chosen at `check_layer`; None if it permits none."""
    parameters = certificate.parameters
    if certificate.codec != FUSION or not certificate.passed:
        return None
    ratio = parameters.get("ratio")
    if not isinstance(ratio, float | int) or not 0.0 <= ratio <= 1.0:
        return None
    is_ours = dict(parameters) == {**parameters_of_fusion(ratio), "check_layer": check_layer}
    return float(ratio) if is_ours else None
