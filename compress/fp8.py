"""Eight-bit floats: half the bytes of 16-bit keys and values, with a scale for each layer and head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core import EncodedChunk, KVChunk, KVSpec, rotate_pairs
from .envelope import codec_from_parameters, expect_tensor, open_envelope, seal
from .exact import EXACT_PARTS, put_exact, read_exact, take_exact, unusual_tokens
from .rotation import KeyRotation, unrotated

_GREATEST = 448.0  # of e4m3; it has no infinity
_DEVICE_LAYERS = 16  # decoded at once on a device
_PARTS = ("", "_scale", *EXACT_PARTS)
_KEYS = frozenset(f"keys{part}" for part in _PARTS)
_VALUES = frozenset(f"values{part}" for part in _PARTS)


@dataclass(frozen=True)
class Fp8Codec:
    """Every number as float8 e4m3 times a float32 scale of its layer and head, in this chunk.

    The greatest number of a head becomes 448, the greatest of e4m3, so nothing overflows; each number is off by at most
    1/16 of itself, or by 2 ** -10 of the scale. Tokens with NaN, infinity or numbers beyond 16384 stay exact: e4m3 has
    no infinity. The format is that of Micikevicius et al. (arXiv 2209.05433).

    Attributes
    ----------
    rotated : keys are coded as they come, after rotation, as engines do: they need no rotation to stay in place.
    """

    name: ClassVar[str] = "fp8"
    is_lossless: ClassVar[bool] = False

    rotated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rotated, bool):
            raise TypeError(f"rotated is {self.rotated!r}; expected a bool")

    @property
    def value_names(self) -> frozenset[str]:
        """See `EncodesValues`."""
        return _VALUES

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """On the device of the chunk, in float32."""
        spec, keys = chunk.spec, chunk.keys.detach()
        plain = keys.float() if self.rotated else unrotated(spec, keys, chunk.positions, chunk.first_layer)
        tensors = _encode("keys", keys, plain) | self.encode_values(spec, chunk.values, chunk.first_layer)
        return seal(self, chunk, tensors, _KEYS | _VALUES)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`: keys are rotated once, in float32; those kept exact only if they move.

        Raises
        ------
        CodecError : `blob` was not made by this codec, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        envelope = open_envelope(blob, self.name, _KEYS | _VALUES)
        spec, tokens, encoder = envelope.spec, envelope.tokens, codec_from_parameters(Fp8Codec, envelope.parameters)
        placed = envelope.placed(positions)
        rotation = KeyRotation.to(placed, envelope, rotated=encoder.rotated)
        shape = (envelope.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
        keys = _decode(blob.tensors, "keys", spec.dtype, shape, rotation)
        values = self.decode_values(spec, blob.tensors, envelope.first_layer, tokens, envelope.parameters)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """See `EncodesValues`."""
        return _encode("values", values.detach(), values.detach().float())

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """See `EncodesValues`."""
        codec_from_parameters(Fp8Codec, parameters)
        codes = tensors["values"]
        shape = (len(codes) if codes.ndim else 0, spec.num_kv_heads, tokens, spec.value_dim)
        return _decode(tensors, "values", spec.dtype, shape)


def _encode(prefix: str, x: Tensor, plain: Tensor) -> dict[str, Tensor]:
    """Codes and scales of `plain` (float32), which is `x` (`[L, H, T, D]`) in the form that is coded."""
    unusual = unusual_tokens(x)
    if bool(unusual.any()):
        plain = plain.masked_fill(unusual[:, None], 0.0)
    greatest = plain.abs().amax((2, 3)) if plain.numel() else plain.new_zeros(plain.shape[:2])
    scale = (greatest / _GREATEST).clamp_min(torch.finfo(torch.float32).tiny)
    codes = (plain / scale[:, :, None, None]).clamp_(-_GREATEST, _GREATEST).to(torch.float8_e4m3fn)
    return {prefix: codes.cpu().contiguous(), f"{prefix}_scale": scale.cpu()} | take_exact(prefix, x, unusual)


def _decode(
    tensors: Mapping[str, Tensor],
    prefix: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    rotation: KeyRotation | None = None,
) -> Tensor:
    L, H, T, _ = shape
    blob = EncodedChunk("fp8", tensors, {})
    codes = expect_tensor(blob, prefix, torch.float8_e4m3fn, shape)
    scale = expect_tensor(blob, f"{prefix}_scale", torch.float32, (L, H))
    tokens, rows = read_exact("fp8", tensors, prefix, dtype, shape, T, rotation)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    cos, sin = (None, None) if rotation is None else rotation.cos_sin(T, out.device)
    plain = None if rotation is None else rotation.plain
    # On the cpu the float32 of one layer stays in a cache; on a device the number of launches takes the time.
    step = 1 if codes.device.type == "cpu" else _DEVICE_LAYERS
    for first in range(0, L, step):
        layers = slice(first, first + step)
        x = _wide(codes[layers]).mul_(scale[layers, :, None, None])
        if rotation is not None and rotation.plain is None:
            x = rotation.from_layer(first).turn(x, dtype)
        elif cos is not None and sin is not None and plain is not None:
            x = rotate_pairs(x, cos, sin, plain.interleaved)
        out[layers] = x
    put_exact(out, tokens, rows, rotation)
    return out


def _wide(codes: Tensor) -> Tensor:
    """Finite e4m3 as float32: its bits moved to where float16 has them, times the difference of the biases.

    Torch converts float8 on the cpu one by one, this by whole registers. A device has an instruction for it.
    """
    if codes.is_cuda:
        return codes.float()
    bits = codes.view(torch.int8).to(torch.int16)
    return (((bits & 0x7F) << 7) | (bits & -0x8000)).view(torch.float16).float().mul_(256.0)
