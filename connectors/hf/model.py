"""The layers of a Hugging Face model, one step at a time: what fusion needs, from the model's own code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...core import KVSpec, LayerAttention
from ..identity.weights import windows_of, with_state
from .identity import ModelIdentity, unwrapped
from .stock_layers import StockLayers
from .structure import Structure, context_tokens, input_device, is_length_bound, measured


class TransformersModel:
    """`LayerwiseModel` over a Hugging Face decoder, by the model's own layers.

    Any decoder serves whose layers hold one attention each, with standard keys and values, and rotate keys by one of
    the model's tables, wholly or in part, or not at all. What a layer does is measured and verified, see `structure`.

    Parameters
    ----------
    model : a causal language model in evaluation mode; PEFT's and torch.compile's wrappers around one are taken off.
    model_id : names the weights as they are now; None reads them, see `ModelIdentity`.

    Attributes
    ----------
    model : the model without wrappers.
    spec : of the KV that it would have computed when `refresh` was called last.
    device : where its inputs belong.
    query_heads : Hq.
    max_tokens : of a context, see `context_tokens`.
    is_length_bound : tokens beyond that would have another rope table.

    Raises
    ------
    EngineError : see `unwrapped`, `measured` and `ModelIdentity`.
    """

    spec: KVSpec
    device: torch.device
    attention: Sequence[LayerAttention]

    def __init__(self, model: nn.Module, *, model_id: str | None = None) -> None:
        self.model = unwrapped(model)
        self._layers = StockLayers(self.model)
        self._identity = ModelIdentity(self.model, model_id)
        self._structures: dict[object, Structure] = {}  # by config and settings
        self._changed: Sequence[object] = ()  # settings that are not those of the config
        self.refresh()

    def refresh(self) -> bool:
        """Look whether the model still computes KV as `spec` says, and make it say so.

        Returns
        -------
        bool : whether the spec had to be changed.

        Raises
        ------
        EngineError : see `ModelIdentity.name`; the model was changed into one that is not supported.
        """
        before = getattr(self, "spec", None)
        self._layers.forget()
        name, config = self._identity.name(), self._identity.config_text
        measured_with = config, tuple(self._layers.settings().items())
        if measured_with not in self._structures:
            self._structures = {measured_with: measured(self._layers)}
            self._changed = sorted(self._layers.changed_settings().items())
        found = self._structures[measured_with]
        self.device = input_device(self._layers.decoder.get_input_embeddings())
        self.attention = found.attention(self._layers)
        self.query_heads = found.query_heads
        self.max_tokens = context_tokens(self._layers.config)
        self.is_length_bound = is_length_bound(self._layers.config)
        self.spec = KVSpec(
            model_id=with_state(name, windows=windows_of(self.window_tokens), settings=self._changed),
            num_layers=len(self.attention),
            num_kv_heads=found.kv_heads,
            head_dim=found.head_dim,
            dtype=self.model.dtype,
            rope=found.rope(self._layers),
            v_head_dim=None if found.value_dim == found.head_dim else found.value_dim,
        )
        return before is not None and before != self.spec

    @property
    def window_tokens(self) -> tuple[int | None, ...]:
        """Per layer, how many tokens back attention reaches, itself included; None for all."""
        return tuple(layer.window_tokens for layer in self.attention)

    def embed(self, token_ids: Tensor) -> Tensor:
        return self._layers.embed(token_ids)

    def qkv(self, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        asked = self._layers.ask(layer, hidden, positions)
        return asked.queries, asked.keys, asked.values

    def finish(self, layer: int, hidden: Tensor, attn_out: Tensor) -> Tensor:
        return self._layers.finish(layer, hidden, attn_out)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, E]` behind the last layer -> `[T, V]`."""
        return self._layers.logits(hidden)
