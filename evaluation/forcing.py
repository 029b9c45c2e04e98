"""A model's forward pass, layer by layer, with keys and values that something has changed: what attention then sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..blend.attention import layer_attention
from ..calibration.codec_form import parameters_of
from ..connectors.hf.model import TransformersModel
from ..core import Codec, KVChunk

CHUNK_TOKENS = 256
_HEAD_TOKENS = 256  # whose logits are computed at once

QUERIES, QUERY_POSITIONS = "queries", "query_positions"  # extras of a context, see `ForcedModel`

Approximate: TypeAlias = Callable[[KVChunk], KVChunk]
Attend: TypeAlias = Callable[[int, KVChunk, Tensor, Tensor, Tensor, int], Tensor | None]
"""`attend(layer, prefix, queries [Hq, T, D], keys [H, S, D], values [H, S, Dv], first)`: the outputs `[Hq, T, Dv]` of
tokens from position `first` on, keys and values being those of the prefix and their own; None for dense attention."""
AttendPart: TypeAlias = Callable[[int, int, Tensor, Tensor, Tensor], Tensor]
"""`attend(layer, part, queries [Hq, T, D], keys [H, T, D], values [H, T, Dv])`: the outputs `[Hq, T, Dv]` of one of
several rows of tokens; keys and values are their own alone."""


@dataclass(frozen=True, slots=True)
class Approximation:
    """Approximate KV: a change of the exact keys and values of a context before anything attends to them.

    Attributes
    ----------
    name, parameters : what a certificate is bound to.
    approximate : from the exact KV of a whole context, of all layers or of one, to what attention sees, of the same
        shapes.
    is_layerwise : it can be applied to one layer whose inputs it has changed already.
    attend : how tokens behind a context attend to it; None for densely.
    """

    name: str
    parameters: Mapping[str, Any]
    approximate: Approximate
    is_layerwise: bool = True
    attend: Attend | None = None


def as_it_is(chunk: KVChunk) -> KVChunk:
    """Changes no keys and values."""
    return chunk


def through_codec(codec: Codec, *, chunk_tokens: int = CHUNK_TOKENS) -> Approximation:
    """Encoded and decoded, chunk by chunk of so many tokens, as a store holds a context."""

    def approximate(chunk: KVChunk) -> KVChunk:
        pieces = [codec.decode(codec.encode(piece)) for piece in split(chunk, chunk_tokens)]
        keys = torch.cat([piece.keys for piece in pieces], dim=2).to(chunk.keys.device)
        values = torch.cat([piece.values for piece in pieces], dim=2).to(chunk.keys.device)
        return KVChunk(chunk.spec, chunk.token_ids, chunk.positions, keys, values, chunk.first_layer)

    is_layerwise = not getattr(codec, "codes_whole_chunks", False)
    return Approximation(codec.name, parameters_of(codec), approximate, is_layerwise)


def split(chunk: KVChunk, tokens: int) -> list[KVChunk]:
    """The chunk as chunks of `tokens` tokens, the last one shorter, without a copy."""
    return [
        KVChunk(
            chunk.spec,
            chunk.token_ids[start : start + tokens],
            chunk.positions[start : start + tokens],
            chunk.keys[:, :, start : start + tokens],
            chunk.values[:, :, start : start + tokens],
            chunk.first_layer,
        )
        for start in range(0, len(chunk), tokens)
    ]


class ForcedModel:
    """A transformers model under teacher forcing: exact, with approximate keys and values, or behind a given prefix.

    Every pass goes through the same operations, so that two differ by what was done to keys and values alone.

    Parameters
    ----------
    keeps_queries : contexts carry their queries, `[L, Hq, Q, D]`, and their positions `[Q]`, as extras.
    """

    def __init__(self, model: PreTrainedModel, *, model_id: str | None = None, keeps_queries: bool = False) -> None:
        self._keeps_queries = keeps_queries
        self.layers = TransformersModel(model, model_id=model_id)
        self.spec = self.layers.spec
        self._model = model

    def prefill(self, ids: Tensor) -> tuple[KVChunk, Tensor]:
        """Exact KV of a context `[T]`, and the output `[T, E]` of its last layer."""
        return self.run(ids)

    def forced(self, ids: Tensor, approximation: Approximation) -> Tensor:
        """The output `[T, E]` of the last layer if every key and value is replaced before it is attended to.

        Layer by layer: what one layer loses changes the keys and values that the next one computes. This is how KVQuant
        measures perplexity (arXiv 2401.18079, section 4); it is harsher than any use, where the keys and values that a
        token computes for itself are exact.

        Raises
        ------
        ValueError : `approximation` cannot be applied layer by layer.
        """
        if not approximation.is_layerwise:
            raise ValueError(f"{approximation.name} cannot be applied layer by layer; measure it behind a prefix")
        return self.run(ids, approximation=approximation)[1]

    def continued(self, prefix: KVChunk, ids: Tensor, attend: Attend | None = None) -> Tensor:
        """The output `[T, E]` of the last layer for tokens behind `prefix`, which they see exactly, or by `attend`."""
        return self.run(ids, prefix, attend=attend)[1]

    @torch.no_grad()
    def run(
        self,
        ids: Tensor,
        prefix: KVChunk | None = None,
        *,
        approximation: Approximation | None = None,
        attend: Attend | None = None,
    ) -> tuple[KVChunk, Tensor]:
        """KV of tokens `[T]` behind `prefix`, and the output `[T, E]` of the last layer; see the methods above."""
        spec, layers, device = self.spec, self.layers, self._model.device
        start = 0 if prefix is None else len(prefix)
        positions = torch.arange(start, start + len(ids))
        placed, hidden = positions.to(device), layers.embed(ids.to(device))
        all_keys, all_values, asked = [], [], []
        for layer in range(spec.num_layers):
            queries, keys, values = layers.qkv(layer, hidden, placed)
            if approximation is not None:
                changed = approximation.approximate(KVChunk(spec, ids, positions, keys[None], values[None], layer))
                keys, values = changed.keys[0], changed.values[0]
            all_keys.append(keys)
            all_values.append(values)
            if prefix is not None:
                keys = torch.cat((prefix.keys[layer].to(device), keys), dim=1)
                values = torch.cat((prefix.values[layer].to(device), values), dim=1)
            if self._keeps_queries:
                asked.append(queries)
            attended = None
            if attend is not None and prefix is not None:
                attended = attend(layer, prefix, queries, keys, values, start)
            if attended is None:
                attended = layer_attention(layers.attention[layer], queries, keys, values, placed)
            hidden = layers.finish(layer, hidden, attended)
        extras = {QUERIES: torch.stack(asked), QUERY_POSITIONS: positions} if asked else {}
        return KVChunk(spec, ids, positions, torch.stack(all_keys), torch.stack(all_values), extras=extras), hidden

    @torch.no_grad()
    def side_by_side(self, parts: Sequence[tuple[Tensor, int]], attend: AttendPart) -> list[Tensor]:
        """The outputs `[T, E]` of the last layer for several rows of tokens that do not see one another, in one pass.

        Few tokens cost about as much as a hundred: a pass reads every weight of the model.

        Parameters
        ----------
        parts : ids `[T]` and the position of the first, of each row.
        attend : all attention there is.
        """
        layers, device, sizes = self.layers, self._model.device, [len(ids) for ids, _ in parts]
        placed = torch.cat([torch.arange(first, first + len(ids)) for ids, first in parts]).to(device)
        hidden = layers.embed(torch.cat([ids for ids, _ in parts]).to(device))
        for layer in range(self.spec.num_layers):
            rows = zip(*(each.split(sizes, dim=1) for each in layers.qkv(layer, hidden, placed)), strict=True)
            outputs = [attend(layer, part, *row) for part, row in enumerate(rows)]
            hidden = layers.finish(layer, hidden, torch.cat(outputs, dim=1))
        return list(hidden.split(sizes))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, E]` -> `[T, V]` float32."""
        return self.layers.logits(hidden).float()

    @torch.no_grad()
    def compare(self, exact: Tensor, other: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the targets `[T]` by two outputs `[T, E]` of the last layer, and KL of the second to the first.

        Each `[T]` float64, cpu, in nats a token: exact losses, other losses, KL.
        """
        found: list[list[Tensor]] = [[], [], []]
        targets = targets.to(exact.device)
        for start in range(0, len(targets), _HEAD_TOKENS):
            here = slice(start, start + _HEAD_TOKENS)
            p, q = (self.logits(hidden[here]).double().log_softmax(-1) for hidden in (exact, other))
            found[0].append(F.nll_loss(p, targets[here], reduction="none").cpu())
            found[1].append(F.nll_loss(q, targets[here], reduction="none").cpu())
            found[2].append((p.exp() * (p - q)).sum(-1).clamp(min=0).cpu())
        exact_loss, other_loss, kl = (torch.cat(parts) for parts in found)
        return exact_loss, other_loss, kl

    @torch.no_grad()
    def hits(self, outputs: Tensor, answer: Tensor) -> Tensor:
        """Which tokens of `answer` `[A]` greedy decoding gives behind those before them: bool, cpu.

        From the outputs `[A, E]` at the tokens before each.
        """
        found: Tensor = self.logits(outputs).argmax(-1).cpu() == answer
        return found
