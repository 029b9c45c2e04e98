"""What users may set of retrieval in vLLM: `additional_config={"kvloom": {"retrieval": {...}}}`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as checked_dataclass

from ....calibration.certificate import Certificate
from ....retrieval.settings import Retrieval
from ...serving.settings import ServingSettings
from ...serving.store_settings import (
    CHECKED,
    Count,
    FilePaths,
    Name,
    NonNegative,
    Ratio,
    Switch,
    Text,
    checked,
    expect_known,
)

_WHERE = "additional_config['kvloom']"
_OWN = ("certificates", "allow_uncertified", "model_id")


@checked_dataclass(frozen=True, slots=True, kw_only=True, config=CHECKED)
class _Given:
    """The JSON of `RetrievalSettings`. The defaults have no meaning: entries that are not given are left to it."""

    method: Name = ""
    budget_ratio: Ratio = 0.0
    coverage: Ratio | None = None
    budget_tokens: NonNegative = 0
    sink_tokens: NonNegative = 0
    window_tokens: Count = 1
    dense_layers: NonNegative = 0
    pooling: Text = ""
    parameters: Annotated[dict[str, Any], Field(description="an object")] = field(default_factory=dict)
    break_even_tokens: NonNegative | None = None
    certificates: FilePaths = ()
    allow_uncertified: Switch = False
    model_id: Name | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSettings:
    """How decoding attends in a vLLM engine. In JSON the fields of `retrieval` stand beside the others.

    Attributes
    ----------
    retrieval : see `Retrieval`; `profile` and the methods that need one cannot be named here.
    certificates : files made by `kvloom certify`.
    allow_uncertified : go on without one.
    model_id : the name under which the model was certified; None takes the connector's, or reads the model's files.
    """

    retrieval: Retrieval
    certificates: tuple[Path, ...] = ()
    allow_uncertified: bool = False
    model_id: str | None = None

    @classmethod
    def of_engine(cls, additional_config: object) -> RetrievalSettings | None:
        """Settings from an engine's `additional_config`; None if it does not ask for retrieval.

        Raises
        ------
        ValueError : a name is not known, or a value is not of its kind or out of its range. The message is one line.
        """
        ours = additional_config.get("kvloom") if isinstance(additional_config, Mapping) else None
        if ours is None:
            return None
        expect_known(ours, ("retrieval",), _WHERE)
        values = ours.get("retrieval")
        if values is None:
            return None
        where = f"{_WHERE}['retrieval']"
        if isinstance(values, Mapping) and isinstance(path := values.get("certificates"), str):
            values = {**values, "certificates": [path]}
        given = checked(_Given, values, where)
        if given.method == "vq":
            raise ValueError("method is 'vq', which needs a profile; vLLM's ranks cannot divide one")
        return cls(
            retrieval=Retrieval(**{name: getattr(given, name) for name in values if name not in _OWN}),
            certificates=tuple(map(Path, given.certificates)),
            allow_uncertified=given.allow_uncertified,
            model_id=given.model_id,
        )

    def load_certificates(self) -> list[Certificate]:
        """The certificates. Raises `UncertifiedError` for a file that is none."""
        return [Certificate.load(path) for path in self.certificates]


def decoding_identity(additional_config: object) -> bytes:
    """What shapes the KV of generated tokens beside the tokens: nothing where attention is exact.

    Only engines that decode in the same way find KV that was decoded through retrieval.
    """
    settings = RetrievalSettings.of_engine(additional_config)
    return b"" if settings is None or settings.retrieval.is_exact else " ".join(settings.retrieval.form).encode()


def asks_for_retrieval() -> bool:
    """Whether the engine that is being made asks for retrieval.

    vLLM asks for attention backends before it loads weights: wrong settings, the connector's too, are refused here.

    Raises
    ------
    ValueError : its settings are wrong.
    """
    from vllm.config import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    if config is None:
        return False
    check_connectors(config.kv_transfer_config)
    return RetrievalSettings.of_engine(config.additional_config) is not None


def check_connectors(transfer: Any) -> None:
    """Check the settings of kvloom's connectors in vLLM's `kv_transfer_config`, also those of a `MultiConnector`.

    Raises
    ------
    ValueError : a setting is wrong, see `ServingSettings.of`.
    """
    if transfer is None:
        return
    extra = transfer.kv_connector_extra_config or {}
    named = [(transfer.kv_connector, extra)]
    if transfer.kv_connector == "MultiConnector":
        children = extra.get("connectors") or ()
        named = [(each.get("kv_connector"), each.get("kv_connector_extra_config") or {}) for each in children]
    for name, config in named:
        if name == "KVLoomConnector":
            ServingSettings.of(config)
