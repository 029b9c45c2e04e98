"""Which approximations a store may keep and serve: those that are certified, or all if its owner insists."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Sequence

from ...calibration.certificate import Certificate
from ...calibration.codec_form import Form, form_of
from ...compress.envelope import form_of_blob, is_exact
from ...core import Codec, EncodedChunk, KVSpec
from ...errors import UncertifiedError, UncertifiedWarning

_CACHED = 256  # answers; a store sees few models and codecs


class CertificateGate:
    """Decides by the certificates at hand. Every method may be called from any thread, and takes no lock.

    Parameters
    ----------
    allow_uncertified : what has no certificate is allowed, too: counted, and warned of once.

    Attributes
    ----------
    uncertified_uses : how often something without a certificate was allowed.
    """

    def __init__(self, certificates: Sequence[Certificate], *, allow_uncertified: bool) -> None:
        self._certificates = tuple(certificates)
        self._allow_uncertified = allow_uncertified
        self._answers: dict[Hashable, bool] = {}
        self._numbers = itertools.count(1)  # of uses; `next` is one step
        self.uncertified_uses = 0

    def covers(self, codec: Codec, spec: KVSpec) -> bool:
        """Whether chunks of this model may be encoded so, by a certificate, by the override, or without loss."""
        return codec.is_lossless or self._allow_uncertified or self._is_certified(form_of(codec), spec)

    def check(self, codec: Codec, spec: KVSpec) -> None:
        """To be called before a chunk of this model is encoded for the store.

        Raises
        ------
        UncertifiedError : it may not be.
        """
        if codec.is_lossless or self._is_certified(form_of(codec), spec):
            return
        if not self._allow_uncertified:
            raise UncertifiedError(
                f"codec {codec.name!r} is lossy, and no certificate that passed covers it, with these parameters, for "
                f"{spec.model_id}: measure it with `kvloom certify MODEL --codec NAME` and give the result as "
                "KVStore(certificates=...), or insist with allow_uncertified=True"
            )
        self._count_use(codec.name, spec.model_id)

    def may_serve(self, codec: Codec, blob: EncodedChunk) -> bool:
        """Whether a stored chunk may be given out; it counts by its own parameters, not by those of `codec`."""
        if is_exact(blob, codec):
            return True
        spec_text, form = blob.meta.get("spec", ""), form_of_blob(blob)
        if self._cached((form, spec_text), lambda: self._covers_text(form, spec_text)):
            return True
        if self._allow_uncertified:
            self._count_use(codec.name, "the model of a stored chunk")
        return self._allow_uncertified

    def _is_certified(self, form: Form, spec: KVSpec) -> bool:
        return self._cached((form, spec), lambda: any(c.covers_form(form, spec) for c in self._certificates))

    def _covers_text(self, form: Form, spec_text: str) -> bool:
        try:
            spec = KVSpec.from_json(spec_text)
        except (LookupError, TypeError, ValueError, AttributeError):  # the model is unknown
            return False
        return any(c.covers_form(form, spec) for c in self._certificates)

    def _cached(self, question: Hashable, answer: Callable[[], bool]) -> bool:
        known = self._answers.get(question)
        if known is None:
            known = answer()
            if len(self._answers) >= _CACHED:
                self._answers.clear()
            self._answers[question] = known
        return known

    def _count_use(self, codec: str, model: str) -> None:
        self.uncertified_uses = number = next(self._numbers)
        if number == 1:
            warnings.warn(
                f"the lossy codec {codec!r} is used for {model} without a certificate (allow_uncertified=True): "
                "answers may differ from the exact model's by an unknown amount; measure it with `kvloom certify`",
                UncertifiedWarning,
                stacklevel=6,
            )
