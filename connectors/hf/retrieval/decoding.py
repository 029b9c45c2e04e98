"""How a model decodes with retrieval: whether it may, from which length on it does, and in which layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ....calibration.certificate import Certificate
from ....calibration.certificate_gate import CertificateGate
from ....calibration.codec_form import Form
from ....core import KVSpec
from ....kvstore.store import KVStore
from ....retrieval.selector import LayerShape
from ....retrieval.settings import Retrieval, require_certificate
from ...break_even import break_even
from ..model import TransformersModel
from .plan import Plan


class Decoding:
    """Makes the plans of sessions, for one model and one store.

    Parameters
    ----------
    certificates, allow_uncertified : as for `TransformersConnector`.
    """

    def __init__(
        self,
        layers: TransformersModel,
        store: KVStore,
        device: torch.device,
        salt: bytes,
        certificates: Sequence[Certificate],
        *,
        allow_uncertified: bool,
    ) -> None:
        self._layers, self._store, self._device, self._salt = layers, store, device, salt
        self._gate = CertificateGate(certificates, allow_uncertified=allow_uncertified)
        self._break_evens: dict[Form, int] = {}  # measured here

    def plan(self, retrieval: Retrieval) -> Plan:
        """Raises `UncertifiedError` if it may not be, and `SpecMismatchError` if its profile is of another model."""
        spec = self._layers.spec
        if retrieval.profile is not None:
            retrieval.profile.check_serves(spec)
        certificate = require_certificate(self._gate, retrieval, spec)
        return Plan(
            spec,
            [layer_shape(self._layers)] * spec.num_layers,
            self._layers.window_tokens,
            retrieval,
            self._break_even(retrieval, certificate),
            self._store,
            self._salt,
            self._device,
            self._current_spec,
        )

    def _current_spec(self) -> KVSpec:
        self._layers.refresh()
        return self._layers.spec

    def _break_even(self, retrieval: Retrieval, certificate: Certificate | None) -> int:
        """As the caller has it, as the certificate has it, or measured here, once."""
        spec = self._layers.spec
        if retrieval.break_even_tokens is not None:
            return retrieval.break_even_tokens
        known = None if certificate is None else certificate.conditions.get("break_even_tokens")
        if isinstance(known, int):
            return known
        if retrieval.form not in self._break_evens:
            shape = layer_shape(self._layers)
            self._break_evens[retrieval.form] = break_even(retrieval, shape, spec.value_dim, spec.dtype)
        return self._break_evens[retrieval.form]


def layer_shape(layers: TransformersModel) -> LayerShape:
    """The attention of a model's layers."""
    spec = layers.spec
    group = layers.decoder.config.num_attention_heads // spec.num_kv_heads
    return LayerShape(spec.num_kv_heads, group, spec.head_dim, layers.scale, spec.rope)
