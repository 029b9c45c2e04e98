"""What the KV of documents lacks for having been computed alone, as far as that KV itself tells: a linear map, no pass.

Keys and values of a document that was computed alone know nothing of the documents before it. What these would change
is partly the same for all texts: a token's own key and value, and its place in its document, tell which way it would
move. A map fitted to a model's own text (`certify.correction_fit`) adds that part to documents while they are loaded.
What remains is chosen and recomputed as ever. Tokens that are computed anew owe it nothing, so that a fusion that
computes everything is exact with any map.

For each layer and KV head, with keys before rotation: `[dk, dv] = [k, v] W + b[place]`. Layer 0 needs none: its keys
and values depend on the token alone. The measurements are in decision 164.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..calibration.model_profile import Profile, model_identity
from ..core import KVSpec
from ..errors import SpecMismatchError

WEIGHTS, BIASES = "fusion.weights", "fusion.biases"
_PLACES = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # first offset of every class but the first: of tokens in their document
PLACES = len(_PLACES) + 1


def place_of(offsets: Tensor) -> Tensor:
    """The class, below `PLACES`, of tokens at these offsets from the start of their document."""
    return torch.bucketize(offsets, torch.tensor(_PLACES, device=offsets.device), right=True)


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """Corrects documents that were computed alone and do not stand at the start of a context.

    Attributes
    ----------
    spec : of the heads that it corrects: all of the model's, or those of one rank.
    weights : `[L, H, D + Dv, D + Dv]` float32.
    biases : `[L, H, PLACES, D + Dv]` float32.
    fingerprint : of the profile it comes from; stands for it in certificates and in names of fused KV.
    """

    spec: KVSpec
    weights: Tensor
    biases: Tensor
    fingerprint: str
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(init=False, repr=False, default_factory=dict)  # copied once

    @classmethod
    def from_profile(cls, profile: Profile, spec: KVSpec | None = None) -> Correction | None:
        """The one that a profile holds, None if it holds none.

        Parameters
        ----------
        spec : of one rank of tensor parallelism, for its heads; None for all of the model's.

        Raises
        ------
        SpecMismatchError : the profile was made for another model.
        """
        if WEIGHTS not in profile.tensors:
            return None
        tensors: Mapping[str, Tensor] = profile.tensors
        weights, biases = tensors[WEIGHTS].float(), tensors[BIASES].float()
        spec = spec or profile.spec
        index, count = spec.shard
        profile.check_serves(replace(spec, num_kv_heads=spec.num_kv_heads * count, shard=(0, 1)))
        heads = slice(index * spec.num_kv_heads, (index + 1) * spec.num_kv_heads)
        return cls(spec, weights[:, heads], biases[:, heads], profile.fingerprint)

    def check_serves(self, spec: KVSpec) -> None:
        """Checks that it was fitted to the model of `spec`.

        Raises
        ------
        SpecMismatchError : it was fitted to another one.
        """
        if model_identity(spec) != model_identity(self.spec):
            raise SpecMismatchError(
                f"the correction was fitted to {self.spec.model_id}, the model is {spec.model_id}; make a profile "
                "of it with `kvloom calibrate`"
            )

    def apply(
        self, keys: Tensor, values: Tensor, positions: Tensor, offsets: Tensor, *, first_layer: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Corrected keys and values.

        Parameters
        ----------
        keys : `[L, H, T, D]` of neighbouring layers, rotated to `positions`.
        values : `[L, H, T, Dv]`.
        positions : `[T]` int64.
        offsets : `[T]` int64, from the start of each token's document.
        first_layer : that of the first of these keys.
        """
        layers = slice(first_layer, first_layer + len(keys))
        weights, biases = (each[layers] for each in self._maps(keys.device))
        if not bool(weights.any()) and not bool(biases.any()):
            return keys, values
        plain = self.spec.shift(keys.float(), -positions, first_layer)
        change = torch.cat((plain, values.float()), dim=-1) @ weights
        change += biases[:, :, place_of(offsets.to(keys.device))]
        of_keys, of_values = change.split((keys.shape[-1], values.shape[-1]), dim=-1)
        turned = self.spec.shift(of_keys.contiguous(), positions, first_layer)
        return (keys.float() + turned).to(keys.dtype), (values.float() + of_values).to(values.dtype)

    def _maps(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weights and biases on a device, copied there when they are first asked for."""
        if device not in self._on:
            self._on[device] = self.weights.to(device), self.biases.to(device)
        return self._on[device]
