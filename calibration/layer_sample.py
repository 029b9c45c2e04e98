"""Samples of one layer of a model, from which calibration fits tables."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import KVSpec


@dataclass(frozen=True, slots=True, eq=False)
class LayerSample:
    """Keys and values of one layer over a calibration text, and the sensitivity of the loss to each number.

    Attributes
    ----------
    keys : `[N, H, D]` float32, before rotation: `rope.shift(keys, -positions)`.
    values : `[N, H, Dv]` float32.
    key_fisher, value_fisher : `[F, H, D]`, `[F, H, Dv]` of the first F tokens, the squared gradients of the
        language-model loss (nats, summed over a sequence): the diagonal of the Fisher information.
    query_moments : `[H, D, D]` float64, mean of the outer products of all queries of a group with themselves, before
        rotation; text and strings alike.
    further_keys : `[N', H, D]` float32, keys over random strings, which are unlike text but are often retrieved.
    layer : which one of the model's it is.
    """

    spec: KVSpec
    keys: Tensor
    values: Tensor
    key_fisher: Tensor
    value_fisher: Tensor
    query_moments: Tensor
    further_keys: Tensor
    layer: int = 0
