"""The share of tokens that a fusion must recompute, as certificates of fusions state it (`kvloom certify --fusion`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..calibration.certificate_gate import CertificateGate
from ..calibration.codec_form import canonical_json
from ..core import KVSpec
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


def certified_ratio(gate: CertificateGate, spec: KVSpec, *, check_layer: int) -> float:
    """The smallest recompute ratio that a certificate covers for a model, 1 if none does.

    A certificate of the whole model covers each rank of tensor parallelism: ranks choose tokens together.

    Parameters
    ----------
    check_layer : layer at which tokens are chosen.
    """
    whole = replace(spec, num_kv_heads=spec.num_kv_heads * spec.shard[1], shard=(0, 1))
    ratios = [one.parameters.get("ratio") for one in gate.certificates if one.codec == FUSION]
    usable = [ratio for ratio in ratios if isinstance(ratio, float | int) and 0.0 <= ratio <= 1.0]
    forms = [(ratio, canonical_json({**parameters_of_fusion(ratio), "check_layer": check_layer})) for ratio in usable]
    return min((float(ratio) for ratio, text in forms if gate.covering((FUSION, text), whole)), default=1.0)
