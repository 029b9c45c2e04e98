"""Codecs for tests: one that loses what can be foretold, one that loses nothing but looks different."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.codec_form import parameters_of
from kvloom.compress.envelope import cpu_copy, open_envelope, seal
from kvloom.compress.raw import RawCodec
from kvloom.core import Codec, EncodedChunk, KVChunk, KVSpec
from kvloom.errors import CodecError

_NAMES = frozenset({"keys", "values"})


@dataclass(frozen=True)
class CoarseCodec:
    """Every number as a multiple of `step` in 8 bits; what is beyond 127 steps, or not finite, is refused."""

    name: ClassVar[str] = "coarse"
    is_lossless: ClassVar[bool] = False
    step: float = 1 / 16

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        codes = {name: (getattr(chunk, name).float() / self.step).round() for name in _NAMES}
        if not all(bool((code.abs() <= 127).all()) for code in codes.values()):
            raise CodecError("coarse: a number is out of range")
        return seal(self, chunk, {name: cpu_copy(code.to(torch.int8)) for name, code in codes.items()}, _NAMES)

    def decode(self, blob: EncodedChunk, positions: Tensor | None = None) -> KVChunk:
        envelope = open_envelope(blob, self.name, _NAMES)
        spec, step, placed = envelope.spec, envelope.parameters["step"], envelope.placed(positions)
        keys, values = ((blob.tensors[name].float() * step).to(spec.dtype) for name in ("keys", "values"))
        if spec.rope is not None:
            keys = spec.rope.shift(keys, placed - envelope.positions)
        return KVChunk(spec, envelope.token_ids, placed, keys, values, envelope.first_layer)


@dataclass(frozen=True)
class TwinCodec(RawCodec):
    """Raw in another form: another name, and a parameter that changes nothing."""

    name: ClassVar[str] = "twin"
    level: int = 1


def certify(codec: Codec, spec: KVSpec, *, loss: float = 0.01, limit: float | None = 0.05) -> Certificate:
    """A certificate as if it had been measured."""
    figure = Figure(loss, loss / 2, 2 * loss, "share", limit)
    return Certificate(spec, codec.name, parameters_of(codec), {"perplexity_increase": figure}, {"windows": 3})
