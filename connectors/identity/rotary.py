"""How the rotary modules of vLLM and SGLang, which are of one origin, rotate keys: checked against their own tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core import RopeSpec
from ...errors import EngineError

_CHECKED_TOKENS = 4096
_TOLERANCE = 0.02  # of a cosine: tables may be in bfloat16, and angles far out are rounded; a wrong table is off by 2


def spec_of_rotary(rotary: Any, head_dim: int) -> RopeSpec:
    """How a rotary module rotates keys of `head_dim` channels.

    Raises
    ------
    EngineError : the rotation is of an unknown kind: its table is not that of its frequencies, or covers a part of the
        head that cannot be told apart.
    """
    table = getattr(rotary, "cos_sin_cache", None)
    if table is None or table.ndim != 2 or not hasattr(rotary, "_compute_inv_freq"):
        raise EngineError(f"rotary module {type(rotary).__name__} has no table of cosines and sines that kvloom knows")
    rows = table[:_CHECKED_TOKENS].detach().float().cpu()
    scaling = float(rows[0, 0])  # the cosine of nothing
    for frequencies in _candidates(rotary):
        spec = RopeSpec(tuple(frequencies.tolist()), scaling, interleaved=not rotary.is_neox_style)
        cos, sin = spec.cos_sin(torch.arange(len(rows)))
        expected = torch.cat((cos, sin), dim=-1) * scaling
        if expected.shape == rows.shape and float((expected - rows).abs().max()) <= _TOLERANCE * max(scaling, 1.0):
            return _padded(spec, head_dim)
    raise EngineError(f"the table of rotary module {type(rotary).__name__} is not that of its frequencies")


def _candidates(rotary: Any) -> list[Tensor]:
    """Frequencies as the kinds of vLLM's and SGLang's rotary modules compute them, from one argument or the other."""
    found = []
    for name in ("base", "scaling_factor"):
        argument = getattr(rotary, name, None)
        if isinstance(argument, int | float) and argument > 0:
            # There is no public name for it; what it gives is checked against the table.
            frequencies = rotary._compute_inv_freq(argument).detach().float().cpu()  # noqa: SLF001
            found.append(frequencies)
            factor = getattr(rotary, "scaling_factor", None)
            if isinstance(factor, int | float) and factor > 0:
                found.append(frequencies / factor)
    return found


def _padded(spec: RopeSpec, head_dim: int) -> RopeSpec:
    """A rotation of the first channels only turns the rest by nothing, where pairs are neighbours."""
    missing = head_dim // 2 - len(spec.inv_freq)
    if missing == 0:
        return spec
    if not spec.interleaved or missing < 0:
        raise EngineError(f"the rotation covers {2 * len(spec.inv_freq)} of {head_dim} channels, in halves")
    return RopeSpec(spec.inv_freq + (0.0,) * missing, spec.attention_scaling, interleaved=True)
