"""How the sequences of a session are decoded: with which method, in which layers, from which length on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....calibration.certificate import Certificate
from ....calibration.certificate_gate import CertificateGate
from ....calibration.codec_form import Form
from ....core import KVSpec
from ....errors import EngineError
from ....kvstore.chunk_store import ChunkStore
from ....retrieval.selector import LayerShape
from ....retrieval.settings import Retrieval, require_certificate
from ...break_even import break_even
from ..model import TransformersModel


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalPlan:
    """What all sequences of a session have in common.

    Attributes
    ----------
    shapes : the attention of every layer.
    window_tokens : per layer, how many tokens back the model's own attention reaches; None for all.
    break_even_tokens : shorter contexts are attended to densely.
    salt : part of every key.
    device : of the model.
    current_spec : gives the spec of the KV that the model would compute now.
    """

    spec: KVSpec
    shapes: Sequence[LayerShape]
    window_tokens: Sequence[int | None]
    retrieval: Retrieval
    break_even_tokens: int
    store: ChunkStore
    salt: bytes
    device: torch.device
    current_spec: Callable[[], KVSpec]

    def expect_unchanged(self) -> None:
        """Raises `EngineError` if the model would compute other KV now than the session holds."""
        if self.current_spec() != self.spec:
            raise EngineError(
                "the model or its adapters have changed since this session began; begin another, with its `token_ids`"
            )

    @property
    def retrieving_shapes(self) -> list[LayerShape | None]:
        """The attention of every layer that retrieves; None for layers that attend to everything."""
        return [shape if self.retrieves(layer) else None for layer, shape in enumerate(self.shapes)]

    def retrieves(self, layer: int) -> bool:
        return layer >= self.retrieval.dense_layers and self.window_tokens[layer] is None


class RetrievalPlanner:
    """Makes the plans of sessions, for one model and one store.

    Parameters
    ----------
    certificates, allow_uncertified : as for `TransformersConnector`.
    """

    def __init__(
        self,
        layers: TransformersModel,
        store: ChunkStore,
        salt: bytes,
        certificates: Sequence[Certificate],
        *,
        allow_uncertified: bool,
    ) -> None:
        self._layers, self._store, self._salt = layers, store, salt
        self._gate = CertificateGate(certificates, allow_uncertified=allow_uncertified)
        self._measured: dict[Form, int] = {}  # break-evens

    def plan(self, retrieval: Retrieval) -> RetrievalPlan:
        """The plan of a session.

        Raises
        ------
        TypeError : `retrieval` is no `Retrieval`.
        UncertifiedError : it is approximate and has no certificate for this model.
        SpecMismatchError : its profile was made for another model.
        """
        if not isinstance(retrieval, Retrieval):
            raise TypeError(
                f"retrieval is of type {type(retrieval).__name__}; expected a Retrieval, for instance "
                "Retrieval('landmarks', budget_ratio=0.12)"
            )
        spec = self._layers.spec
        if retrieval.profile is not None:
            retrieval.profile.check_serves(spec)
        certificate = require_certificate(self._gate, retrieval, spec)
        return RetrievalPlan(
            spec,
            [layer_shape(self._layers)] * spec.num_layers,
            self._layers.window_tokens,
            retrieval,
            self._break_even(retrieval, certificate),
            self._store,
            self._salt,
            self._layers.device,
            self._current_spec,
        )

    def _current_spec(self) -> KVSpec:
        self._layers.refresh()
        return self._layers.spec

    def _break_even(self, retrieval: Retrieval, certificate: Certificate | None) -> int:
        """What the caller gave, else what the certificate says, else what is measured here, once for each method."""
        spec = self._layers.spec
        if retrieval.break_even_tokens is not None:
            return retrieval.break_even_tokens
        known = None if certificate is None else certificate.conditions.get("break_even_tokens")
        if isinstance(known, int):
            return known
        if retrieval.form not in self._measured:
            shape = layer_shape(self._layers)
            self._measured[retrieval.form] = break_even(retrieval, shape, spec.value_dim, spec.dtype)
        return self._measured[retrieval.form]


def layer_shape(layers: TransformersModel) -> LayerShape:
    """The attention of a model's layers, which are all alike."""
    spec = layers.spec
    group = layers.decoder.config.num_attention_heads // spec.num_kv_heads
    return LayerShape(spec.num_kv_heads, group, spec.head_dim, layers.scale, spec.rope)
