"""KVTC: keys before rotation and values of several layers in one basis, quantised, and coded by zstd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...calibration.model_profile import Profile
from ...core import EncodedChunk, KVChunk, KVSpec
from ...errors import CodecError, SpecMismatchError
from ..envelope import expect_tensor, open_envelope, seal
from ..exact import EXACT_PARTS, put_exact, read_exact, take_exact, unusual_tokens
from ..rotation import KeyRotation, unrotated
from ..zstd import check_level
from .planes import FRAMES, LARGEST, pack, unpack

_EXACT = frozenset(f"{half}{part}" for half in ("keys", "values") for part in EXACT_PARTS)
_CODES = frozenset({"codes", "frames"})
_ROUNDING = 0.3  # added before cutting off; less than 1/2 sends more numbers to 0, which saves more than it costs
_CENTRE = 0.1  # of the numbers that become one multiple, beyond it, in steps


@dataclass(frozen=True)
class TransformCodec:
    """Storage codec: coefficients of all heads' keys and values in a basis that several layers share, in few bits.

    Channels of keys before rotation and of values, of all heads of a group of layers, are centred, weighted by what an
    error in them costs the model, and expressed in their principal directions. Each coefficient is rounded to a
    multiple of `step`, the same one for all: since a unit costs the same in every direction, that spends each bit where
    it saves most. Small integers share bytes, and zstd shortens them (`planes.py`).

    Tokens that are kept exact: attention sinks, the last `recent_tokens` of a chunk, tokens with numbers that are not
    finite or beyond 16384, and tokens unlike those that the profile was made from (`max_residual`).

    A chunk is encoded whole. Its codes are read whole, too, a small part of the keys and values that they stand for;
    groups of layers are decoded alone.

    Attributes
    ----------
    profile : of the model, with `transform.*` (`transform_fit.fit_group`).
    step : of a coefficient, in square roots of nats a token: half the sum of the squared errors, `step ** 2 / 24` for
        each coefficient that is not 0 throughout, is about what they cost.
    sink_tokens : tokens at positions below this are kept exact; 4 in the paper.
    recent_tokens : the last so many tokens of a chunk are kept exact; 128 in the paper, whose chunk is a conversation.
        0: the end of a stored chunk is not the end of a context, and what is asked behind it is computed exactly.
    max_residual : relative error of a token's weighted numbers, over all layers, above which it is kept exact.
    level : of zstd, 1 (fast) to 22 (small).

    Tensors of a chunk: `codes` `[B]` uint8, all frames; `frames` `[G, FRAMES]` int32, their lengths, for each of the G
    groups of layers; `HALF_exact`, `HALF_exact_tokens` of `take_exact`, layered, `HALF` being `keys` or `values`.

    Source: Staniszewski and Lancucki, KVTC, ICLR 2026 (arXiv 2511.01815). Deviations: channels are weighted by Fisher
    information, keys and values share a basis; groups of layers instead of all of them; one step for all coefficients
    and entropy coding instead of bits for each by dynamic programming; zstd over packed integers instead of DEFLATE.
    """

    name: ClassVar[str] = "transform"
    is_lossless: ClassVar[bool] = False
    codes_whole_chunks: ClassVar[bool] = True
    """A layer alone cannot be encoded."""

    profile: Profile
    step: float = 0.02
    sink_tokens: int = 4
    recent_tokens: int = 0
    max_residual: float = 0.5
    level: int = 9

    def __post_init__(self) -> None:
        if not 0.0 < self.step < 1e3:
            raise ValueError(f"step is {self.step}; expected above 0 and below 1000")
        for name in ("sink_tokens", "recent_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not self.max_residual > 0.0:
            raise ValueError(f"max_residual is {self.max_residual}; expected above 0")
        check_level(self.level)

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """On the device of the chunk, in float32; packed and compressed on the cpu.

        Raises
        ------
        SpecMismatchError : the profile is another model's.
        CodecError : the chunk does not hold all layers, or the profile has no usable `transform` tensors.
        """
        spec = chunk.spec
        self.profile.check_serves(spec)
        if len(chunk.keys) != spec.num_layers:
            raise CodecError(
                f"chunk holds {len(chunk.keys)} of {spec.num_layers} layers; transform encodes all at once"
            )
        tables = _Tables.of(self.profile, spec)
        exact = unusual_tokens(chunk.keys) | unusual_tokens(chunk.values)
        exact = exact | (chunk.positions < self.sink_tokens).to(exact.device)
        exact[max(0, len(chunk) - self.recent_tokens) :] = True
        keys = unrotated(spec, chunk.keys, chunk.positions, chunk.first_layer)
        channels = torch.cat([_by_token(keys), _by_token(chunk.values.detach().float())], -1)  # [L, T, M]
        channels = channels.masked_fill(exact[:, None], 0.0)
        coded, missed = [], torch.zeros(2, len(chunk), device=exact.device)
        for first, stop in tables.groups:
            numbers, lost, whole = tables.forward(channels[first:stop], first, stop, self.step)
            coded.append(numbers)
            missed = missed + torch.stack([lost, whole])
        lost, whole = missed
        exact = exact | (lost > self.max_residual**2 * whole)
        for numbers in coded:
            exact = exact | (numbers.abs() > LARGEST).any(1)
        frames = [
            pack(numbers.masked_fill(exact[:, None], 0.0).T.to("cpu", torch.int16).contiguous().numpy(), self.level)
            for numbers in coded
        ]
        tensors = take_exact("keys", chunk.keys.detach(), exact) | take_exact("values", chunk.values.detach(), exact)
        tensors["codes"] = torch.frombuffer(bytearray(b"".join(chain.from_iterable(frames))), dtype=torch.uint8)
        tensors["frames"] = torch.tensor([[len(frame) for frame in group] for group in frames], dtype=torch.int32)
        return seal(self, chunk, tensors, _EXACT)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`, on the device of its exact tokens; keys are rotated once, in float32.

        Raises
        ------
        CodecError : `blob` was not made by this codec with this profile, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        envelope = open_envelope(blob, self.name, _EXACT | _CODES)
        spec, placed, step = envelope.spec, envelope.placed(positions), self._step(envelope.parameters)
        try:
            self.profile.check_serves(spec)
        except SpecMismatchError as exc:
            raise CodecError(f"transform chunk contradicts its profile: {exc}") from exc
        tables, T, H = _Tables.of(self.profile, spec), envelope.tokens, spec.num_kv_heads
        frames = _frames(blob, len(tables.groups))
        first_layer, L = envelope.first_layer, envelope.num_layers
        rotation = KeyRotation.to(placed, envelope)
        shapes = {"keys": (L, H, T, spec.head_dim), "values": (L, H, T, spec.value_dim)}
        kept = {
            half: read_exact(self.name, blob.tensors, half, spec.dtype, shape, T, rotation if half == "keys" else None)
            for half, shape in shapes.items()
        }
        device = blob.tensors["keys_exact"].device
        found = {half: torch.empty(shape, dtype=spec.dtype, device=device) for half, shape in shapes.items()}
        for (first, stop), group in zip(tables.groups, frames, strict=True):
            layers = range(max(first, first_layer), min(stop, first_layer + L))
            if not layers:
                continue
            numbers = torch.from_numpy(unpack(group, tables.rank, T)).T.to(device).float()
            numbers = _multiples(numbers, step)
            for layer in layers:
                keys, values = tables.inverse(numbers, layer).split((H * spec.head_dim, H * spec.value_dim), -1)
                keys = keys.unflatten(-1, (H, spec.head_dim)).transpose(0, 1)
                keys = spec.shift(keys[None], placed, layer)[0]
                found["keys"][layer - first_layer] = keys
                found["values"][layer - first_layer] = values.reshape(T, H, spec.value_dim).transpose(0, 1)
        for half, (tokens, rows) in kept.items():
            put_exact(found[half], tokens, rows, rotation if half == "keys" else None)
        return KVChunk(spec, envelope.token_ids, placed, found["keys"], found["values"], first_layer)

    def _step(self, parameters: Mapping[str, Any]) -> float:
        step, profile = parameters.get("step"), parameters.get("profile")
        if not isinstance(step, float | int) or not 0.0 < step < 1e3:
            raise CodecError(f"transform chunk has a step of {step!r}; expected above 0 and below 1000")
        if profile != self.profile.fingerprint:
            raise CodecError(
                f"transform chunk was encoded with the profile {str(profile)[:12]}, this codec holds "
                f"{self.profile.fingerprint[:12]}; keep profiles as long as chunks"
            )
        return float(step)


@dataclass(frozen=True, slots=True, eq=False)
class _Tables:
    """A profile's tables for this codec, checked.

    Attributes
    ----------
    basis : `[L, M, r]` float16, a layer's rows of its group's orthonormal columns; M channels, keys' before values'.
    mean, weight : `[L, M]` float32.
    groups : first and behind last layer of each.
    """

    basis: Tensor
    mean: Tensor
    weight: Tensor
    groups: list[tuple[int, int]]

    @property
    def rank(self) -> int:
        return self.basis.shape[-1]

    @classmethod
    def of(cls, profile: Profile, spec: KVSpec) -> _Tables:
        """Raises `CodecError` if there are none, or none that serve."""
        basis, mean, weight, group = (profile[f"transform.{n}"] for n in ("basis", "mean", "weight", "group"))
        L, M = spec.num_layers, spec.num_kv_heads * (spec.head_dim + spec.value_dim)
        starts = group.tolist()
        edges = [*sorted(set(starts)), L]
        fits = (
            basis.ndim == 3
            and basis.shape[2] > 0
            and basis.shape[:2] == mean.shape == weight.shape == (L, M)
            and group.shape == (L,)
            and edges[0] == 0
            and all(starts[layer] == first for first, stop in pairwise(edges) for layer in range(first, stop))
        )
        if not fits:
            raise CodecError(
                f"the profile's transform tables do not fit {L} layers of {M} channels; make it anew with "
                "`kvloom calibrate`"
            )
        return cls(basis, mean, weight, list(pairwise(edges)))

    def forward(self, channels: Tensor, first: int, stop: int, step: float) -> tuple[Tensor, Tensor, Tensor]:
        """Of a group's `[g, T, M]`: multiples of `step` `[T, r]`, squared error and squared norm `[T]`, weighted."""
        device = channels.device
        mean, weight = (t[first:stop, None].to(device) for t in (self.mean, self.weight))
        weighted = ((channels - mean) * weight).transpose(0, 1).flatten(1)
        coefficients = weighted @ self.basis[first:stop].flatten(0, 1).to(device).float()
        numbers = (coefficients.abs() / step + _ROUNDING).floor() * coefficients.sign()
        whole = weighted.square().sum(1)
        outside = (whole - coefficients.square().sum(1)).clamp(min=0.0)
        return numbers, outside + (coefficients - _multiples(numbers, step)).square().sum(1), whole

    def inverse(self, coefficients: Tensor, layer: int) -> Tensor:
        """The channels `[T, M]` of a layer."""
        device = coefficients.device
        rows = coefficients @ self.basis[layer].to(device).float().T
        return rows.div_(self.weight[layer].to(device)).add_(self.mean[layer].to(device))


def _multiples(numbers: Tensor, step: float) -> Tensor:
    """What integers stand for."""
    return (numbers + _CENTRE * numbers.sign()) * step


def _by_token(rows: Tensor) -> Tensor:
    """`[L, H, T, D]` to `[L, T, H D]`."""
    return rows.transpose(1, 2).flatten(2)


def _frames(blob: EncodedChunk, groups: int) -> list[list[memoryview]]:
    """The frames of every group; raises `CodecError` if they do not fill `codes`."""
    sizes = expect_tensor(blob, "frames", torch.int32, (groups, FRAMES)).tolist()
    codes = expect_tensor(blob, "codes", torch.uint8, (blob.tensors["codes"].numel(),))
    flat = [size for group in sizes for size in group]
    if min(flat, default=0) < 0 or sum(flat) != len(codes):
        raise CodecError(f"transform chunk has frames of {sum(flat)} bytes in {len(codes)} bytes of codes")
    data, ends = codes.numpy().data, np.cumsum([0, *flat]).tolist()
    found = [data[a:b] for a, b in pairwise(ends)]
    return [found[i : i + FRAMES] for i in range(0, len(found), FRAMES)]
