"""What users may say of retrieval in vLLM: `additional_config={"kvloom": {"retrieval": {...}}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ....calibration.certificate import Certificate
from ....retrieval.settings import Retrieval

_SECTION = "retrieval"
_OWN = ("certificates", "allow_uncertified", "model_id")
_WITHOUT = ("profile",)  # codebooks of all heads; a rank has some of them
_KINDS: Mapping[str, tuple[type, ...]] = {
    "method": (str,),
    "budget_ratio": (int, float),
    "budget_tokens": (int,),
    "sink_tokens": (int,),
    "window_tokens": (int,),
    "dense_layers": (int,),
    "pooling": (str,),
    "parameters": (Mapping,),
    "break_even_tokens": (int, type(None)),
    "allow_uncertified": (bool,),
    "model_id": (str, type(None)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """How decoding attends in a vLLM engine. In JSON the fields of `retrieval` stand beside the others.

    Attributes
    ----------
    retrieval : see `Retrieval`; `profile` and the methods that need one cannot be named here.
    certificates : files made by `kvloom certify`.
    allow_uncertified : go on without one.
    model_id : the name under which the model was certified; None if the certificate knows its files.
    """

    retrieval: Retrieval
    certificates: tuple[Path, ...] = ()
    allow_uncertified: bool = False
    model_id: str | None = None

    @classmethod
    def of_engine(cls, additional_config: object) -> RetrievalSettings | None:
        """From an engine's `additional_config`; None if it does not ask for retrieval.

        Raises
        ------
        ValueError : a name is not known, or a value is not of its kind or out of its range.
        """
        ours = additional_config.get("kvloom") if isinstance(additional_config, Mapping) else None
        if ours is None:
            return None
        given = _object(ours, "additional_config['kvloom']", (_SECTION,)).get(_SECTION)
        if given is None:
            return None
        known = [field.name for field in fields(Retrieval) if field.name not in _WITHOUT]
        values = _object(given, "additional_config['kvloom']['retrieval']", (*known, *_OWN))
        if "method" not in values:
            raise ValueError("additional_config['kvloom']['retrieval'] names no method")
        for name, kinds in _KINDS.items():
            value = values.get(name)
            is_switch = isinstance(value, bool) and bool not in kinds  # JSON's true is no number
            if name in values and (is_switch or not isinstance(value, kinds)):
                expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
                raise ValueError(f"{name} is {value!r}; expected {expected}")
        if values["method"] == "vq":
            raise ValueError("method is 'vq', which needs a profile; vLLM's ranks cannot divide one")
        return cls(
            retrieval=Retrieval(**{name: value for name, value in values.items() if name in known}),
            certificates=_paths(values.get("certificates", ())),
            allow_uncertified=values.get("allow_uncertified", False),
            model_id=values.get("model_id"),
        )

    def load_certificates(self) -> list[Certificate]:
        """Raises `UncertifiedError` for a file that is none."""
        return [Certificate.load(path) for path in self.certificates]


def decoding_identity(additional_config: object) -> bytes:
    """What shapes the KV of generated tokens beside the tokens: nothing where attention is exact.

    KV that was decoded through retrieval is found by engines that decode in the same way, and by no others.
    """
    settings = RetrievalSettings.of_engine(additional_config)
    return b"" if settings is None or settings.retrieval.is_exact else " ".join(settings.retrieval.form).encode()


def asks_for_retrieval() -> bool:
    """Whether the engine that is being made does. Raises `ValueError` if its settings are wrong."""
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return config is not None and RetrievalSettings.of_engine(config.additional_config) is not None


def _object(given: object, where: str, known: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} is {given!r}; expected an object")
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; known are {', '.join(known)}")
    return given


def _paths(given: object) -> tuple[Path, ...]:
    if isinstance(given, str):
        given = (given,)
    if not isinstance(given, Sequence) or not all(isinstance(path, str | Path) for path in given):
        raise ValueError(f"certificates is {given!r}; expected paths of files")
    return tuple(map(Path, given))
