"""Entropy coding of another codec's codes, for disk and network: the tables are the model's, not the chunk's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..calibration.model_profile import Profile
from ..core import Codec, EncodedChunk, KVChunk
from ..errors import CodecError
from .kernels.ops import pack_bits, packed_bytes, unpack_bits
from .nested import Nested, Streamed, open_nested, seal_nested
from .predictor import TABLE_NAMES, CodeMoments, Predictor, count_codes, fit_prediction, to_frequencies
from .streams import STREAM_LAYERED, STREAM_NAMES, pack_streams, unpack_streams

_OWN_TABLE = "frequencies."
_MOST_CHANNELS = 1 << 20
_UNSEEN_COUNT = 0.2  # of a code in a context, before any is counted


@runtime_checkable
class PacksCodes(Protocol):
    """Optional capability of a codec: it says which of its tensors are packed codes of few bits."""

    def packed_codes(self, blob: EncodedChunk) -> Mapping[str, tuple[int, int]]:
        """Of a chunk that it encoded: names of layered tensors, each with the bits of a code and the codes in a row.

        Such a tensor is `pack_bits` of codes `[L, H, T, count]`, or `[L, T, count]`.
        """
        ...


@dataclass(frozen=True)
class EntropyCodec:
    """The inner codec's codes, each in as many bits as its probability asks for; all its other tensors as they are.

    CacheGen (arXiv 2310.07240, section 5.2) codes differences of neighbouring tokens with a distribution for each layer
    and channel. Deviations: channels of one token tell more of each other than neighbouring tokens do, so each is
    predicted from the token's channels before it, linearly, and its distribution is that of its predictability and
    prediction (see `Predictor`); tokens stay independent of one another. Tables are the model's, in the profile, as
    tables of a chunk's own cost what they save; rANS instead of an arithmetic coder; no lossy levels.

    Attributes
    ----------
    inner : a codec that `PacksCodes`; lossless over it.
    profile : with tables that `fit_entropy` made. Codes without tables there (another codec, bits or rank) get one
        distribution for each layer and head, stored with the chunk.
    """

    inner: Codec
    profile: Profile | None = None

    name: ClassVar[str] = "entropy"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, PacksCodes):
            raise TypeError(f"inner is {self.inner!r}; expected a codec that names its packed codes (PacksCodes)")

    @property
    def is_lossless(self) -> bool:
        return self.inner.is_lossless

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        """Raises `SpecMismatchError` if the profile is another model's."""
        if self.profile is not None:
            self.profile.check_serves(chunk.spec)
        inner = self.inner.encode(chunk)
        layers = range(chunk.first_layer, chunk.first_layer + len(chunk.keys))
        streamed: dict[str, Streamed] = {}
        tables: dict[str, Tensor] = {}
        columns: list[list[bytes]] = []
        for name, (bits, count) in sorted(_packed_codes(self.inner, inner).items()):
            packed = inner.tensors[name]
            streamed[name] = one = Streamed(packed.dtype, tuple(packed.shape[1:]), bits, count)
            codes = _unpacked(packed, one)
            if not _has_tables(self.profile, inner, name, one):
                tables[_OWN_TABLE + name] = _own_frequencies(codes, one)
            predictors = self._predictors(inner, name, one, layers, tables)
            columns.append([predictor.encode(layer) for predictor, layer in zip(predictors, codes, strict=True)])
        streams = [list(layer) for layer in zip(*columns, strict=True)] if columns else [[] for _ in layers]
        tensors = {**pack_streams(streams), **tables}
        return seal_nested(self, chunk, inner, streamed, tensors, STREAM_LAYERED | tables.keys())

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        """What the inner codec decodes.

        Raises
        ------
        CodecError : `blob` is not this codec's or the inner one's, its tables are in another profile, or a stream is
            not what the chunk says of it.
        SpecMismatchError : `positions` are not one int64 for each token, or the profile is another model's.
        """
        own = {name for name in blob.tensors if name.startswith(_OWN_TABLE)}
        nested = open_nested(blob, self.name, STREAM_NAMES | own)
        envelope = nested.envelope
        streams = unpack_streams(blob, envelope.num_layers, len(nested.streamed))
        tables = {name: blob.tensors[name] for name in own}
        layers = range(envelope.first_layer, envelope.first_layer + envelope.num_layers)
        tensors = {}
        for place, (name, streamed) in enumerate(sorted(nested.streamed.items())):
            _check_shape(nested, name, streamed)
            if _OWN_TABLE + name not in tables:
                self._check_profile(nested)
            predictors = self._predictors(nested.blob, name, streamed, layers, tables)
            codes = [
                predictor.decode(layer[place], envelope.tokens)
                for predictor, layer in zip(predictors, streams, strict=True)
            ]
            tensors[name] = _packed(codes, streamed)
        return self.inner.decode(nested.with_streamed(tensors), positions)

    def _predictors(
        self, inner: EncodedChunk, name: str, streamed: Streamed, layers: range, tables: Mapping[str, Tensor]
    ) -> list[Predictor]:
        channels = _channels(streamed)
        if (frequencies := tables.get(_OWN_TABLE + name)) is not None:
            heads = channels // streamed.count
            if frequencies.shape != (len(layers), heads, 1 << streamed.bits):
                raise CodecError(
                    f"{_OWN_TABLE}{name} is {list(frequencies.shape)}; expected "
                    f"{[len(layers), heads, 1 << streamed.bits]}"
                )
            bias = torch.zeros(channels, dtype=torch.int32)
            classes = torch.arange(heads).repeat_interleave(streamed.count).to(torch.int32)
            return [Predictor.of(None, bias, classes, layer[:, None]) for layer in frequencies]
        if self.profile is None or not _has_tables(self.profile, inner, name, streamed):
            raise CodecError(
                f"the profile has no entropy tables for {name} of {inner.codec}, {channels} channels a token"
            )
        prefix = _table_prefix(inner, name, streamed)
        weights, bias, classes, shares = (self.profile[prefix + table] for table in TABLE_NAMES)
        return [Predictor.of(weights[layer], bias[layer], classes[layer], shares[layer]) for layer in layers]

    def _check_profile(self, nested: Nested) -> None:
        made_with = nested.envelope.parameters.get("profile")
        if self.profile is None or self.profile.fingerprint != made_with:
            own = None if self.profile is None else self.profile.fingerprint
            raise CodecError(f"entropy chunk was encoded with the profile {made_with}; this codec has {own}")
        self.profile.check_serves(nested.envelope.spec)


