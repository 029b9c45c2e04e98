"""KIVI: integers of 2 to 8 bits in small groups, each with its own step and zero. Needs no calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core import EncodedChunk, KVChunk, KVSpec
from .envelope import codec_from_parameters, open_envelope, seal
from .exact import EXACT_PARTS, take_exact, unusual_tokens
from .rotation import KeyRotation, unrotated
from .uniform import PARTS, Grouping, dequantize, quantize

_KEYS = frozenset(f"keys{part}" for part in PARTS + EXACT_PARTS)
_VALUES = frozenset(f"values{part}" for part in PARTS + EXACT_PARTS)


@dataclass(frozen=True)
class GroupedCodec:
    """Keys per channel in groups of tokens, values per token in groups of channels (KIVI, arXiv 2402.02750).

    Each group has a scale and a zero in float16, from its least and greatest value: `bits + 32 / group` bits a number.
    Only full groups of tokens are coded, the tokens behind them stay exact; so a chunk that grows by whole groups keeps
    the codes it has. Tokens with NaN, infinity or numbers beyond 16384 stay exact, too.

    Deviations: keys are coded before rotation, where channels keep their size and tokens have no position; and a stored
    chunk has no exact window unless asked for, since the end of a chunk is not the end of a context.

    Attributes
    ----------
    bits : 2 to 8, of keys and values.
    group_tokens : tokens of a group of keys.
    group_channels : channels of a group of values, within a head; the greatest common divisor with Dv is taken. None
        for the whole token, all heads together.
    residual_tokens : the latest so many tokens (R in the paper) stay exact.
    key_axis : "channel"; or "token" for keys coded as values are. With `group_channels=None` these are the uniform
        per-token integers that others are compared with.
    rotated : keys are coded as they come, after rotation: the published form, for comparison.
    """

    name: ClassVar[str] = "grouped"
    is_lossless: ClassVar[bool] = False

    bits: int = 4
    group_tokens: int = 32
    group_channels: int | None = 32
    residual_tokens: int = 0
    key_axis: str = "channel"
    rotated: bool = False

    def __post_init__(self) -> None:
        for field, least in {"bits": 2, "group_tokens": 1, "group_channels": 1, "residual_tokens": 0}.items():
            value = getattr(self, field)
            if value is None and field == "group_channels":
                continue
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{field} is {value!r}; expected an integer from {least} on")
        if self.bits > 8:
            raise ValueError(f"bits is {self.bits}; expected 2 to 8")
        if self.key_axis not in ("channel", "token"):
            raise ValueError(f"key_axis is {self.key_axis!r}; expected 'channel' or 'token'")
        if not isinstance(self.rotated, bool):
            raise TypeError(f"rotated is {self.rotated!r}; expected a bool")

    @property
    def value_names(self) -> frozenset[str]:
        """See `EncodesValues`."""
        return _VALUES

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """On the device of the chunk, in float32."""
        spec, keys = chunk.spec, chunk.keys.detach()
        grouping, covered = _of_keys(self, keys.shape)
        coded = keys[:, :, :covered]
        unusual = unusual_tokens(coded)
        plain = coded.float() if self.rotated else unrotated(spec, coded, chunk.positions[:covered], chunk.first_layer)
        tensors = quantize("keys", plain, self.bits, grouping, unusual) | take_exact("keys", keys, unusual)
        tensors |= self.encode_values(spec, chunk.values, chunk.first_layer)
        return seal(self, chunk, tensors, _KEYS | _VALUES)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`: keys are rotated once, in float32; those kept exact only if they move.

        Raises
        ------
        CodecError : `blob` was not made by this codec, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        envelope = open_envelope(blob, self.name, _KEYS | _VALUES)
        spec, tokens, encoder = envelope.spec, envelope.tokens, codec_from_parameters(GroupedCodec, envelope.parameters)
        placed = envelope.placed(positions)
        rotation = KeyRotation.to(placed, envelope, rotated=encoder.rotated)
        shape = (envelope.num_layers, spec.num_kv_heads, tokens, spec.head_dim)
        grouping, covered = _of_keys(encoder, shape)
        keys = dequantize(
            self.name, blob.tensors, "keys", spec.dtype, shape, encoder.bits, grouping, covered, rotation=rotation
        )
        values = self.decode_values(spec, blob.tensors, envelope.first_layer, tokens, envelope.parameters)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """See `EncodesValues`."""
        values = values.detach()
        grouping, covered = _of_values(self, values.shape)
        unusual = unusual_tokens(values[:, :, :covered])
        coded = quantize("values", values[:, :, :covered].float(), self.bits, grouping, unusual)
        return coded | take_exact("values", values, unusual)

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """See `EncodesValues`."""
        encoder, codes = codec_from_parameters(GroupedCodec, parameters), tensors["values"]
        shape = (len(codes) if codes.ndim else 0, spec.num_kv_heads, tokens, spec.value_dim)
        grouping, covered = _of_values(encoder, shape)
        return dequantize(self.name, tensors, "values", spec.dtype, shape, encoder.bits, grouping, covered)


def _of_keys(codec: GroupedCodec, shape: Sequence[int]) -> tuple[Grouping, int]:
    """Groups of keys `[L, H, T, D]`, and how many tokens are coded."""
    if codec.key_axis == "token":
        return _of_values(codec, shape)
    grouping = Grouping(1, codec.group_tokens, 1)
    return grouping, _covered(codec, shape[2], grouping)


def _of_values(codec: GroupedCodec, shape: Sequence[int]) -> tuple[Grouping, int]:
    _, H, T, D = shape
    channels = codec.group_channels
    grouping = Grouping(max(1, H), 1, max(1, D)) if channels is None else Grouping(1, 1, math.gcd(channels, D))
    return grouping, _covered(codec, T, grouping)


def _covered(codec: GroupedCodec, tokens: int, grouping: Grouping) -> int:
    """Tokens that are coded: whole groups outside the latest `residual_tokens`."""
    covered = max(0, tokens - codec.residual_tokens)
    return covered - covered % grouping.tokens
