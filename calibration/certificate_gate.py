"""Whether an approximation may be used for a model: one answer for codecs, retrieval and fusion."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence

from ..core import KVSpec
from ..errors import JudgedWithoutTasksWarning, UncertifiedError, UncertifiedWarning
from .certificate import Certificate
from .codec_form import Form

_CACHED = 256  # answers; a process sees few models and forms


class CertificateGate:
    """Permits what a certificate covers, or everything if its owner says so.

    The first use of a certificate for which no task was judged warns, see `JudgedWithoutTasksWarning`. Every method may
    be called from any thread, and takes no lock.

    Parameters
    ----------
    allow_uncertified : what no certificate covers is permitted, too; its uses are counted, and the first one warns.

    Attributes
    ----------
    uncertified_uses : how often something without a certificate was permitted.
    """

    def __init__(self, certificates: Sequence[Certificate] = (), *, allow_uncertified: bool = False) -> None:
        self.certificates = tuple(certificates)
        self.allow_uncertified = allow_uncertified
        self.uncertified_uses = 0
        self._has_warned = False
        self._answers: dict[tuple[Form, KVSpec], Certificate | None] = {}
        self._numbers = itertools.count(1)  # of uses; `next` is atomic

    def covering(self, form: Form, spec: KVSpec) -> Certificate | None:
        """The first certificate that covers this form for this model; None if none does."""
        question = form, spec
        try:
            return self._answers[question]
        except KeyError:
            found = next((one for one in self.certificates if one.covers_form(form, spec)), None)
            if len(self._answers) >= _CACHED:
                self._answers.clear()
            self._answers[question] = found
            return found

    def permits(self, form: Form, spec: KVSpec) -> bool:
        """Whether the form may be used for the model; asking is no use of it."""
        return self.allow_uncertified or self.covering(form, spec) is not None

    def use(self, form: Form, spec: KVSpec | None, what: str) -> bool:
        """Whether the form may be used for the model, which is then counted as a use.

        Parameters
        ----------
        spec : of the model; None if it is unknown, which no certificate covers.
        what : names the approximation in the warning.
        """
        certificate = None if spec is None else self.covering(form, spec)
        if certificate is not None:
            if not certificate.tasks and not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{what} is used by the certificate {certificate.title!r}: it loses little on text, but whether it "
                    "keeps answers was not judged; `kvloom certify --tasks` names tasks",
                    JudgedWithoutTasksWarning,
                    stacklevel=5,
                )
            return True
        if self.allow_uncertified:
            self._count_use(what, "an unknown model" if spec is None else spec.model_id)
        return self.allow_uncertified

    def require(self, form: Form, spec: KVSpec, what: str, option: str) -> None:
        """Call this before an approximation is used.

        Parameters
        ----------
        what : names the approximation in messages, for instance `the lossy codec 'nuq'`.
        option : of `kvloom certify`, which measures it.

        Raises
        ------
        UncertifiedError : the form may not be used for the model.
        """
        if not self.use(form, spec, what):
            raise UncertifiedError(
                f"{what} may not be used for {spec.model_id}: no certificate that passed covers it, with these "
                f"parameters; measure it with `kvloom certify MODEL {option}` and give the result as certificates=..., "
                "or allow it with allow_uncertified=True"
            )

    def _count_use(self, what: str, model: str) -> None:
        self.uncertified_uses = number = next(self._numbers)
        if number == 1:
            warnings.warn(
                f"{what} is used for {model} without a certificate (allow_uncertified=True): answers may differ from "
                "the exact model's by an unknown amount; measure it with `kvloom certify`",
                UncertifiedWarning,
                stacklevel=6,
            )
