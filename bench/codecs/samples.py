"""Keys and values in the shape of an 8B model, and its profile. Synthetic: for bytes and speed, not for quality."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...calibration.model_profile import Profile
from ...compress.gram import GramMatrix
from ...compress.lowrank import fit_layer as fit_basis
from ...compress.nuq.nuq_fit import fit_layer as fit_levels
from ...core import KVChunk, KVSpec, RopeSpec

RANK = 160  # of keys before rotation (ShadowKV's, for an 8B model)
_NOISE = 0.02  # of what lies outside that space
_ROPE = RopeSpec(tuple(500000.0 ** -(i / 64) for i in range(64)))

SPEC_8B = KVSpec("synthetic-8b@1", 32, 8, 128, torch.float16, _ROPE)
CHUNK_TOKENS = 256


def chunk_8b(seed: int, *, tokens: int = CHUNK_TOKENS, start: int = CHUNK_TOKENS, spec: KVSpec = SPEC_8B) -> KVChunk:
    """Random keys of rank `RANK` before rotation and a little noise, with channels of unequal scale; random values.

    Parameters
    ----------
    start : position of the first token; behind the attention sinks by default.
    """
    random = torch.Generator().manual_seed(seed)
    positions = torch.arange(start, start + tokens)
    keys = _heads(_keys(spec, tokens, random), spec)
    keys = spec.shift(keys, positions)
    values = torch.randn(spec.num_layers, spec.num_kv_heads, tokens, spec.value_dim, generator=random)
    return KVChunk(spec, torch.arange(tokens) + seed, positions, keys.to(spec.dtype), values.to(spec.dtype))


def profile_8b(spec: KVSpec = SPEC_8B) -> Profile:
    """The profile that calibration would make, from one layer: all layers of `chunk_8b` are alike."""
    random = torch.Generator().manual_seed(1 << 20)
    keys = _keys(replace(spec, num_layers=1), 512, random)[0]
    values = torch.randn(512, spec.num_kv_heads * spec.value_dim, generator=random)
    ones = torch.ones
    layer = fit_levels(keys, ones(keys.shape), values, ones(values.shape), heads=spec.num_kv_heads)
    layer |= fit_basis(GramMatrix.from_keys(keys), rank=RANK)
    return Profile(spec, {name: torch.stack([tensor] * spec.num_layers) for name, tensor in layer.items()})


def _keys(spec: KVSpec, tokens: int, random: torch.Generator) -> Tensor:
    """`[L, tokens, M]` before rotation; the space and the scales of channels are the same for all seeds."""
    width, fixed = spec.num_kv_heads * spec.head_dim, torch.Generator().manual_seed(0)
    space = torch.randn(RANK, width, generator=fixed) / RANK**0.5
    scales = torch.randn(width, generator=fixed).mul(0.5).exp()
    inside = torch.randn(spec.num_layers, tokens, RANK, generator=random) @ space
    noise = torch.randn(inside.shape, generator=random)
    keys: Tensor = (inside + _NOISE * noise) * scales
    return keys


def _heads(rows: Tensor, spec: KVSpec) -> Tensor:
    heads: Tensor = rows.unflatten(-1, (spec.num_kv_heads, spec.head_dim)).transpose(1, 2)
    return heads
