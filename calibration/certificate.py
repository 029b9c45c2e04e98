"""Certificates: the measured losses of an approximation on one model, their limits, and what they permit."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core import Codec, KVSpec
from ..errors import UncertifiedError
from .codec_form import Form, canonical_json, form_of
from .model_profile import model_identity

FORMAT_VERSION = 1

_NUMBERS = ("value", "low", "high")
_TASK = "_loss"  # ends the name of a figure of a task


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured loss; 0 is the exact model, larger is worse.

    Attributes
    ----------
    value : as measured, in `unit`.
    low, high : its 95 % interval.
    limit : that `high` must not exceed; a short measurement has a high `high`. None if the loss is not judged.
    """

    value: float
    low: float
    high: float
    unit: str = ""
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not math.isfinite(self.limit):
            raise ValueError(f"limit is {self.limit}; expected a finite number, or None for no limit")

    @property
    def passed(self) -> bool:
        """Whether the limit holds, if there is one; a loss that is not finite exceeds every limit."""
        return self.limit is None or (math.isfinite(self.value) and self.high <= self.limit)


@dataclass(frozen=True, slots=True)
class Certificate:
    """The measured losses of one approximation (a codec, a retrieval or a fusion), with its parameters, on one model.

    It covers the model in any precision, since rounding to 16 bits is far below the losses that it measures, but no
    other weights, geometry, rope or tensor-parallel shard, and no other parameters.

    Attributes
    ----------
    spec : of the model.
    codec, parameters : as `codec_form.parameters_of` gives them.
    figures : losses by name.
    conditions : of the measurement: texts, windows, trials, what was left out and why.
    date : ISO 8601, UTC.
    version : of kvloom.
    """

    spec: KVSpec
    codec: str
    parameters: Mapping[str, Any]
    figures: Mapping[str, Figure]
    conditions: Mapping[str, Any] = field(default_factory=dict)
    date: str = ""
    version: str = ""

    @property
    def model_id(self) -> str:
        return self.spec.model_id

    @property
    def passed(self) -> bool:
        """Whether every limit holds and there is at least one. A certificate that has not passed covers nothing."""
        figures = self.figures.values()
        return any(f.limit is not None for f in figures) and all(f.passed for f in figures)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Kinds of task whose answers were judged; none where the model answers no task, and text alone has judged."""
        return tuple(name.removesuffix(_TASK) for name in self.figures if name.endswith(_TASK))

    @property
    def title(self) -> str:
        """Names it for people, and says so if no task was judged."""
        return f"{self.codec} on {self.model_id[:24]}" + ("" if self.tasks else ", judged without tasks")

    @property
    def form(self) -> Form:
        return self.codec, canonical_json(self.parameters)

    def covers(self, codec: Codec, spec: KVSpec) -> bool:
        """Whether `codec`, with its parameters, may be used for this model."""
        return self.covers_form(form_of(codec), spec)

    def covers_form(self, form: Form, spec: KVSpec) -> bool:
        """Whether this form may be used for this model."""
        return self.passed and form == self.form and model_identity(spec) == model_identity(self.spec)

    def to_json(self) -> str:
        """JSON text for people and for `from_json`; numbers that are not finite become null."""
        whole = {
            "kvloom_certificate": FORMAT_VERSION,
            "title": self.title,
            "model_id": self.model_id,
            "codec": self.codec,
            "parameters": dict(self.parameters),
            "passed": self.passed,
            "figures": {name: _figure_fields(figure) for name, figure in self.figures.items()},
            "conditions": dict(self.conditions),
            "date": self.date,
            "version": self.version,
            "spec": json.loads(self.spec.to_json()),
        }
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """Reads what `to_json` wrote; whether it passed follows from its figures and limits.

        Raises
        ------
        UncertifiedError : the text is no certificate that this release reads.
        """
        try:
            fields = json.loads(text)
            if fields["kvloom_certificate"] != FORMAT_VERSION:
                raise UncertifiedError(
                    f"certificate of version {fields['kvloom_certificate']}; expected {FORMAT_VERSION}: "
                    "make it anew with `kvloom certify`"
                )
            return cls(
                KVSpec.from_json(json.dumps(fields["spec"])),
                str(fields["codec"]),
                dict(fields["parameters"]),
                {str(name): _read_figure(figure) for name, figure in fields["figures"].items()},
                dict(fields["conditions"]),
                str(fields["date"]),
                str(fields["version"]),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as exc:
            raise UncertifiedError(f"this is not a certificate: {exc!r}; make one with `kvloom certify`") from exc

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Reads a certificate from a file.

        Raises
        ------
        UncertifiedError : the file does not exist or holds no certificate.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, UncertifiedError) as exc:
            raise UncertifiedError(f"{path} cannot be read as a certificate: {exc}") from exc


def _figure_fields(figure: Figure) -> dict[str, object]:
    numbers = {name: getattr(figure, name) for name in _NUMBERS}
    plain = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return asdict(figure) | plain | {"passed": figure.passed}


def _read_figure(fields: Mapping[str, Any]) -> Figure:
    value, low, high = (math.nan if fields[name] is None else float(fields[name]) for name in _NUMBERS)
    limit = None if fields["limit"] is None else float(fields["limit"])
    return Figure(value, low, high, str(fields["unit"]), limit)
