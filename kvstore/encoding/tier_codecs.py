"""The codec of each tier: what chunks are encoded with on their way in, and decoded with on their way out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ...calibration.certificate_gate import CertificateGate
from ...calibration.codec_form import form_of
from ...compress.envelope import form_of_blob, is_exact, spec_of_blob
from ...core import Codec, EncodedChunk, KVChunk, KVSpec
from ...errors import CodecError
from . import extras
from .buffer_pool import BufferPool
from .copies import on_cpu


class TierCodecs:
    """The codec of every tier, and all codecs that are known. Every method may be called from any thread.

    An exact chunk is encoded with the codec of the tier that it goes into, whether it is put, demoted or promoted. A
    chunk that has lost something stays as it is wherever it goes: encoding it again could only lose more, and
    certificates measure one loss, not two in a row. So what a chunk says of itself, and the certificate that it needs,
    never change.

    Parameters
    ----------
    tier_codecs : of each tier, fastest first.
    known : what stored chunks may have been encoded with; of two with the same name and parameters, the later counts.
    """

    def __init__(self, tier_codecs: Sequence[Codec], known: Iterable[Codec], gate: CertificateGate) -> None:
        self.gate = gate
        self._buffers = BufferPool()
        self._tier_codecs = [(form_of(codec), codec) for codec in tier_codecs]
        known = [*known, *tier_codecs]
        self._by_name = {codec.name: codec for codec in known}
        self._by_form = {form_of(codec): codec for codec in known}

    def check_certificates(self, spec: KVSpec) -> None:
        """Raises `UncertifiedError` unless every tier's codec may be used for this model."""
        for form, codec in dict(self._tier_codecs).items():
            if not codec.is_lossless:
                self.gate.require(form, spec, f"the lossy codec {codec.name!r}", "--codec NAME")

    def encode(self, chunk: KVChunk) -> list[EncodedChunk]:
        """The chunk for each tier, in memory of its own; encoded once for all tiers of one codec."""
        made = {form: self._encode(codec, chunk) for form, codec in dict(self._tier_codecs).items()}
        return [made[form] for form, _ in self._tier_codecs]

    def transcode(self, index: int, blob: EncodedChunk) -> EncodedChunk:
        """What a tier is to hold of a chunk from elsewhere: itself, or encoded anew with the tier's codec.

        It stays as it is if it has the form already, has lost something, was made by a codec that is not known here, or
        if no certificate allows the tier's codec for its model.

        Raises
        ------
        CodecError, SpecMismatchError : the chunk cannot be decoded, or the tier's codec cannot encode it.
        """
        form, codec = self._tier_codecs[index]
        if form_of_blob(blob) == form or blob.codec not in self._by_name:
            return blob
        source = self._codec_of(blob)
        if not is_exact(blob, source):
            return blob
        chunk = extras.decode(on_cpu(blob), source.decode)
        is_allowed = codec.is_lossless or self.gate.permits(form, chunk.spec)
        return self._encode(codec, chunk) if is_allowed else blob

    def decode(self, blob: EncodedChunk, positions: Tensor | None) -> KVChunk | None:
        """The chunk of a stored blob, if possible in memory that was used before (`DecodesInto`).

        None if it is lossy and no certificate covers it.

        Raises
        ------
        CodecError : its codec is not known, or the blob is not what that codec makes.
        """
        codec = self._codec_of(blob)
        # a stored chunk counts by its own parameters, not by those of `codec`
        if not is_exact(blob, codec) and not self.gate.use(
            form_of_blob(blob), spec_of_blob(blob), f"the lossy codec {codec.name!r}"
        ):
            return None
        # Not by `isinstance`, which takes as long as the rest of a hit in memory.
        into: Callable[..., KVChunk] | None = getattr(codec, "decode_into", None)
        if into is None:
            return extras.decode(blob, lambda own: codec.decode(own, positions))
        return extras.decode(blob, lambda own: into(own, positions, self._buffers.empty))

    def _encode(self, codec: Codec, chunk: KVChunk) -> EncodedChunk:
        """In memory of its own: a write that is given up goes on when the caller's memory is the caller's again."""
        blob = extras.encode(codec, chunk)
        return self._buffers.copy(blob) if blob.leased else blob

    def _codec_of(self, blob: EncodedChunk) -> Codec:
        if blob.codec not in self._by_name:
            raise CodecError(f"codec {blob.codec!r} is not among {sorted(self._by_name)}; see KVStore(codecs=...)")
        # Of two codecs of one name, for instance with the profiles of two models, the one that made it.
        return self._by_form.get(form_of_blob(blob), self._by_name[blob.codec])
