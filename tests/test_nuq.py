"""KVQuant's codec against its contract, its algebra, its bytes and damaged chunks."""

import hashlib
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.compress import dequantise as dequantise_module
from kvloom.compress.dequantise import Codes, Grid, Rotation, dequantise, dequantise_slowly
from kvloom.compress.nuq import NuqCodec
from kvloom.compress.nuq_fit import fit_layer
from kvloom.compress.ops import pack_bits
from kvloom.compress.profile import Profile
from kvloom.compress.slots import pack_channels, slot_bytes, slot_count, unpack_channels
from kvloom.compress.values import EncodesValues
from kvloom.core import EncodedChunk, KVChunk, KVSpec, RopeSpec
from kvloom.errors import CodecError, SpecMismatchError
from kvloom.kvstore.format import from_bytes, to_buffers

from .contracts import SPEC, CodecContract, make_chunk, make_key, same_bits, same_blob, same_chunk


def make_profile(spec: KVSpec = SPEC, *, bits: Sequence[int] = (1, 2, 3, 4, 5, 6, 7, 8), tokens: int = 400) -> Profile:
    """Fitted to normal numbers, as `make_chunk` draws them; rotation does not change their distribution."""
    random = torch.Generator().manual_seed(1)
    layers = []
    for _ in range(spec.num_layers):
        keys = torch.randn(tokens, spec.num_kv_heads * spec.head_dim, generator=random)
        values = torch.randn(tokens, spec.num_kv_heads * spec.value_dim, generator=random)
        layers.append(
            fit_layer(keys, torch.ones_like(keys), values, torch.ones_like(values), heads=spec.num_kv_heads, bits=bits)
        )
    return Profile(spec, {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]})


PROFILE = make_profile()


class ModelCodec(NuqCodec):
    """Chooses the profile by the chunk's spec, for a contract that has four."""