def fit_entropy(inner: Codec, chunks: Sequence[KVChunk], *, classes: int = 16, bins: int = 32) -> dict[str, Tensor]:
    """What calibration puts into a profile for `EntropyCodec(inner)`, layers stacked.

    Tables take 2 bytes for each pair of channels: 2 MiB a layer and tensor at 1,024 channels.

    Parameters
    ----------
    inner : a codec that `PacksCodes`.
    chunks : whole ones, of one model, with some 20 tokens a channel or more; gone through twice.
    classes : of channels, by how predictable they are.
    bins : of predictions.
    """
    moments: dict[str, list[CodeMoments]] = {}
    widths: dict[str, int] = {}
    for prefix, bits, codes in _all_codes(inner, chunks):
        found = [CodeMoments.of(torch.from_numpy(layer), bits) for layer in codes]
        moments[prefix] = [a + b for a, b in zip(moments[prefix], found, strict=True)] if prefix in moments else found
        widths[prefix] = bits
    tables: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    predictors: dict[str, list[Predictor]] = {}
    for prefix, layers in moments.items():
        levels = 1 << widths[prefix]
        fitted = [fit_prediction(layer, bits=widths[prefix], classes=classes, bins=bins) for layer in layers]
        flat = to_frequencies(torch.ones(classes, bins, levels))
        predictors[prefix] = [Predictor.of(f["weights"], f["bias"], f["classes"], flat) for f in fitted]
        tables |= {prefix + table: torch.stack([f[table] for f in fitted]) for table in TABLE_NAMES[:3]}
        counts[prefix] = torch.zeros(len(layers), classes * bins, levels, dtype=torch.int64)
    for prefix, _, codes in _all_codes(inner, chunks):
        counts[prefix] += torch.stack(
            [count_codes(predictor, layer) for predictor, layer in zip(predictors[prefix], codes, strict=True)]
        )
    for prefix, seen in counts.items():
        tables[prefix + "frequencies"] = to_frequencies(seen + _UNSEEN_COUNT).unflatten(1, (classes, bins))
    return tables


