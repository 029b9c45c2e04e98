"""ShadowKV's low-rank keys: few coordinates a token, in a basis of the chunk's own or one shared by all chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..calibration.model_profile import Profile
from ..core import EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError
from .envelope import Envelope, expect_tensor, open_envelope, seal
from .exact import put_exact
from .gram import GramMatrix, factorize, rank_for
from .kernels.ops import pack_bits, packed_bytes, unpack_bits
from .raw import RawCodec
from .rotation import KeyRotation, unrotated
from .values import EncodesValues

_ALWAYS = frozenset({"keys.factor", "keys.exact", "keys.exact_at"})
_QUANTIZED = frozenset({"keys.scale", "keys.zero"})
_LARGEST_NORM = 30000.0  # of a key whose coordinates float16 holds in any orthonormal basis


@dataclass(frozen=True)
class LowRankCodec:
    """Keys of all heads before rotation as `factor [T, r] @ basis [r, M]`, M = H D (ShadowKV, arXiv 2410.21465, 4.1).

    The basis is the chunk's own, which suits long chunks, since it takes as much as the coordinates of M tokens. With a
    profile it is `lowrank.basis` of the model, and a chunk stores coordinates alone. Another codec encodes the values.

    Some tokens are kept exact: the sinks, tokens that are not finite or whose norm float16 cannot hold, and tokens that
    would be rebuilt with a relative error above `max_residual`.

    Deviations: the eigenvectors of a Gram matrix instead of an SVD; the factor optionally in integers, by column, over
    its range; exact tokens instead of outlier chunks of 8.

    Attributes
    ----------
    values : codec of the values; implements `EncodesValues`.
    rank : columns of the factor, at most; more than T, M or the profile's basis has is cut.
    energy : share of the keys' squared norm to keep in every layer, 0 to 1, by as few columns as that takes, up to
        `rank`.
    factor_bits : 8 or 4 for integers; None for float16.
    profile : holds `lowrank.basis` `[L, M, r]`, orthonormal columns, strongest first.
    sink_tokens : the context's first tokens, by position, that are kept exact.
    max_residual : relative error (norm of the error over that of the key) above which a token is kept exact; None for
        no limit.
    """

    values: EncodesValues = field(default_factory=RawCodec)
    rank: int | None = 160
    energy: float | None = None
    factor_bits: int | None = None
    profile: Profile | None = None
    sink_tokens: int = 1
    max_residual: float | None = 0.5

    name: ClassVar[str] = "lowrank"
    is_lossless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.factor_bits not in (None, 8, 4):
            raise ValueError(f"factor_bits is {self.factor_bits}; expected None, 8 or 4")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank is {self.rank}; expected at least 1, or None")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy is {self.energy}; expected above 0 and at most 1, or None")
        if not isinstance(self.values, EncodesValues):
            raise TypeError(f"values is {self.values!r}; expected a codec whose values stand alone (EncodesValues)")

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """Raises `SpecMismatchError` if the profile is another model's."""
        spec = chunk.spec
        shape = (len(chunk.keys), len(chunk), spec.num_kv_heads * spec.head_dim)  # as keys may have no element
        keys = unrotated(spec, chunk.keys, chunk.positions, chunk.first_layer).cpu().transpose(1, 2).reshape(shape)
        wild = ~(keys.norm(dim=-1) <= _LARGEST_NORM)  # NaN compares false
        exact = wild | (chunk.positions < self.sink_tokens)
        keys = torch.where(exact[..., None], 0.0, keys)
        factor, basis = self._own(keys) if self.profile is None else self._shared(chunk, keys)
        tensors = _stored_factor(factor, self.factor_bits)
        if self.profile is None:
            tensors["keys.basis"] = basis = basis.half()
        rebuilt = _read_factor(tensors, self.factor_bits) @ basis.float()
        errors = (rebuilt - keys).norm(dim=-1) / keys.norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        if self.max_residual is not None:
            exact = exact | (errors > self.max_residual)
        tensors |= _exact_rows(chunk.keys.cpu(), exact, errors)
        tensors |= self.values.encode_values(spec, chunk.values, chunk.first_layer)
        return seal(self, chunk, tensors, tensors.keys())

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """The chunk at `positions`: keys are rebuilt and rotated once; keys of exact tokens are moved.

        Raises
        ------
        CodecError : `blob` is another codec's, its values' codec is not `values`, its basis is in a profile that is not
            `profile`, or its parts contradict one another.
        SpecMismatchError : `positions` are not one int64 for each token, or `profile` is another model's.
        """
        names = _ALWAYS | self.values.value_names | ((_QUANTIZED | {"keys.basis"}) & blob.tensors.keys())
        envelope = open_envelope(blob, self.name, names)
        if blob.layered != names:
            raise CodecError(f"lowrank chunk has layered tensors {sorted(blob.layered)}; expected {sorted(names)}")
        spec, placed = envelope.spec, envelope.placed(positions)
        factor = _checked_factor(blob, envelope)
        basis = self._basis_of(blob, envelope, factor.shape[-1])
        # One product for all heads of a layer: it takes two thirds of the time of one for each head.
        keys = (factor @ basis.float()).unflatten(-1, (spec.num_kv_heads, spec.head_dim)).transpose(1, 2)
        keys = spec.shift(keys, placed, envelope.first_layer)
        keys = keys.to(spec.dtype, memory_format=torch.contiguous_format)
        _put_exact_rows(blob, envelope, keys, KeyRotation.to(placed, envelope))
        values = self.values.decode_values(
            spec, blob.tensors, envelope.first_layer, envelope.tokens, self._value_parameters(envelope)
        )
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)

    def _own(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        layers, tokens, channels = keys.shape
        pairs = [factorize(layer, rank=self.rank, energy=self.energy) for layer in keys]
        width = max((factor.shape[1] for factor, _ in pairs), default=0)
        factor, basis = keys.new_zeros(layers, tokens, width), keys.new_zeros(layers, width, channels)
        # Columns of norm sqrt(T) and rows of the channels' size: neither leaves the range of float16.
        size = max(tokens, 1) ** 0.5
        for layer, (columns, rows) in enumerate(pairs):
            factor[layer, :, : columns.shape[1]] = columns * size
            basis[layer, : rows.shape[0]] = rows / size
        return factor, basis

    def _shared(self, chunk: KVChunk, keys: Tensor) -> tuple[Tensor, Tensor]:
        basis = self._shared_basis(chunk.spec, chunk.first_layer, len(keys))
        coordinates = keys @ basis
        energies, totals = coordinates.double().square().sum(1), keys.double().square().sum((1, 2))
        width = max(
            (
                rank_for(own, rank=self.rank, energy=self.energy, total=float(total))
                for own, total in zip(energies, totals, strict=True)
            ),
            default=0,
        )
        return coordinates[..., :width], basis[..., :width].transpose(1, 2)

    def _shared_basis(self, spec: KVSpec, first_layer: int, layers: int) -> Tensor:
        """`[L, M, r]` float32, as the profile has it."""
        if self.profile is None:
            raise CodecError("lowrank chunk has no basis of its own; give the codec the profile it was encoded with")
        self.profile.check_serves(spec)
        basis = self.profile["lowrank.basis"]
        if basis.ndim != 3 or basis.shape[:2] != (spec.num_layers, spec.num_kv_heads * spec.head_dim):
            raise CodecError(
                f"lowrank.basis of the profile is {list(basis.shape)}; expected "
                f"[{spec.num_layers}, {spec.num_kv_heads * spec.head_dim}, rank]"
            )
        return basis[first_layer : first_layer + layers].float()

    def _basis_of(self, blob: EncodedChunk, envelope: Envelope, width: int) -> Tensor:
        """`[L, r, M]`: the chunk's own, or that of the profile it names."""
        spec, made_with = envelope.spec, envelope.parameters.get("profile")
        if made_with is None and "keys.basis" in blob.tensors:
            shape = (envelope.num_layers, width, spec.num_kv_heads * spec.head_dim)
            return expect_tensor(blob, "keys.basis", torch.float16, shape)
        if made_with is None or "keys.basis" in blob.tensors:
            raise CodecError("lowrank chunk contradicts itself: expected either a basis of its own or a profile")
        if self.profile is not None and self.profile.fingerprint != made_with:
            raise CodecError(
                f"lowrank chunk was encoded with the profile {made_with}; this codec has {self.profile.fingerprint}"
            )
        basis = self._shared_basis(spec, envelope.first_layer, envelope.num_layers)
        if width > basis.shape[-1]:
            raise CodecError(f"lowrank chunk has {width} coordinates a token, its profile a basis of {basis.shape[-1]}")
        return basis[..., :width].transpose(1, 2)

    def _value_parameters(self, envelope: Envelope) -> dict[str, object]:
        parameters = envelope.parameters.get("values")
        own = getattr(self.values, "name", None)
        if not isinstance(parameters, dict) or parameters.get("codec") != own:
            raise CodecError(f"lowrank chunk has values of the codec {parameters!r}; this codec's are of {own!r}")
        return parameters


def fit_layer(gram: GramMatrix, *, rank: int = 256) -> dict[str, Tensor]:
    """What calibration puts into a profile for one layer, without the layer dimension: `lowrank.basis` `[M, r]`.

    Parameters
    ----------
    gram : of the layer's keys before rotation, sinks left out, over texts like those to be served.
    rank : a codec of smaller rank takes the first columns.
    """
    return {"lowrank.basis": gram.basis(rank=rank)}


def _stored_factor(factor: Tensor, bits: int | None) -> dict[str, Tensor]:
    """`[L, T, r]` float32 as float16, or as codes `zero + scale * code` with float16 scale and zero by column."""
    if bits is None:
        return {"keys.factor": factor.half().contiguous()}
    steps = (1 << bits) - 1
    if factor.shape[1] == 0:
        low = high = factor.new_zeros(factor.shape[0], factor.shape[2])
    else:
        low, high = factor.amin(1), factor.amax(1)
    zero = low.half()
    scale = ((high - zero.float()) / steps).half()
    step = torch.where(scale > 0, scale.float(), torch.inf)  # a column of equal entries has code 0
    codes = ((factor - zero.float()[:, None]) / step[:, None]).round().clamp(0, steps)
    packed = pack_bits(codes.to(torch.uint8), bits).contiguous()
    return {"keys.factor": packed, "keys.scale": scale, "keys.zero": zero}


def _read_factor(tensors: Mapping[str, Tensor], bits: int | None) -> Tensor:
    """`[L, T, r]` float32."""
    factor = tensors["keys.factor"]
    if bits is None:
        return factor.float()
    scale, zero = tensors["keys.scale"].float(), tensors["keys.zero"].float()
    return unpack_bits(factor, bits, scale.shape[-1]).float() * scale[:, None] + zero[:, None]


def _checked_factor(blob: EncodedChunk, envelope: Envelope) -> Tensor:
    bits, leading = envelope.parameters.get("factor_bits"), (envelope.num_layers, envelope.tokens)
    quantized = _QUANTIZED & blob.tensors.keys()
    if (bits is not None and (type(bits) is not int or bits not in (8, 4))) or (
        quantized != (set() if bits is None else _QUANTIZED)
    ):
        raise CodecError(f"lowrank chunk contradicts itself: factor_bits is {bits}, it holds {sorted(blob.tensors)}")
    width = blob.tensors["keys.factor" if bits is None else "keys.scale"].shape[-1]
    if width == 0 and envelope.tokens:
        raise CodecError(f"lowrank chunk holds {envelope.tokens} tokens without a coordinate")
    if bits is None:
        expect_tensor(blob, "keys.factor", torch.float16, (*leading, width))
    else:
        expect_tensor(blob, "keys.factor", torch.uint8, (*leading, packed_bytes(width, bits)))
        for name in sorted(quantized):
            expect_tensor(blob, name, torch.float16, (envelope.num_layers, width))
    return _read_factor(blob.tensors, bits)


def _exact_rows(keys: Tensor, exact: Tensor, errors: Tensor) -> dict[str, Tensor]:
    """Rows of exact tokens, as many in every layer: layers with fewer exact tokens add those of largest error."""
    count = int(exact.sum(1).max()) if exact.numel() else 0
    badness = torch.where(exact, torch.inf, errors)
    at = badness.topk(count, dim=1).indices.sort(dim=1).values
    index = at[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return {"keys.exact_at": at.to(torch.int32).contiguous(), "keys.exact": keys.gather(2, index).contiguous()}


def _put_exact_rows(blob: EncodedChunk, envelope: Envelope, keys: Tensor, rotation: KeyRotation | None) -> None:
    """Writes the exact tokens over the rebuilt ones."""
    spec, count = envelope.spec, blob.tensors["keys.exact_at"].shape[-1]
    at = expect_tensor(blob, "keys.exact_at", torch.int32, (envelope.num_layers, count)).long()
    shape = (envelope.num_layers, spec.num_kv_heads, count, spec.head_dim)
    rows = expect_tensor(blob, "keys.exact", spec.dtype, shape)
    if at.numel() == 0:
        return
    if not 0 <= int(at.min()) <= int(at.max()) < envelope.tokens:
        raise CodecError(
            f"lowrank chunk of {envelope.tokens} tokens names exact tokens {int(at.min())}..{int(at.max())}"
        )
    for layer in range(envelope.num_layers):
        one = slice(layer, layer + 1)
        put_exact(keys[one], at[layer], rows[one], None if rotation is None else rotation.from_layer(layer))
