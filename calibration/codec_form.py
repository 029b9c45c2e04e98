"""The form of an encoded chunk: its codec's name and parameters, to which certificates are bound."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias

from ..core import Codec
from .model_profile import Profile

Form: TypeAlias = tuple[str, str]  # name of a codec, and its parameters as canonical JSON


def parameters_of(codec: Codec) -> dict[str, Any]:
    """Fields of a codec for JSON: a wrapped codec as its name and parameters, a profile as its fingerprint.

    Two codecs with equal names and parameters encode a chunk to the same bytes; a certificate is bound to both. A codec
    that is not a dataclass has no parameters.
    """
    return {f.name: _plain(getattr(codec, f.name)) for f in fields(codec)} if is_dataclass(codec) else {}


def form_of(codec: Codec) -> Form:
    """The form in which a codec encodes: its name, and its parameters as canonical JSON."""
    return codec.name, canonical_json(parameters_of(codec))


def canonical_json(values: Mapping[str, Any]) -> str:
    """Equal fields give equal text."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _plain(value: object) -> Any:
    if isinstance(value, Profile):
        return value.fingerprint
    if is_dataclass(value) and not isinstance(value, type):
        return {"codec": getattr(value, "name", type(value).__name__)} | parameters_of(value)  # type: ignore[arg-type]
    return value