def _all_codes(inner: Codec, chunks: Sequence[KVChunk]) -> Iterator[tuple[str, int, NDArray[np.uint8]]]:
    """Prefix of the tables' names, bits and codes `[L, M, T]` of every chunk's tensors."""
    for chunk in chunks:
        blob = inner.encode(chunk)
        for name, (bits, count) in _packed_codes(inner, blob).items():
            one = Streamed(torch.uint8, tuple(blob.tensors[name].shape[1:]), bits, count)
            yield _table_prefix(blob, name, one), bits, _unpacked(blob.tensors[name], one)


def _packed_codes(inner: Codec, blob: EncodedChunk) -> dict[str, tuple[int, int]]:
    if not isinstance(inner, PacksCodes):
        raise TypeError(f"inner is {inner!r}; expected a codec that names its packed codes (PacksCodes)")
    return {name: (bits, count) for name, (bits, count) in inner.packed_codes(blob).items() if count}


def _table_prefix(inner: EncodedChunk, name: str, streamed: Streamed) -> str:
    return f"entropy.{inner.codec}{streamed.bits}.{name}."


def _has_tables(profile: Profile | None, inner: EncodedChunk, name: str, streamed: Streamed) -> bool:
    """Whether the profile has tables for so many channels and bits."""
    if profile is None:
        return False
    prefix, channels, layers = _table_prefix(inner, name, streamed), _channels(streamed), profile.spec.num_layers
    if not all(prefix + table in profile.tensors for table in TABLE_NAMES):
        return False
    weights, bias, classes, frequencies = (profile[prefix + table] for table in TABLE_NAMES)
    return (
        weights.shape == (layers, channels, channels)
        and bias.shape == classes.shape == (layers, channels)
        and (frequencies.ndim, len(frequencies), frequencies.shape[-1]) == (4, layers, 1 << streamed.bits)
    )


def _channels(streamed: Streamed) -> int:
    """Codes of a token: `[H, T, bytes]` or `[T, bytes]` are one layer's."""
    return streamed.count * (streamed.shape[0] if len(streamed.shape) == 3 else 1)


def _check_shape(nested: Nested, name: str, streamed: Streamed) -> None:
    shape, tokens = streamed.shape, nested.envelope.tokens
    if (
        streamed.dtype != torch.uint8
        or not streamed.bits
        or not streamed.count
        or len(shape) not in (2, 3)
        or shape[-2:] != (tokens, packed_bytes(streamed.count, streamed.bits))
        or not 0 < _channels(streamed) <= _MOST_CHANNELS
    ):
        raise CodecError(f"entropy chunk of {tokens} tokens contradicts itself: {name} is {streamed}")


def _unpacked(packed: Tensor, streamed: Streamed) -> NDArray[np.uint8]:
    """`[L, H, T, bytes]` or `[L, T, bytes]` as codes `[L, M, T]`."""
    codes = unpack_bits(packed, streamed.bits, streamed.count).transpose(-1, -2).contiguous()
    return codes.reshape(len(packed), _channels(streamed), packed.shape[-2]).numpy()


def _packed(codes: Sequence[NDArray[np.uint8]], streamed: Streamed) -> Tensor:
    """The inverse of `_unpacked`, layer by layer."""
    tensor = torch.empty(len(codes), *streamed.shape, dtype=torch.uint8)
    for layer, found in zip(tensor, codes, strict=True):
        rows = torch.from_numpy(found).unflatten(0, (*streamed.shape[:-2], streamed.count)).transpose(-1, -2)
        layer.copy_(pack_bits(rows, streamed.bits))
    return tensor


def _own_frequencies(codes: NDArray[np.uint8], streamed: Streamed) -> Tensor:
    """`[L, H, n]` int16, one distribution for each layer and head."""
    layers, levels = len(codes), 1 << streamed.bits
    heads = codes.reshape(layers, _channels(streamed) // streamed.count, -1)
    counts = [[np.bincount(head, minlength=levels) for head in layer] for layer in heads]
    return to_frequencies(torch.from_numpy(np.array(counts)).reshape(layers, -1, levels))
