"""The central types and protocols: read this file, then any other file alone.

Shape letters used everywhere: `L` layers, `H` KV heads, `Hq` query heads, `G = Hq / H`, `T` tokens, `D` key head dim,
`Dv` value head dim, `E` hidden size, `Q` queries, `K` neighbours, `S` tokens of a whole context, `B` engine blocks,
`N` tokens a block.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from typing import Any, NewType, Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import SpecMismatchError

ChunkKey = NewType("ChunkKey", bytes)  # 32 bytes, keyed BLAKE3; made in kvstore/keys.py

_EXTRA_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,100}")


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How keys are rotated: the frequency table itself, never re-derived from theta.

    Attributes
    ----------
    inv_freq : `D / 2` frequencies in radians a token, fastest first.
    attention_scaling : amplitude that the model multiplies into cos and sin (YaRN); a rotation by an offset leaves it
        alone.
    interleaved : channel pairs are (2i, 2i + 1) instead of (i, i + D/2).
    passed_channels : last channels of a head that carry no position (partial rotary embeddings); D counts the others.
    """

    inv_freq: tuple[float, ...]
    attention_scaling: float = 1.0
    interleaved: bool = False
    passed_channels: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of a key, rotated and passed ones."""
        return 2 * len(self.inv_freq) + self.passed_channels

    def cos_sin(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines that move each pair by `offsets` (`[T]` int64): `[T, D / 2]` float32, from float64."""
        frequencies = torch.tensor(self.inv_freq, dtype=torch.float64, device=offsets.device)
        angles = offsets.to(torch.float64)[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    def shift(self, keys: Tensor, offsets: Tensor | int) -> Tensor:
        """Rotated keys moved by `offsets` positions: `k R_p -> k R_(p + offset)`.

        Computed in float32 from angles in float64 and rounded once to the dtype of `keys`. An offset of 0 for every
        token returns `keys` itself, bit for bit.

        Parameters
        ----------
        keys : `[..., T, D]`, after rotary embedding.
        offsets : tokens to move by, one for all or `[T]` int64.
        """
        if isinstance(offsets, int):
            offsets = torch.tensor([offsets])
        if keys.shape[-1] != self.head_dim:
            raise SpecMismatchError(
                f"keys have head dim {keys.shape[-1]}; the rope table of {len(self.inv_freq)} pairs and "
                f"{self.passed_channels} passed channels expects {self.head_dim}"
            )
        if not bool(offsets.any()):
            return keys
        if bool((offsets == offsets[0]).all()):
            offsets = offsets[:1]
        cos, sin = self.cos_sin(offsets.to(keys.device))
        if not self.passed_channels:
            return rotate_pairs(keys.float(), cos, sin, self.interleaved).to(keys.dtype)
        rotated = keys[..., : -self.passed_channels].float()
        moved = keys.clone()
        moved[..., : -self.passed_channels] = rotate_pairs(rotated, cos, sin, self.interleaved).to(keys.dtype)
        return moved


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """`[..., T, D]` float32 with channel pairs turned by the angles of `cos` and `sin`, `[T, D / 2]`; a new tensor."""
    turned = torch.empty_like(x)
    if interleaved:
        a, b, out_a, out_b = x[..., 0::2], x[..., 1::2], turned[..., 0::2], turned[..., 1::2]
    else:
        (a, b), (out_a, out_b) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin)
    return turned


@dataclass(frozen=True, slots=True)
class LayerRopes:
    """The rotations of a model whose layers rotate keys differently: one for each layer, None where it rotates none."""

    layers: tuple[RopeSpec | None, ...]


