"""Retrieval as a caller asks for it: the method, its budget, and what is attended to anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

from blake3 import blake3

from ..calibration.certificate import Certificate
from ..calibration.certificate_gate import CertificateGate
from ..calibration.codec_form import Form, canonical_json
from ..calibration.model_profile import Profile
from ..core import KVSpec
from .registry import METHODS, NAMED_DEFAULTS, selector_by_name
from .selector import LayerShape, Pooling, Selector

CHUNK_TOKENS = 256  # stored together, and leave the window together
_GRID_TOKENS = 8  # indexes are cut at multiples of it, see `TravelsWithChunks`
_LEAST = {"budget_tokens": 0, "sink_tokens": 0, "window_tokens": 1, "dense_layers": 0, "break_even_tokens": 0}


@dataclass(frozen=True, slots=True, eq=False)
class Retrieval:
    """Decoding that attends to sinks, window and, of the tokens between them, those that a method chooses.

    Attributes
    ----------
    method : a name of `retrieval.registry.METHODS`; the default is the one that loses least on a pretrained model.
    budget_ratio : tokens chosen for each KV head and step, as a share of those between sinks and window.
    coverage : of the tokens chosen, attend to the fewest that hold this share of the attention, sinks and window
        included (see `coverage.covering`); `budget_ratio` is then a bound. None attends to all that are chosen.
    budget_tokens : choose at least this many.
    sink_tokens : number of first tokens that are always attended to; a multiple of 8.
    window_tokens : least number of last tokens that are always attended to; there may be `CHUNK_TOKENS` more, since
        tokens leave the window a chunk at a time.
    dense_layers : number of first layers that attend to everything.
    pooling : how the query heads of a group agree, see `pooled`.
    parameters : of the method, see its constructor (`landmarks+factor`: `candidate_ratio`, and those of both).
    profile : from `kvloom calibrate`, for methods that need it.
    break_even_tokens : contexts shorter than that are attended to densely; None for what a certificate says, or else
        what is measured on this machine at first use. No part of `form`.

    Raises
    ------
    TypeError, ValueError : a field of the wrong type or value; the message names it.
    """

    method: str = "quantized"
    budget_ratio: float = 0.03
    coverage: float | None = None
    budget_tokens: int = 0
    sink_tokens: int = 16
    window_tokens: int = 128
    dense_layers: int = 0
    pooling: Pooling = "max"
    parameters: Mapping[str, Any] = field(default_factory=dict)
    profile: Profile | None = None
    break_even_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            known = ", ".join(sorted(METHODS))
            if not isinstance(self.method, str):
                raise TypeError(f"method is {self.method!r}; expected a name: {known}")
            raise ValueError(f"no retrieval method {self.method!r}; known: {known}")
        if self.pooling not in get_args(Pooling):
            raise ValueError(f"pooling is {self.pooling!r}; expected one of {', '.join(get_args(Pooling))}")
        if isinstance(self.budget_ratio, bool) or not isinstance(self.budget_ratio, Real):
            raise TypeError(f"budget_ratio is {self.budget_ratio!r}; expected a number between 0 and 1")
        if not 0.0 <= float(self.budget_ratio) <= 1.0:
            raise ValueError(f"budget_ratio is {self.budget_ratio}; expected a share between 0 and 1")
        object.__setattr__(self, "budget_ratio", float(self.budget_ratio))
        if self.coverage is not None:
            if isinstance(self.coverage, bool) or not isinstance(self.coverage, Real):
                raise TypeError(f"coverage is {self.coverage!r}; expected a number above 0, at most 1, or None")
            if not 0.0 < float(self.coverage) <= 1.0:
                raise ValueError(f"coverage is {self.coverage}; expected a share above 0, at most 1")
            object.__setattr__(self, "coverage", float(self.coverage))
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is None and name == "break_even_tokens":
                continue
            if isinstance(value, bool) or not isinstance(value, Integral):
                raise TypeError(f"{name} is {value!r}; expected an integer")
            if value < least:
                raise ValueError(f"{name} is {value}; expected at least {least}")
            object.__setattr__(self, name, int(value))
        if self.sink_tokens % _GRID_TOKENS or self.sink_tokens >= CHUNK_TOKENS:
            raise ValueError(
                f"sink_tokens is {self.sink_tokens}; expected a multiple of {_GRID_TOKENS} below {CHUNK_TOKENS}"
            )
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"parameters is of type {type(self.parameters).__name__}; expected a mapping")
        if self.profile is not None and not isinstance(self.profile, Profile):
            raise TypeError(f"profile is of type {type(self.profile).__name__}; expected a Profile, see Profile.load")

    @property
    def is_exact(self) -> bool:
        """Whether the budget covers everything, so that nothing is approximated."""
        return self.budget_ratio >= 1.0 and (self.coverage is None or self.coverage >= 1.0)

    @property
    def fields(self) -> dict[str, Any]:
        """All settings but the method and the break-even, as JSON takes them."""
        return {
            "budget_ratio": self.budget_ratio,
            "budget_tokens": self.budget_tokens,
            "sink_tokens": self.sink_tokens,
            "window_tokens": self.window_tokens,
            "dense_layers": self.dense_layers,
            "pooling": self.pooling,
            "parameters": {**NAMED_DEFAULTS.get(self.method, {}), **self.parameters},
            "profile": None if self.profile is None else self.profile.fingerprint,
            # named only where it is set, so that certificates made before there was one stay valid
            **({} if self.coverage is None else {"coverage": self.coverage}),
        }

    @property
    def form(self) -> Form:
        """Name and parameters, to which certificates and the keys of approximate chunks are bound."""
        return f"retrieval {self.method}", canonical_json(self.fields)

    @property
    def index_name(self) -> str:
        """Name of the index: it stands for what the index depends on, so indexes of one name are interchangeable."""
        learned = {name: self.fields[name] for name in ("parameters", "profile")}
        method = self.method.replace("+", ".")  # extras of chunks have no "+" in their names
        return f"{method}:{blake3(canonical_json(learned).encode()).hexdigest(8)}"

    def selector(self, shape: LayerShape, layer: int, *, start: int | None = None) -> Selector:
        """An empty index of one layer, of the tokens from `start` on; None for those behind the sinks."""
        return selector_by_name(
            self.method,
            shape,
            layer,
            start=self.sink_tokens if start is None else start,
            pooling=self.pooling,
            profile=self.profile,
            parameters=self.parameters,
        )

    def budget(self, covered: int) -> int:
        """Number of tokens to choose, for each KV head, from `covered` tokens."""
        return min(covered, max(self.budget_tokens, math.ceil(self.budget_ratio * covered)))


def require_certificate(gate: CertificateGate, retrieval: Retrieval, spec: KVSpec) -> Certificate | None:
    """The certificate that covers a retrieval for a model; None if it needs none, or the gate permits it without.

    Raises
    ------
    UncertifiedError : the retrieval approximates, and may not be used for the model.
    """
    if not retrieval.is_exact:
        what = f"retrieval {retrieval.method!r} at a budget of {retrieval.budget_ratio:.1%}"
        if retrieval.coverage is not None:
            what += f" and a coverage of {retrieval.coverage:.1%}"
        gate.require(retrieval.form, spec, what, f"--retrieval {retrieval.method}")
    return gate.covering(retrieval.form, spec)
