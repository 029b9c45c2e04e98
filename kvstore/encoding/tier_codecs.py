"""In which codec's form a chunk lies in each tier, and what gives it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from ...calibration.codec_form import Form, form_of
from ...compress.envelope import form_of_blob, is_exact
from ...core import Codec, EncodedChunk, KVChunk, KVSpec
from ...errors import CodecError
from . import extras
from .buffer_pool import BufferPool
from .certification import Permits
from .copies import on_cpu


class Forms:
    """The codec of every tier, and all codecs that are known. Every method may be called from any thread.

    An exact chunk takes the form of the tier that it goes into, whether it is put, demoted or promoted. A chunk that
    has lost something stays as it is wherever it goes: encoding it again could only lose more, and nobody has measured
    two losses in a row. So what a chunk says of itself, and the certificate that it needs, never change on its way.

    Parameters
    ----------
    tier_codecs : of each tier, fastest first.
    known : what stored chunks may have been encoded with; of two with the same name and parameters, the later counts.
    """

    def __init__(self, tier_codecs: Sequence[Codec], known: Iterable[Codec], permits: Permits) -> None:
        self.permits = permits
        self._spares = BufferPool()
        self._tier_codecs = [(form_of(codec), codec) for codec in tier_codecs]
        known = [*known, *tier_codecs]
        self._by_name = {codec.name: codec for codec in known}
        self._by_form = {form_of(codec): codec for codec in known}

    def expect_permits(self, spec: KVSpec) -> None:
        """Raises `UncertifiedError` unless every tier's form may be used for this model."""
        for codec in dict(self._tier_codecs).values():
            self.permits.expect(codec, spec)

    def encoder(self, chunk: KVChunk) -> Callable[[int], EncodedChunk]:
        """What gives the chunk in the form of a tier, by index, in memory of its own; encodes once for every form."""
        made: dict[Form, EncodedChunk] = {}

        def encode(index: int) -> EncodedChunk:
            form, codec = self._tier_codecs[index]
            if form not in made:
                made[form] = self._encode(codec, chunk)
            return made[form]

        return encode

    def fitted(self, index: int, blob: EncodedChunk) -> EncodedChunk:
        """What a tier is to hold of a chunk from another: itself, or encoded anew with the tier's codec.

        It stays as it is if it has the form already, has lost something, was made by a codec that is not known here, or
        if the tier's form is not permitted for its model.

        Raises
        ------
        CodecError, SpecMismatchError : the chunk cannot be decoded, or the tier's codec cannot encode it.
        """
        form, codec = self._tier_codecs[index]
        if form_of_blob(blob) == form or blob.codec not in self._by_name:
            return blob
        source = self.codec_of(blob)
        if not is_exact(blob, source):
            return blob
        chunk = extras.decode(on_cpu(blob), source.decode)
        return self._encode(codec, chunk) if self.permits.covers(codec, chunk.spec) else blob

    def codec_of(self, blob: EncodedChunk) -> Codec:
        """The codec that decodes a stored chunk.

        Raises
        ------
        CodecError : its codec is not known.
        """
        if blob.codec not in self._by_name:
            raise CodecError(f"codec {blob.codec!r} is not among {sorted(self._by_name)}; see KVStore(codecs=...)")
        # Of two codecs of one name, for instance with the profiles of two models, the one that made it.
        return self._by_form.get(form_of_blob(blob), self._by_name[blob.codec])

    def decode(self, codec: Codec, blob: EncodedChunk, positions: Tensor | None) -> KVChunk:
        """As the codec does, in memory that was used before if it can; used again when the last view of it is gone."""
        # Not by `isinstance`, which takes as long as the rest of a hit in memory.
        into: Callable[..., KVChunk] | None = getattr(codec, "decode_into", None)
        if into is None:
            return extras.decode(blob, lambda own: codec.decode(own, positions))
        return extras.decode(blob, lambda own: into(own, positions, self._spares.empty))

    def _encode(self, codec: Codec, chunk: KVChunk) -> EncodedChunk:
        """In memory of its own: a write that is given up goes on when the caller's memory is the caller's again."""
        blob = extras.encode(codec, chunk)
        return self._spares.copy(blob) if blob.leased else blob
