"""How the sequences of a session are decoded: with which method, in which layers, from which length on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....calibration.certificate import Certificate
from ....calibration.certificate_gate import CertificateGate
from ....calibration.codec_form import Form
from ....core import KVSpec, LayerAttention
from ....errors import EngineError
from ....kvstore.chunk_store import ChunkStore
from ....retrieval.selector import LayerShape
from ....retrieval.settings import Retrieval, require_certificate
from ...break_even import break_even
from ..load_choice import LoadChoice
from ..model import TransformersModel

_WHOLE_HEADS = ("factor", "landmarks+factor", "sketch", "vq")  # methods that rotate by tables of their own


@dataclass(frozen=True, slots=True, eq=False)
class RetrievalPlan:
    """What all sequences of a session have in common.

    Attributes
    ----------
    shapes : the attention of every layer.
    attention : what every layer does with scores; those with a window do not retrieve.
    break_even_tokens : shorter contexts are attended to densely.
    salt : part of every key.
    device : of the model.
    current_spec : gives the spec of the KV that the model would compute now.
    choice : of what is loaded.
    """

    spec: KVSpec
    shapes: Sequence[LayerShape]
    attention: Sequence[LayerAttention]
    retrieval: Retrieval
    break_even_tokens: int
    store: ChunkStore
    salt: bytes
    device: torch.device
    current_spec: Callable[[], KVSpec]
    choice: LoadChoice

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
        return layer >= self.retrieval.dense_layers and self.attention[layer].window_tokens is None


class RetrievalPlanner:
    """Makes the plans of sessions, for one model and one store.

    Parameters
    ----------
    certificates, allow_uncertified : as for `TransformersConnector`.
    choice : of what sessions load.
    """

    def __init__(
        self,
        layers: TransformersModel,
        store: ChunkStore,
        salt: bytes,
        certificates: Sequence[Certificate],
        *,
        allow_uncertified: bool,
        choice: LoadChoice,
    ) -> None:
        self._choice = choice
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
        EngineError : the model caps its attention logits.
        ValueError : the method needs whole heads that are rotated, and the model rotates a part.
        """
        if not isinstance(retrieval, Retrieval):
            raise TypeError(
                f"retrieval is of type {type(retrieval).__name__}; expected a Retrieval, for instance "
                "Retrieval('landmarks', budget_ratio=0.12)"
            )
        spec = self._layers.spec
        if retrieval.profile is not None:
            retrieval.profile.check_serves(spec)
        self._expect_served(retrieval)
        certificate = require_certificate(self._gate, retrieval, spec)
        return RetrievalPlan(
            spec,
            [layer_shape(self._layers, layer) for layer in range(spec.num_layers)],
            self._layers.attention,
            retrieval,
            self._break_even(retrieval, certificate),
            self._store,
            self._salt,
            self._layers.device,
            self._current_spec,
            self._choice,
        )

    def _expect_served(self, retrieval: Retrieval) -> None:
        """See `plan`."""
        layers = self._layers
        if any(layer.softcap is not None for layer in layers.attention):
            raise EngineError(
                "the model caps its attention logits (softcap), and retrieval scores tokens without a cap; answer "
                "densely, by fuse, assemble or answer"
            )
        ropes = [layers.spec.rope_of(layer) for layer in range(layers.spec.num_layers)]
        if retrieval.method in _WHOLE_HEADS and any(rope is not None and rope.passed_channels for rope in ropes):
            raise ValueError(
                f"method {retrieval.method!r} needs heads that are rotated as a whole; this model rotates a part of "
                "each: use another method, see docs/models.md"
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


def layer_shape(layers: TransformersModel, layer: int = 0) -> LayerShape:
    """The shape of a layer's attention; layers differ in rotations and scales alone."""
    spec, group = layers.spec, layers.query_heads // layers.spec.num_kv_heads
    return LayerShape(spec.num_kv_heads, group, spec.head_dim, layers.attention[layer].scale, spec.rope_of(layer))
