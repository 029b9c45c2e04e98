"""KVQuant: non-uniform codes of 1 to 8 bits, keys per channel before rotation, values per token, outliers exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...calibration.model_profile import Profile
from ...core import EncodedChunk, KVChunk, KVSpec
from ...errors import CodecError, SpecMismatchError
from ..capabilities import Allocator
from ..envelope import cpu_copy, expect_tensor, open_envelope, seal
from ..exact import put_exact
from ..kernels.ops import pack_bits, packed_bytes
from ..rotation import KeyRotation, layer_unrotated
from .codes import Codes, Grid, RotaryAngles, fresh_memory
from .dequantise import dequantise
from .outliers import MAX_CHANNELS, channel_bytes, outliers_per_token, pack_channels
from .quantise import by_token, code, code_in_ranges

Half = Literal["keys", "values"]

_PARTS = ("codes", "channels", "outliers", "exact", "exact_tokens")
_KEY_NAMES = frozenset(f"keys.{part}" for part in _PARTS)
_VALUE_NAMES = frozenset(f"values.{part}" for part in (*_PARTS, "ranges"))


@dataclass(frozen=True)
class NuqCodec:
    """Lossy; keys and values in `bits` bits with the level tables of a profile, `outlier_ratio` of them exact.

    Keys are taken back to position 0, scaled per channel by constants of the profile, and coded by the level table of
    their layer and head; `decode` rotates them once, to wherever they are asked for. Values are centred and scaled per
    channel by constants, then per token by the range of its numbers without outliers (float16 scale and zero), and
    coded likewise. Of each token, tensor and layer, the k = `ceil(outlier_ratio * H * D)` numbers with the largest
    weighted error are outliers (`outliers.py`): kept before rotation, in the chunk's dtype if that has 16 bits,
    otherwise in float32. A token's codes depend on that token alone: tokens encoded one by one and joined along T equal
    the tokens encoded at once.

    Some tokens are kept exact, as they are in the chunk; their keys keep their rotation and are moved by the
    difference, as `RawCodec` does. These are attention sinks, tokens with numbers that are not finite or too large for
    outliers or ranges, and keys of tokens unlike the text that the profile was made from (`clipped_limit`).

    Attributes
    ----------
    profile : of the model, with `nuq.*` tensors for these bits (`nuq_fit.fit_layer`).
    bits : of a code, 1 to 8.
    outlier_ratio : share of a token's numbers in a layer that is kept exact, 0 to 1; 1 is the identity to rounding.
    sink_tokens : tokens at positions below this are kept exact.
    q_norm : match the mean and deviation of the decoded inliers to the true ones, per layer (paper's first version).
    clipped_limit : a token is kept exact if more than this share of its keys, over all layers given, lies outside the
        thresholds of the profile (of calibration text: 1 %).

    Tensors of a chunk, all layered, `HALF` being `keys` or `values`: `HALF.codes` `[L, H, T, packed_bytes(D, bits)]`,
    `HALF.channels` `[L, T, channel_bytes]`, `HALF.outliers` `[L, T, k]`, `HALF.exact` `[L, H, E, D]` and
    `HALF.exact_tokens` `[L, E]` int32 (the same in all layers), `values.ranges` `[L, T, 2]` float16.

    Source: Hooper et al., KVQuant, NeurIPS 2024 (arXiv 2401.18079). Deviations: level tables per head, not per layer;
    scales of keys fitted to the levels, not taken from the thresholds; outliers and ranges chosen by weighted error,
    not by threshold; values scaled by channel first; k outliers for every token instead of CSR; exact tokens can move.
    """

    name: ClassVar[str] = "nuq"
    is_lossless: ClassVar[bool] = False

    profile: Profile
    bits: int = 4
    outlier_ratio: float = 0.01
    sink_tokens: int = 1
    q_norm: bool = False
    clipped_limit: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits is {self.bits}; expected 1 to 8")
        for name in ("outlier_ratio", "clipped_limit"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        if self.sink_tokens < 0:
            raise ValueError(f"sink_tokens is {self.sink_tokens}; expected 0 or more")

    @property
    def value_names(self) -> frozenset[str]:
        return _VALUE_NAMES

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """The chunk in codes.

        Raises
        ------
        SpecMismatchError : the profile is another model's.
        CodecError : the profile has no tables of these bits, or a token has more than `MAX_CHANNELS` channels.
        """
        self.profile.check_serves(chunk.spec)
        sinks = chunk.positions < self.sink_tokens
        tensors = self._encode_half("keys", chunk.spec, chunk.keys, chunk.first_layer, sinks, chunk.positions)
        tensors |= self._encode_half("values", chunk.spec, chunk.values, chunk.first_layer, sinks, None)
        return seal(self, chunk, tensors, _KEY_NAMES | _VALUE_NAMES)

    def encode_values(self, spec: KVSpec, values: Tensor, first_layer: int) -> dict[str, Tensor]:
        """See `EncodesValues`. Positions are not known here: no token is kept exact for being a sink."""
        self.profile.check_serves(spec)
        nowhere = torch.zeros(values.shape[2], dtype=torch.bool)
        return self._encode_half("values", spec, values, first_layer, nowhere, None)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`, or where it was computed: dequantised, rotated and rounded once.

        Raises
        ------
        CodecError : `blob` was not made by this codec with this profile, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        return self.decode_into(blob, positions, fresh_memory)

    def decode_into(self, blob: EncodedChunk, positions: Tensor | None, allocate: Allocator) -> KVChunk:
        """See `DecodesInto`."""
        envelope = open_envelope(blob, self.name, _KEY_NAMES | _VALUE_NAMES)
        spec, placed = envelope.spec, envelope.placed(positions)
        layers, rotation = (envelope.first_layer, envelope.num_layers), KeyRotation.to(placed, envelope)
        keys = self._decode_half("keys", spec, blob, layers, envelope.tokens, envelope.parameters, rotation, allocate)
        values = self._decode_half("values", spec, blob, layers, envelope.tokens, envelope.parameters, None, allocate)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)

    def decode_values(
        self, spec: KVSpec, tensors: Mapping[str, Tensor], first_layer: int, tokens: int, parameters: Mapping[str, Any]
    ) -> Tensor:
        """See `EncodesValues`."""
        if not tensors.keys() >= _VALUE_NAMES or not tensors["values.codes"].ndim:
            raise CodecError(f"nuq values are {sorted(tensors)}; expected {sorted(_VALUE_NAMES)}")
        layers = (first_layer, len(tensors["values.codes"]))
        if first_layer + layers[1] > spec.num_layers:
            raise CodecError(f"nuq values hold {layers[1]} layers from {first_layer}; the spec has {spec.num_layers}")
        return self._decode_half(
            "values", spec, EncodedChunk(self.name, tensors, {}), layers, tokens, parameters, None, fresh_memory
        )

    def clipped_ratio(self, chunk: KVChunk) -> Tensor:
        """Share of each token's keys outside the profile's thresholds, over the layers given: `[T]` float32.

        About `outlier_ratio` of the calibration on text like its own; much more says that the profile does not fit.
        """
        self.profile.check_serves(chunk.spec)
        total = torch.zeros(len(chunk))
        for i in range(len(chunk.keys)):
            layer = chunk.first_layer + i
            total += self._clipped(layer, layer_unrotated(chunk.spec, layer, chunk.keys[i].cpu(), chunk.positions))
        return total / max(1, len(chunk.keys))

    def _encode_half(
        self, half: Half, spec: KVSpec, tensor: Tensor, first_layer: int, exact: Tensor, positions: Tensor | None
    ) -> dict[str, Tensor]:
        # `positions` is given for keys.
        L, H, T, D = tensor.shape
        if H * D > MAX_CHANNELS:
            raise CodecError(f"{half} have {H * D} channels a token; nuq numbers at most {MAX_CHANNELS}")
        k, stored = outliers_per_token(self.outlier_ratio, H * D), _outlier_dtype(spec)
        codes = torch.empty(L, H, T, packed_bytes(D, self.bits), dtype=torch.uint8)
        channels = torch.empty(L, T, channel_bytes(k, H * D), dtype=torch.uint8)
        outliers = torch.empty(L, T, k, dtype=stored)
        ranges = torch.zeros(L, T, 2, dtype=torch.float16)
        clipped = torch.zeros(T)
        for i in range(L if D else 0):
            rows = tensor[i].detach().cpu()
            rows = rows.float() if positions is None else layer_unrotated(spec, first_layer + i, rows, positions)
            if half == "keys":
                clipped += self._clipped(first_layer + i, rows)
            fits = (rows.abs() <= torch.finfo(stored).max).all(-1).all(0)
            rows = rows.masked_fill(~fits[:, None], 0.0)
            grid = self._grid(half, first_layer + i, 1, H, self.bits, self.q_norm)
            levels, scale, zero = grid.levels[0], grid.scale[0, :, None], grid.zero[0, :, None]
            cost = self.profile[f"nuq.{half}.weight"][first_layer + i].view(H, 1, D) * scale**2
            if half == "keys":
                numbers, errors = code((rows - zero) / scale, levels, cost)
            else:
                ranges[i], numbers, errors = code_in_ranges((rows - zero) / scale, levels, cost, k)
                fits &= ranges[i].isfinite().all(-1)
            worst = by_token(errors).topk(k, -1).indices.sort(-1).values
            codes[i], channels[i] = pack_bits(numbers, self.bits), pack_channels(worst, H * D)
            outliers[i] = by_token(rows).gather(1, worst)
            exact = exact | ~fits
        tokens = (exact | (clipped > self.clipped_limit * L)).nonzero()[:, 0]
        tensors = {
            "codes": codes,
            "channels": channels,
            "outliers": outliers,
            "exact": cpu_copy(tensor[:, :, tokens.to(tensor.device)]),
            "exact_tokens": tokens.to(torch.int32).repeat(L, 1),
        }
        if half == "values":
            tensors["ranges"] = ranges
        return {f"{half}.{name}": found for name, found in tensors.items()}

    def _decode_half(
        self,
        half: Half,
        spec: KVSpec,
        blob: EncodedChunk,
        layers: tuple[int, int],
        tokens: int,
        parameters: Mapping[str, Any],
        rotation: KeyRotation | None,
        allocate: Allocator,
    ) -> Tensor:
        bits, outlier_ratio, q_norm = self._parameters(parameters)
        try:
            self.profile.check_serves(spec)
        except SpecMismatchError as exc:
            raise CodecError(f"nuq chunk contradicts its profile: {exc}") from exc
        (first_layer, L), H, T = layers, spec.num_kv_heads, tokens
        D = spec.head_dim if half == "keys" else spec.value_dim
        if H * D > MAX_CHANNELS:
            raise CodecError(f"nuq chunk: {half} of {H * D} channels a token; nuq numbers at most {MAX_CHANNELS}")
        k, stored = outliers_per_token(outlier_ratio, H * D), _outlier_dtype(spec)
        codes = expect_tensor(blob, f"{half}.codes", torch.uint8, (L, H, T, packed_bytes(D, bits)))
        channels = expect_tensor(blob, f"{half}.channels", torch.uint8, (L, T, channel_bytes(k, H * D)))
        outliers = expect_tensor(blob, f"{half}.outliers", stored, (L, T, k))
        ranges = None
        if half == "values":
            ranges = expect_tensor(blob, "values.ranges", torch.float16, (L, T, 2)).float()
        exact_tokens = blob.tensors[f"{half}.exact_tokens"]
        count = exact_tokens.shape[-1] if exact_tokens.ndim else 0
        expect_tensor(blob, f"{half}.exact_tokens", torch.int32, (L, count))
        exact = expect_tensor(blob, f"{half}.exact", spec.dtype, (L, H, count, D))
        if not D or not L:
            return torch.empty(L, H, T, D, dtype=spec.dtype)
        at = exact_tokens[0].long()
        if not bool((exact_tokens == exact_tokens[0]).all()) or not bool(((at >= 0) & (at < T)).all()):
            raise CodecError(f"nuq chunk: exact tokens of {half} differ between layers, or are none of its {T}")
        grid = self._grid(half, first_layer, L, H, bits, q_norm)
        coded = Codes(codes, ranges, channels, outliers.float())
        if rotation is not None and rotation.plain is None:
            found = rotation.turn(dequantise(grid, coded, None, torch.float32, fresh_memory), spec.dtype)
        else:
            plain = None if rotation is None else rotation.plain
            angles = None if rotation is None or plain is None else RotaryAngles.at(rotation.coded, plain)
            found = dequantise(grid, coded, angles, spec.dtype, allocate)
        put_exact(found, at, exact, rotation)
        return found

    def _parameters(self, parameters: Mapping[str, Any]) -> tuple[int, float, bool]:
        bits, outlier_ratio, q_norm, profile = (
            parameters.get(name) for name in ("bits", "outlier_ratio", "q_norm", "profile")
        )
        valid = (
            isinstance(bits, int)
            and 1 <= bits <= 8
            and isinstance(outlier_ratio, float | int)
            and 0 <= outlier_ratio <= 1
            and isinstance(q_norm, bool)
        )
        if not valid:
            raise CodecError(
                f"nuq chunk: bits {bits!r}, outlier_ratio {outlier_ratio!r}, q_norm {q_norm!r} make no sense"
            )
        if profile != self.profile.fingerprint:
            raise CodecError(
                f"nuq chunk was encoded with the profile {str(profile)[:12]}, this codec holds "
                f"{self.profile.fingerprint[:12]}; keep profiles as long as chunks"
            )
        return bits, float(outlier_ratio), q_norm  # type: ignore[return-value, arg-type]

    def _clipped(self, layer: int, rows: Tensor) -> Tensor:
        """Share of each token's keys of a layer that are outside the thresholds: `[H, T, D]` to `[T]`."""
        low, high = (self.profile[f"nuq.keys.{name}"][layer] for name in ("low", "high"))
        tokens = by_token(rows)
        return ((tokens < low) | (tokens > high)).float().mean(-1)

    def _grid(self, half: Half, first_layer: int, num_layers: int, heads: int, bits: int, q_norm: bool) -> Grid:
        wanted = slice(first_layer, first_layer + num_layers)
        levels = self.profile[f"nuq.{half}.levels.{bits}"][wanted]
        if q_norm:
            factor, offset = self.profile[f"nuq.{half}.q_norm.{bits}"][wanted, :, None, None].unbind(1)
            levels = levels * factor + offset
        suffix = f".{bits}" if half == "keys" else ""
        scale, zero = (self.profile[f"nuq.{half}.{name}{suffix}"][wanted] for name in ("scale", "zero"))
        return Grid(
            levels.repeat_interleave(heads // levels.shape[1], 1),
            scale.view(num_layers, heads, -1),
            zero.view(num_layers, heads, -1),
        )


def _outlier_dtype(spec: KVSpec) -> torch.dtype:
    return spec.dtype if spec.dtype in (torch.float16, torch.bfloat16) else torch.float32