@dataclass(frozen=True, slots=True)
class KVSpec:
    """Geometry and identity of a cache, per tensor-parallel rank. Change any field and every key changes.

    Attributes
    ----------
    model_id : names the weights revision and adapter, not a path.
    rope : how all layers rotate keys, or how each does; None if keys carry no rotary position.
    v_head_dim : None means `head_dim`; 0 means a latent (MLA) cache that is all in the keys.
    shard : (rank, size) of tensor parallelism.
    """

    model_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    rope: RopeSpec | LayerRopes | None
    v_head_dim: int | None = None
    shard: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if isinstance(self.rope, LayerRopes) and len(self.rope.layers) != self.num_layers:
            raise SpecMismatchError(f"rope has {len(self.rope.layers)} layers; {self.model_id} has {self.num_layers}")

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def token_bytes(self) -> int:
        """Bytes that one token's keys and values take in all layers."""
        return self.num_layers * self.num_kv_heads * (self.head_dim + self.value_dim) * self.dtype.itemsize

    def rope_of(self, layer: int) -> RopeSpec | None:
        """How a layer rotates keys; None if it does not."""
        return self.rope.layers[layer] if isinstance(self.rope, LayerRopes) else self.rope

    def shift(self, keys: Tensor, offsets: Tensor | int, first_layer: int = 0) -> Tensor:
        """Keys `[L, ..., T, D]` of the layers from `first_layer` on moved by `offsets`, see `RopeSpec.shift`."""
        if not isinstance(self.rope, LayerRopes):
            return keys if self.rope is None else self.rope.shift(keys, offsets)
        if not (bool(offsets.any()) if isinstance(offsets, Tensor) else offsets):
            return keys
        moved = torch.empty_like(keys)
        for place, layer in enumerate(keys):
            rope = self.rope.layers[first_layer + place]
            moved[place] = layer if rope is None else rope.shift(layer, offsets)
        return moved

    @lru_cache(maxsize=64)  # noqa: B019  specs are few and small, and each put asks
    def to_json(self) -> str:
        """Canonical JSON: equal specs give equal text, in every process and release."""
        rope = (
            {"layers": [_rope_fields(each) for each in self.rope.layers]}
            if isinstance(self.rope, LayerRopes)
            else (_rope_fields(self.rope))
        )
        fields = asdict(replace(self, rope=None)) | {"rope": rope, "dtype": str(self.dtype).removeprefix("torch.")}
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> KVSpec:
        fields = json.loads(text)
        rope = fields.pop("rope")
        read = LayerRopes(tuple(map(_read_rope, rope["layers"]))) if rope and "layers" in rope else _read_rope(rope)
        dtype = getattr(torch, fields.pop("dtype"))
        return cls(**(fields | {"rope": read, "dtype": dtype, "shard": tuple(fields["shard"])}))

    def fingerprint(self) -> bytes:
        """32 bytes that stand for every field."""
        return hashlib.blake2b(b"kvloom KVSpec 2\0" + self.to_json().encode(), digest_size=32).digest()


def _rope_fields(rope: RopeSpec | None) -> dict[str, Any] | None:
    """Fields of a rotation for JSON; what was added since the first release is left out where it is nothing, so that
    fingerprints of models without it stay.
    """
    if rope is None:
        return None
    fields = asdict(rope)
    if not rope.passed_channels:
        del fields["passed_channels"]
    return fields


def _read_rope(fields: Mapping[str, Any] | None) -> RopeSpec | None:
    return None if fields is None else RopeSpec(**{**fields, "inv_freq": tuple(fields["inv_freq"])})


@dataclass(frozen=True, slots=True, eq=False)
class KVChunk:
    """KV of T tokens in the one canonical form: what engines give and take.

    Attributes
    ----------
    token_ids : `[T]` int64, cpu.
    positions : `[T]` int64, cpu; rotary position of each key.
    keys : `[L, H, T, D]`, after rotary embedding; on any device.
    values : `[L, H, T, Dv]`, on the device of the keys.
    first_layer : layer of `keys[0]`; a chunk read layer by layer holds only `len(keys)` layers from there.
    extras : further tensors that travel with the chunk, by name: an index of it, for instance. No codec sees them, and
        they do not change when the chunk is placed elsewhere.
    layered_extras : names of those whose first dimension is the layer, as of `keys`.

    Raises
    ------
    SpecMismatchError : a shape or dtype is not what `spec` says, or a name is not one that can be stored.
    """

    spec: KVSpec
    token_ids: Tensor
    positions: Tensor
    keys: Tensor
    values: Tensor
    first_layer: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    layered_extras: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        # shapes, not `len`: torch's own is Python, and chunks are made on every hit
        spec, tokens, layers = self.spec, self.token_ids.numel(), self.keys.shape[0] if self.keys.ndim else 0
        for name, tensor, dtype, shape in (
            ("token_ids", self.token_ids, torch.int64, (tokens,)),
            ("positions", self.positions, torch.int64, (tokens,)),
            ("keys", self.keys, spec.dtype, (layers, spec.num_kv_heads, tokens, spec.head_dim)),
            ("values", self.values, spec.dtype, (layers, spec.num_kv_heads, tokens, spec.value_dim)),
        ):
            if tensor.dtype != dtype or tensor.shape != shape:
                raise SpecMismatchError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}; {spec.model_id} asks for {dtype} {list(shape)}"
                )
        if not 0 <= self.first_layer <= self.first_layer + layers <= spec.num_layers:
            raise SpecMismatchError(
                f"chunk holds layers {self.first_layer} to {self.first_layer + layers}; "
                f"{spec.model_id} has {spec.num_layers}"
            )
        if self.extras or self.layered_extras:
            self._check_extras(layers)

    def __len__(self) -> int:
        return len(self.token_ids)

    def _check_extras(self, layers: int) -> None:
        if unknown := self.layered_extras - self.extras.keys():
            raise SpecMismatchError(f"layered_extras are {sorted(unknown)}; extras are {sorted(self.extras)}")
        for name, tensor in self.extras.items():
            if not _EXTRA_NAME.fullmatch(name):
                raise SpecMismatchError(f"extra is named {name!r}; expected 1 to 100 letters, digits, or any of _.:-")
            if name in self.layered_extras and tensor.shape[:1] != (layers,):
                raise SpecMismatchError(f"extra {name} is {list(tensor.shape)}; expected {layers} layers first")


