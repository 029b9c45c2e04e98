"""KV of many documents, each computed alone, in one forward pass of the model's layers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, pairwise

import torch

from ...blend.attention import layer_attention
from ...core import ChunkKey, KVChunk
from .model import TransformersModel


class Prefill:
    """Computes the KV of token sequences.

    Parameters
    ----------
    lead_ids : tokens in front of every document.
    pack_tokens : a forward pass computes documents of about this many tokens.
    to_device : where chunks go; None leaves them where they are computed.
    """

    def __init__(
        self,
        layers: TransformersModel,
        *,
        lead_ids: Sequence[int],
        pack_tokens: int,
        to_device: torch.device | str | None = "cpu",
    ) -> None:
        self._to_device = to_device
        self._layers, self._lead_ids, self._pack_tokens = layers, tuple(lead_ids), pack_tokens

    def documents(self, documents: Mapping[ChunkKey, Sequence[int]]) -> Iterator[tuple[ChunkKey, KVChunk, float]]:
        """Key and KV of each document, and its share, by tokens, of the seconds that its forward pass took."""
        for pack in self._packs(documents):
            began_s = time.perf_counter()
            chunks = self.behind_lead(list(pack.values()))
            token_s = (time.perf_counter() - began_s) / sum(map(len, chunks))
            for key, chunk in zip(pack, chunks, strict=True):
                yield key, chunk, token_s * len(chunk)

    def behind_lead(self, documents: Sequence[Sequence[int]]) -> list[KVChunk]:
        """KV of documents, each alone behind the lead tokens, whose own KV is left out."""
        return self._compute([(*self._lead_ids, *ids) for ids in documents], skip=len(self._lead_ids))

    def lead(self) -> KVChunk:
        """KV of the lead tokens."""
        return self.alone(self._lead_ids)

    def alone(self, token_ids: Sequence[int]) -> KVChunk:
        """KV of tokens with nothing before them."""
        return self._compute([token_ids], skip=0)[0]

    def _packs(self, documents: Mapping[ChunkKey, Sequence[int]]) -> Iterator[dict[ChunkKey, Sequence[int]]]:
        pack: dict[ChunkKey, Sequence[int]] = {}
        tokens = 0
        for key, ids in documents.items():
            if pack and tokens + len(ids) > self._pack_tokens:
                yield pack
                pack, tokens = {}, 0
            pack[key] = ids
            tokens += len(ids) + len(self._lead_ids)
        if pack:
            yield pack

    @torch.no_grad()
    def _compute(self, sequences: Sequence[Sequence[int]], *, skip: int) -> list[KVChunk]:
        """KV of packed sequences without their first `skip` tokens.

        Every sequence attends to itself alone: a block-diagonal mask, without computing the blocks that it masks out.
        """
        layers, device, spec = self._layers, self._layers.device, self._layers.spec
        bounds = list(pairwise(accumulate(map(len, sequences), initial=0)))
        positions = torch.cat([torch.arange(b - a, device=device) for a, b in bounds])
        hidden = layers.embed(torch.tensor(list(chain.from_iterable(sequences)), device=device))
        keys, values = [], []
        for layer in range(spec.num_layers):
            q, k, v = layers.qkv(layer, hidden, positions)
            keys.append(k if self._to_device is None else k.to(self._to_device))
            values.append(v if self._to_device is None else v.to(self._to_device))
            if layer + 1 < spec.num_layers:
                alone = [
                    layer_attention(layers.attention[layer], q[:, a:b], k[:, a:b], v[:, a:b], positions[a:b])
                    for a, b in bounds
                ]
                hidden = layers.finish(layer, hidden, torch.cat(alone, dim=1))
        all_keys, all_values = torch.stack(keys), torch.stack(values)
        return [
            KVChunk(
                spec,
                torch.tensor(ids[skip:], dtype=torch.int64),
                torch.arange(skip, b - a),
                all_keys[:, :, a + skip : b],
                all_values[:, :, a + skip : b],
            )
            for ids, (a, b) in zip(sequences, bounds, strict=True)
        ]
