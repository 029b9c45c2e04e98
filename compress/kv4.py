"""KV4 with SmoothAttention: integers of 4 bits for each head and token, keys divided by smoothing factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..calibration.model_profile import Profile
from ..core import EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError
from .envelope import codec_from_parameters, open_envelope, seal
from .exact import EXACT_PARTS, take_exact, unusual_tokens
from .rotation import KeyRotation, unrotated
from .uniform import PARTS, Grouping, dequantize, quantize

PROFILE_NAME = "smooth.keys"

_KEYS = frozenset(f"keys{part}" for part in PARTS + EXACT_PARTS)
_VALUES = frozenset(f"values{part}" for part in PARTS + EXACT_PARTS)


@dataclass(frozen=True)
class Kv4Codec:
    """Asymmetric integers with a float16 scale and zero for each head and token (QServe, arXiv 2405.04532; COMET).

    Keys are divided by the profile's factors first, which even out their channels (SmoothAttention), and multiplied by
    them while decoding: the factors of an engine's weights need not change. Tokens with NaN, infinity or numbers beyond
    16384 stay exact.

    Keys are coded after rotation, as published: a group lies within one token, so that it gains nothing from channels
    that keep their size, and a chunk that stays in place needs no rotation. One that moves is rotated once, in float32.

    Attributes
    ----------
    bits : 4, or 8.
    profile : with `smooth.keys` (`fit_smoothing` for each layer, `[L, H, D]` float32); None divides by 1.
    rotated : False codes keys before rotation, for comparison.
    """

    name: ClassVar[str] = "kv4"
    is_lossless: ClassVar[bool] = False

    bits: int = 4
    profile: Profile | None = None
    rotated: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or self.bits not in (4, 8):
            raise ValueError(f"bits is {self.bits!r}; expected 4 or 8")
        if not isinstance(self.rotated, bool):
            raise TypeError(f"rotated is {self.rotated!r}; expected a bool")

    @property
    def value_names(self) -> frozenset[str]:
        """See `EncodesValues`."""
        return _VALUES

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """On the device of the chunk, in float32.

        Raises
        ------
        SpecMismatchError : the profile is another model's.
        CodecError : the profile has no usable factors.
        """
        spec, keys = chunk.spec, chunk.keys.detach()
        plain = keys.float() if self.rotated else unrotated(spec, keys, chunk.positions)
        unusual = unusual_tokens(keys)
        factors = _factors(self.profile, spec, chunk.first_layer, len(keys))
        if factors is not None:
            factors = factors.to(keys.device)[:, :, None]
            plain = plain / factors
            # The error of a channel is its factor times that of the group: no product of any two may be too large.
            unusual = unusual | unusual_tokens(plain * factors.amax(-1, keepdim=True))
        tensors = quantize("keys", plain, self.bits, Grouping(1, 1, max(1, spec.head_dim)), unusual)
        tensors |= take_exact("keys", keys, unusual)
        tensors |= self.encode_values(spec, chunk.values, chunk.first_layer)
        return seal(self, chunk, tensors, _KEYS | _VALUES)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`.

        Raises
        ------
        CodecError : `blob` was not made by this codec with this profile, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token, or the profile is another model's.
        """
        envelope = open_envelope(blob, self.name, _KEYS | _VALUES)
        spec, tokens, first = envelope.spec, envelope.tokens, envelope.first_layer
        encoder = codec_from_parameters(Kv4Codec, envelope.parameters, beside=("profile",))
        made_with, has = envelope.parameters.get("profile"), self.profile and self.profile.fingerprint
        if made_with != has:
            raise CodecError(f"kv4 chunk was encoded with profile {made_with}, this codec has {has}; give it that one")
        factors = _factors(self.profile, spec, first, envelope.num_layers)
        placed = envelope.placed(positions)
        rotation = KeyRotation.to(placed, envelope, rotated=encoder.rotated)
        shape = (envelope.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
        keys = _decode(blob.tensors, "keys", spec.dtype, shape, encoder.bits, rotation, factors)
        values = self.decode_values(spec, blob.tensors, first, tokens, envelope.parameters)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, first)

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """See `EncodesValues`."""
        values = values.detach()
        unusual = unusual_tokens(values)
        coded = quantize("values", values.float(), self.bits, Grouping(1, 1, max(1, spec.value_dim)), unusual)
        return coded | take_exact("values", values, unusual)

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """See `EncodesValues`."""
        codes = tensors["values"]
        shape = (len(codes) if codes.ndim else 0, spec.num_kv_heads, tokens, spec.value_dim)
        encoder = codec_from_parameters(Kv4Codec, parameters, beside=("profile",))
        return _decode(tensors, "values", spec.dtype, shape, encoder.bits)


def fit_smoothing(keys: Tensor, alpha: float = 0.5, *, interleaved: bool = False) -> Tensor:
    """Factors of one layer's channels: `max |K_i| ** alpha`, the greater of both in each pair that rotates together.

    Equal factors in a pair commute with rotation, so that an engine can fold them into its projections instead.

    Parameters
    ----------
    keys : `[N, H, D]` of N tokens, before rotation.
    alpha : 0.5 in the paper.
    interleaved : channel pairs are (2i, 2i + 1) instead of (i, i + D / 2); see `RopeSpec`.

    Returns
    -------
    `[H, D]` float32 on the cpu, above 0; 1 for pairs that are 0 throughout.

    Raises
    ------
    ValueError : there are no keys, they are not finite, or D is odd.
    """
    if keys.ndim != 3 or keys.numel() == 0 or keys.shape[-1] % 2:
        raise ValueError(f"keys are {list(keys.shape)}; expected [N, H, D] of at least one token and an even D")
    largest = keys.detach().float().abs().amax(0).cpu()
    if not bool(largest.isfinite().all()):
        raise ValueError("keys hold NaN or infinity; leave those tokens out")
    H, D = largest.shape
    if interleaved:
        pairs = largest.view(H, D // 2, 2).amax(-1).repeat_interleave(2, -1)
    else:
        pairs = largest.view(H, 2, D // 2).amax(1).repeat(1, 2)
    return torch.where(pairs > 0.0, pairs**alpha, 1.0)


def _decode(
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    bits: int,
    rotation: KeyRotation | None = None,
    factors: Tensor | None = None,
) -> Tensor:
    if factors is not None:
        factors = factors.to(tensors[prefix].device)
    grouping = Grouping(1, 1, max(1, shape[3]))
    return dequantize("kv4", tensors, prefix, dtype, shape, bits, grouping, shape[2], rotation=rotation, smooth=factors)


def _factors(profile: Profile | None, spec: KVSpec, first_layer: int, num_layers: int) -> Tensor | None:
    """Smoothing factors of these layers, `[num_layers, H, D]` float32; None for 1."""
    if profile is None:
        return None
    profile.check_serves(spec)
    factors = profile[PROFILE_NAME]
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    if factors.dtype != torch.float32 or factors.shape != shape or not bool(((factors > 0) & factors.isfinite()).all()):
        raise CodecError(
            f"the profile's {PROFILE_NAME} are {factors.dtype} {list(factors.shape)}; expected torch.float32 "
            f"{list(shape)}, finite and above 0; make it anew with `kvloom calibrate`"
        )
    return factors[first_layer : first_layer + num_layers]
