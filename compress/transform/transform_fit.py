"""Tables of `TransformCodec` from samples of some layers: means, weights, and the basis that these layers share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...calibration.layer_sample import LayerSample
from ..nuq.levels import tempered

_MOST_TOKENS = 8192  # that a basis is fitted to, evenly spaced over those given
_MOST_CHANNELS = 8192  # of a group of layers: the eigenvectors of that many take a minute
_LARGEST_GROUP = 6  # layers; 10 save a tenth of the bytes, and fitting takes three times as long
_SMALLEST_DEVIATION = 0.004  # of a coefficient, in square roots of nats: less rounds to 0 at any step that is of use
_UNIFORM_RATIO = 0.1  # of the weight that all channels of a layer share
_SMALLEST_WEIGHT_RATIO = 0.05  # to the mean: no channel's error may grow without bound


def group_layers(num_layers: int, channels: int) -> int:
    """How many layers share a basis; `channels` of keys and values together in one layer.

    More layers have more in common, but the basis grows with their square.
    """
    most = max(1, min(_LARGEST_GROUP, _MOST_CHANNELS // max(1, channels)))
    return -(-num_layers // -(-num_layers // most))  # groups of about equal size


def fit_group(samples: Sequence[LayerSample], first_layer: int) -> dict[str, Tensor]:
    """What `TransformCodec` needs of a group of consecutive layers, by name; the first dimension is the layer.

    Returns
    -------
    `transform.basis` `[g, M, r]` float16, orthonormal columns over all g layers, strongest first; `transform.mean`,
    `transform.weight` `[g, M]` float32; M channels, keys' before values'. `transform.group` `[g]` int64: `first_layer`.
    """
    means, weights, rows = [], [], []
    for sample in samples:
        stride = -(-len(sample.keys) // _MOST_TOKENS)
        channels = torch.cat([sample.keys[::stride].flatten(1), sample.values[::stride].flatten(1)], 1).float()
        fisher = [
            tempered(f.flatten(1), uniform_ratio=_UNIFORM_RATIO).mean(0)
            for f in (sample.key_fisher, sample.value_fisher)
            if f.numel()
        ]
        weight = torch.cat([_bounded(f.sqrt()) for f in fisher])
        means.append(channels.mean(0))
        weights.append(weight)
        rows.append((channels - means[-1]) * weight)
    energies, directions = _principal(torch.cat(rows, 1))
    rank = max(1, int((energies > _SMALLEST_DEVIATION**2).sum()))
    return {
        "transform.basis": directions[:, :rank].unflatten(0, (len(samples), -1)).half().contiguous(),
        "transform.mean": torch.stack(means),
        "transform.weight": torch.stack(weights),
        "transform.group": torch.full((len(samples),), first_layer),
    }


def _bounded(weight: Tensor) -> Tensor:
    largest = float(weight.mean())
    return weight.clamp(min=_SMALLEST_WEIGHT_RATIO * largest) if largest > 0.0 else torch.ones_like(weight)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances, descending, and orthonormal directions as columns, of `[N, C]`; at most N of them."""
    if len(rows) < rows.shape[1]:  # the smaller of both products has the same spectrum
        energies, left = torch.linalg.eigh(rows @ rows.T)
        energies, left = energies.flip(0).clamp(min=0.0), left.flip(1)
        rank = max(1, int((energies > 1e-6 * energies[0]).sum()))
        directions = (rows.T @ left[:, :rank]) / energies[:rank].sqrt().clamp(min=1e-20)
        return energies[:rank] / len(rows), torch.linalg.qr(directions)[0]
    energies, directions = torch.linalg.eigh(rows.T @ rows)
    return energies.flip(0).clamp(min=0.0) / len(rows), directions.flip(1)
