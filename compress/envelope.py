"""What every encoded chunk holds beside its codec's own tensors: spec, tokens, positions and parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..calibration.codec_form import Form, canonical_json, parameters_of
from ..core import Codec, EncodedChunk, KVChunk, KVSpec
from ..errors import CodecError, SpecMismatchError

C = TypeVar("C", bound=Codec)

_COMMON = frozenset({"token_ids", "positions"})
_LOSSY = "lossy"  # in the meta of chunks that are not given back bit for bit


@dataclass(frozen=True, slots=True, eq=False)
class Envelope:
    """Metadata of an encoded chunk, checked against its tensors.

    Attributes
    ----------
    num_layers : layers in the blob, from `first_layer` on.
    token_ids, positions : `[T]` int64; where the chunk was computed.
    parameters : of the codec that encoded it, as `parameters_of` gave them.
    """

    spec: KVSpec
    first_layer: int
    num_layers: int
    token_ids: Tensor
    positions: Tensor
    parameters: Mapping[str, Any]

    @property
    def tokens(self) -> int:
        return len(self.token_ids)

    def placed(self, positions: Tensor | None) -> Tensor:
        """`positions` (`[T]` int64), or the positions at which the chunk was computed if they are None.

        Raises
        ------
        SpecMismatchError : `positions` are not one int64 for each token.
        """
        return self.positions if positions is None else checked_positions(positions, self.tokens)


def form_of_blob(blob: EncodedChunk) -> Form:
    """The form of an encoded chunk, as `seal` wrote it."""
    return blob.codec, blob.meta.get("parameters", "{}")


def spec_of_blob(blob: EncodedChunk) -> KVSpec | None:
    """The model of an encoded chunk; None if the chunk does not name it."""
    try:
        return _read_spec(blob.meta["spec"])
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def is_exact(blob: EncodedChunk, codec: Codec) -> bool:
    """Whether `codec` decodes `blob` to the very bits that were encoded.

    The chunk's metadata counts beside the codec: a lossless wrapper may hold a lossy codec in `codec` and another one
    in `blob`.
    """
    return codec.is_lossless and _LOSSY not in blob.meta


def seal(
    codec: Codec, chunk: KVChunk, tensors: Mapping[str, Tensor], layered: Iterable[str], *, leased: bool = False
) -> EncodedChunk:
    """Makes the encoded chunk of a codec's own tensors; adds what `open_envelope` reads.

    Parameters
    ----------
    tensors : contiguous, on the cpu, sharing no memory with `chunk` unless `leased`.
    layered : names of those whose first dimension is the layer.
    """
    own = {"token_ids": chunk.token_ids.detach(), "positions": chunk.positions.detach()}
    if not leased or not all(tensor.is_contiguous() for tensor in own.values()):
        own = {name: cpu_copy(tensor) for name, tensor in own.items()}
    meta = {"spec": chunk.spec.to_json(), "first_layer": str(chunk.first_layer)}
    if parameters := parameters_of(codec):
        meta["parameters"] = canonical_json(parameters)
    if not codec.is_lossless:
        meta[_LOSSY] = "true"
    return EncodedChunk(codec.name, {**tensors, **own}, meta, frozenset(layered), leased)


def checked_positions(positions: Tensor, tokens: int) -> Tensor:
    """`positions` on the cpu. Raises `SpecMismatchError` if they are not `[tokens]` int64."""
    if positions.shape != (tokens,) or positions.dtype != torch.int64:
        raise SpecMismatchError(
            f"positions are {positions.dtype} {list(positions.shape)}; expected torch.int64 [{tokens}]"
        )
    return positions.cpu()


def read_meta(blob: EncodedChunk, codec: str, names: Iterable[str]) -> tuple[KVSpec, int, Mapping[str, Any]]:
    """Spec, first layer and parameters; a part of `open_envelope`, which has the same arguments and errors."""
    if blob.codec != codec:
        raise CodecError(f"chunk was encoded by {blob.codec!r}, this is the codec {codec!r}")
    if blob.tensors.keys() != (expected := _COMMON.union(names)):
        raise CodecError(f"{codec} chunk holds {sorted(blob.tensors)}; expected {sorted(expected)}")
    try:
        text = blob.meta.get("parameters")
        parameters = {} if text is None else json.loads(text)
        return _read_spec(blob.meta["spec"]), int(blob.meta["first_layer"]), parameters
    except (LookupError, TypeError, ValueError, AttributeError) as exc:
        raise CodecError(f"{codec} chunk without a readable spec, first layer and parameters: {exc!r}") from exc


def open_envelope(blob: EncodedChunk, codec: str, names: Iterable[str]) -> Envelope:
    """Reads and checks the metadata of an encoded chunk.

    Parameters
    ----------
    codec : name of the codec that is to decode it.
    names : the codec's own tensors, all of them.

    Raises
    ------
    CodecError : another codec encoded it, tensors are missing or unknown, or its parts contradict one another.
    """
    spec, first_layer, parameters = read_meta(blob, codec, names)
    counts = {blob.tensors[name].shape[0] if blob.tensors[name].ndim else -1 for name in blob.layered}
    if len(counts) != 1:
        raise CodecError(f"{codec} chunk has layered tensors of {sorted(counts)} layers")
    (num_layers,) = counts
    if not 0 <= first_layer <= first_layer + num_layers <= spec.num_layers:
        raise CodecError(f"{codec} chunk holds {num_layers} layers from {first_layer}; its spec has {spec.num_layers}")
    token_ids, positions = blob.tensors["token_ids"], blob.tensors["positions"]
    for name, tensor in (("token_ids", token_ids), ("positions", positions)):
        if tensor.dtype != torch.int64 or tensor.ndim != 1 or tensor.shape != token_ids.shape:
            raise CodecError(
                f"{codec} chunk contradicts itself: {name} {tensor.dtype} {list(tensor.shape)}; expected torch.int64 "
                f"[{len(token_ids)}]"
            )
    if not isinstance(parameters, dict):
        raise CodecError(f"{codec} chunk: parameters are {type(parameters).__name__}; expected an object")
    return Envelope(spec, first_layer, num_layers, token_ids, positions, parameters)


def codec_from_parameters(kind: type[C], parameters: Mapping[str, Any], *, beside: Iterable[str] = ()) -> C:
    """The codec that encoded a chunk, from the parameters in its metadata.

    Parameters
    ----------
    beside : parameters that are left out, so that they have their defaults.

    Raises
    ------
    CodecError : a parameter is unknown, or its value is not allowed.
    """
    left_out = {"codec", *beside}
    try:
        return kind(**{name: value for name, value in parameters.items() if name not in left_out})
    except (TypeError, ValueError) as exc:
        raise CodecError(f"{kind.name} chunk with parameters {dict(parameters)}: {exc}") from exc


def expect_tensor(blob: EncodedChunk, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name.

    Raises
    ------
    CodecError : its dtype or shape is another.
    """
    tensor = blob.tensors[name]
    if tensor.dtype != dtype or tensor.shape != shape:
        raise CodecError(
            f"{blob.codec} chunk: {name} is {tensor.dtype} {list(tensor.shape)}; expected {dtype} {list(shape)}"
        )
    return tensor


def cpu_copy(tensor: Tensor) -> Tensor:
    """A contiguous copy on the cpu."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


@lru_cache(maxsize=64)
def _read_spec(text: str) -> KVSpec:
    # Reading the frequency table costs as much as copying 300 KiB, and a store sees few specs.
    return KVSpec.from_json(text)