@dataclass(frozen=True, slots=True, eq=False)
class EncodedChunk:
    """What tiers hold: self-describing, knows nothing of attention.

    Attributes
    ----------
    codec : name of the codec that made it.
    tensors : contiguous tensors by name, complete: nothing queued on a device is still to write them. Those that are
        layered lie on one device, all others on the cpu.
    meta : what the codec needs beside them, as text.
    layered : names of the tensors whose first dimension is the layer, so that layers can be read and verified alone.
    leased : the tensors lie in memory that is another's: of a tier that gets it back when the last view of them is
        gone, or, while a chunk is put, of who puts it. Who keeps them for long copies them.
    """

    codec: str
    tensors: Mapping[str, Tensor]
    meta: Mapping[str, str]
    layered: frozenset[str] = field(default=frozenset())
    leased: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def layers(self, start: int, stop: int) -> EncodedChunk:
        """Layers `[start, stop)` alone, without a copy; tensors without a layer dimension are kept whole."""
        tensors = {name: t[start:stop] if name in self.layered else t for name, t in self.tensors.items()}
        return EncodedChunk(self.codec, tensors, {**self.meta, "first_layer": str(start)}, self.layered, self.leased)


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """What is remembered of a stored chunk beside its bytes. A tier that survives a restart keeps it with the key.

    Attributes
    ----------
    after : the chunk that this one continues (its predecessor among `prefix_keys`), stored or not.
    namespace : whose it is, for quotas; at most 255 bytes of UTF-8.
    expires_at_s : Unix time from which on it is a miss; None for never.
    recompute_s : seconds that computing it took, if measured.
    """

    after: ChunkKey | None = None
    namespace: str = ""
    expires_at_s: float | None = None
    recompute_s: float | None = None


NOTHING = ChunkInfo()
"""Of a chunk of which nothing more is known."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A chunk in a tier. `nbytes` is what it takes there."""

    key: ChunkKey
    nbytes: int
    info: ChunkInfo


@runtime_checkable
class Codec(Protocol):
    """How a chunk gets smaller. A frozen dataclass; its parameters are stored with the data.

    Attributes
    ----------
    is_lossless : what is decoded is what was encoded, bit for bit, where it was computed. Any other codec needs a
        certificate for the model.
    """

    @property
    def name(self) -> str: ...
    @property
    def is_lossless(self) -> bool: ...
    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """Shares no memory with `chunk`, unless it is `leased`."""
        ...

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """`positions` (`[T]` int64): where to place it; None where it was computed. May share memory with `blob`.

        Raises `CodecError` if `blob` is not this codec's.
        """
        ...


@runtime_checkable
class Tier(Protocol):
    """Holds bytes, knows no policy: it never evicts on its own. Every method may be called from any thread."""

    @property
    def name(self) -> str: ...
    @property
    def capacity_bytes(self) -> int | None: ...
    @property
    def used_bytes(self) -> int: ...
    def get(self, key: ChunkKey) -> EncodedChunk | None:
        """Raises `ChunkCorruptError` or `TierUnavailableError`; read-only."""
        ...

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = ...) -> int | None:
        """Complete or not at all. Raises `TierFullError` (nothing is changed) or `TierUnavailableError`.

        Returns what the chunk takes in this tier, in bytes, as `entries` has it; None: about as much as its tensors.
        """
        ...

    def delete(self, key: ChunkKey) -> bool: ...
    def __contains__(self, key: object) -> bool: ...
    def entries(self) -> list[Entry]:
        """All chunks, least recently written first; reads no payload."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class KeyIndex(Protocol):
    """Maximum inner product, nothing else."""

    @property
    def dim(self) -> int: ...
    def __len__(self) -> int: ...
    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """`[Q, D]` -> scores `[Q, k]` float32 descending, ids `[Q, k]` int64; -1 pads."""
        ...


@runtime_checkable
class GrowableIndex(KeyIndex, Protocol):
    def add(self, keys: Tensor) -> None:
        """Ids continue from `len(self)`."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class LayerAttention:
    """What a layer does with the scores of its queries and keys.

    Attributes
    ----------
    scale : factor on the scores, usually `D ** -0.5`.
    window_tokens : how many tokens back attention reaches, itself included; None for all.
    softcap : scores become `softcap * tanh(score / softcap)`; None for as they are.
    sinks : `[Hq]`, a score of each head that takes its share of the softmax and has no value; None for none.
    """

    scale: float
    window_tokens: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


@runtime_checkable
class LayerwiseModel(Protocol):
    """What fusion needs from an engine: the parts of a decoder layer around its attention, and what that is."""

    @property
    def spec(self) -> KVSpec: ...
    @property
    def attention(self) -> Sequence[LayerAttention]:
        """Of every layer."""
        ...

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[T]` -> `[T, E]`."""
        ...

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[T, E]`, `[T]` -> queries `[Hq, T, D]` and keys `[H, T, D]` after rotary embedding, values `[H, T, Dv]`."""
        ...

    def finish(self, layer: int, hidden: Tensor, attn_out: Tensor) -> Tensor:
        """`[T, E]`, `[Hq, T, Dv]` -> `[T, E]`: output projection, residual, feed-forward, residual."""
        ...
