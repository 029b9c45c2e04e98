"""What methods learn of a model, put together layer by layer, from the last one on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.layer_sample import LayerSample
from ..core import KVSpec
from .method_fits import Fit, GroupFit


class ProfileParts:
    """The tensors of a profile, while its layers come in descending order.

    A method that learns from several layers at once waits until its group is complete.
    """

    def __init__(self, spec: KVSpec, fits: Mapping[str, Fit]) -> None:
        self._fits = fits
        self._of_layers = [dict[str, Tensor]() for _ in range(spec.num_layers)]
        self._waiting: dict[str, list[LayerSample]] = {name: [] for name in fits}
        self._spec = spec

    def add(self, layer: int, sample: LayerSample) -> None:
        """Every method learns from the layer before the last one that was added."""
        for name, fit in self._fits.items():
            if not isinstance(fit, GroupFit):
                self._of_layers[layer] |= fit(sample)
                continue
            self._waiting[name].insert(0, sample)
            if layer % fit.layers(self._spec) == 0:
                for what, tensors in fit.fit(self._waiting[name], layer).items():
                    for i, tensor in enumerate(tensors):
                        self._of_layers[layer + i][what] = tensor
                self._waiting[name].clear()

    def tensors(self) -> dict[str, Tensor]:
        """By name, stacked over the layers; where last dimensions differ, padded with zeros to the largest."""
        stacked = {}
        for name in self._of_layers[0]:
            rows = [tensors[name] for tensors in self._of_layers]
            if rows[0].ndim:
                width = max(row.shape[-1] for row in rows)
                rows = [F.pad(row, (0, width - row.shape[-1])) for row in rows]
            stacked[name] = torch.stack(rows).contiguous()
        return stacked
