"""One rope table for all engines that rotate alike: derived from the config, and compared with the engine's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ...core import RopeSpec

_Row: TypeAlias = NDArray[np.float64]

_TOLERANCE = 1e-5  # relative, of a frequency: what two programs that compute the same table differ by
_SCALING_TOLERANCE = 2.0**-8  # relative, of the amplitude: engines read it from tables in bfloat16


def settled_rope(actual: RopeSpec, parameters: Mapping[str, Any] | None) -> RopeSpec:
    """The table that names an engine's rotation: the config's, if the engine's own agrees with it.

    Programs that compute the same table disagree about last digits, and keys depend on all digits. A table that the
    config does not explain is taken as it is: it names what the engine really does.

    Parameters
    ----------
    actual : the table that the engine rotates with.
    parameters : `rope_parameters` of the config; None if there are none.
    """
    derived = derived_rope(parameters or {}, 2 * len(actual.inv_freq), interleaved=actual.interleaved)
    if derived is None:
        return actual
    agrees = np.allclose(actual.inv_freq, derived.inv_freq, rtol=_TOLERANCE, atol=0.0) and math.isclose(
        actual.attention_scaling, derived.attention_scaling, rel_tol=_SCALING_TOLERANCE
    )
    return replace(derived, passed_channels=actual.passed_channels) if agrees else actual


def derived_rope(parameters: Mapping[str, Any], head_dim: int, *, interleaved: bool = False) -> RopeSpec | None:
    """The table of `rope_parameters` (transformers' names) in float64, rounded to float32; None for other kinds.

    Sources: RoFormer (arXiv 2104.09864), linear interpolation (2306.15595), YaRN (2309.00071), Llama 3.1's released
    code. Rounding makes the table equal on every machine.
    """
    try:
        kind, base = parameters.get("rope_type") or "default", float(parameters["rope_theta"])
        if float(parameters.get("partial_rotary_factor") or 1.0) != 1.0 or parameters.get("mrope_section"):
            return None
        plain: _Row = np.array([base ** (-2.0 * i / head_dim) for i in range(head_dim // 2)])
        factor, scaling = float(parameters.get("factor") or 1.0), 1.0
        if kind == "default":
            table = plain
        elif kind == "linear":
            table = plain / factor
        elif kind == "llama3":
            table = _llama3(plain, factor, parameters)
        elif kind == "yarn" and parameters.get("factor"):
            table, scaling = _yarn(plain, base, factor, parameters), _yarn_scaling(factor, parameters)
        else:
            return None
    except (LookupError, TypeError, ValueError, ArithmeticError):
        return None
    return RopeSpec(tuple(table.astype(np.float32).tolist()), float(np.float32(scaling)), interleaved)


def _llama3(plain: _Row, factor: float, parameters: Mapping[str, Any]) -> _Row:
    low, high = float(parameters["low_freq_factor"]), float(parameters["high_freq_factor"])
    turns = float(parameters["original_max_position_embeddings"]) * plain / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    mixed: _Row = (1.0 - smooth) * plain / factor + smooth * plain
    return mixed


def _yarn(plain: _Row, base: float, factor: float, parameters: Mapping[str, Any]) -> _Row:
    dim, length = 2 * len(plain), float(parameters["original_max_position_embeddings"])

    def channel_of(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = channel_of(float(parameters.get("beta_fast") or 32))
    high = channel_of(float(parameters.get("beta_slow") or 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / ((high - low) or 0.001), 0.0, 1.0)
    mixed: _Row = plain / factor * ramp + plain * (1.0 - ramp)
    return mixed


def _yarn_scaling(factor: float, parameters: Mapping[str, Any]) -> float:
    def amplitude(weight: float) -> float:
        return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    mscale, all_dim = parameters.get("mscale"), parameters.get("mscale_all_dim")
    return amplitude(float(mscale)) / amplitude(float(all_dim)) if mscale and all_dim else amplitude(1.0)
