"""The steps of a transformers decoder, taken from its own code: the layers' forward runs, its attention is ours.

A pass runs on twins: copies of module objects that share all weights, hooks and submodules with the model, but have a
configuration that names our attention function. Nothing of the model is changed, so that other threads may use it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.modeling_outputs import BaseModelOutputWithPast
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.stock_layers needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ...errors import EngineError

IMPLEMENTATION = "kvloom_layers"
"""The name of the attention function under which layers are asked; transformers makes no mask for it."""

_LOG = logging.getLogger("kvloom.identity")

_CONFIG = "config"
_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
Settings: TypeAlias = dict[tuple[str, str], bool | int | float | str]
"""Values of plain attributes, by the module's path and the attribute's name."""

_Attend: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]


class _StopError(Exception):
    """What was asked for is known; the rest of the forward pass need not run."""


class _Config:
    """A model's configuration with another attention implementation, and what that does."""

    def __init__(self, config: Any, implementation: str, attend: _Attend | None = None) -> None:
        self._kvloom_config, self._attn_implementation, self.kvloom_attend = config, implementation, attend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kvloom_config, name)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    config: Any = module.config
    return config.kvloom_attend(module, query, key, value, options), None


@dataclass(slots=True)
class Asked:
    """What a layer calls its attention with: queries `[Hq, T, D]`, keys `[H, T, D]` and values `[H, T, Dv]`, keys and
    queries after rotation, and the attention function's other arguments.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    options: Mapping[str, Any] = field(default_factory=dict)


class StockLayers:
    """The steps of a model's decoder.

    Attributes
    ----------
    decoder, config : what has the layers, and what it is configured by.
    layers : the decoder layers that run.
    projects_alone : the attention ends with `o_proj` of what its function gives, and nothing else. `finish` then calls
        that module; otherwise the whole attention runs a second time, with the result put in.

    Raises
    ------
    EngineError : the model has no decoder with layers, or a layer has no attention with a cache.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self.decoder: Any = model.get_decoder()
        self.config: Any = getattr(self.decoder, _CONFIG, None)
        layers = getattr(self.decoder, "layers", None)
        if layers is None or self.config is None or not len(layers) or self.decoder is model:
            raise EngineError(
                f"{type(model).__name__} ({model.config.model_type}) has no decoder with a list of layers; kvloom runs "
                "only such models"
            )
        self.layers: Sequence[nn.Module] = list(layers[: self.config.num_hidden_layers])
        for index in range(len(self.layers)):
            self.attention_of(index)
        self.projects_alone = all(hasattr(self.attention_of(i)[1], "o_proj") for i in range(len(self.layers)))
        self._last: tuple[Tensor, list[_Call]] | None = None
        AttentionInterface.register(IMPLEMENTATION, _attention)

    def attention_of(self, layer: int) -> tuple[str, Any]:
        """The attention module of a layer: the one child that knows its place in a cache."""
        children = self.layers[layer].named_children()
        found = [(name, child) for name, child in children if hasattr(child, "layer_idx") and hasattr(child, _CONFIG)]
        if len(found) != 1:
            raise EngineError(
                f"layer {layer} ({type(self.layers[layer]).__name__}) has {len(found)} attention modules; kvloom runs "
                "layers with one (no linear attention, no state spaces)"
            )
        return found[0]

    def settings(self) -> Settings:
        """What modules keep in plain attributes and nobody stores: all that attention knows, such as factors and
        windows, and the numbers of others, such as a norm's epsilon. They shape KV and may be changed in memory.
        """
        of_attention = {id(self.attention_of(layer)[1]) for layer in range(len(self.layers))}
        return {
            (path, name): value
            for path, module in self.decoder.named_modules()
            if "inv_freq" not in module._buffers  # noqa: SLF001  the spec holds the table and its factor
            for name, value in vars(module).items()
            if (type(value) is float or (id(module) in of_attention and isinstance(value, bool | int | str)))
            and name != "training"
            and not name.startswith("_")
        }

    def changed_settings(self) -> Settings:
        """Those settings that a model made anew of the same config would have otherwise; none, with a warning, if no
        such model can be made.
        """
        try:
            with torch.device("meta"):
                anew = StockLayers(type(self._model)(copy.deepcopy(self._model.config)))
        except Exception as error:  # noqa: BLE001  the model's own code, which has run before with other arguments
            _LOG.warning(
                "no %s can be made anew of its config (%s): settings that were changed in memory go unnoticed",
                type(self._model).__name__,
                error,
            )
            return {}
        expected = anew.settings()
        return {place: value for place, value in self.settings().items() if expected.get(place, value) != value}

    def forget(self) -> None:
        """Drop what was derived from the model's tensors; called whenever they may have changed."""
        self._last = None

    # ------------------------------------------------------------------------------------------- around layers

    def embed(self, token_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """`[T]` -> `[T, E]`: the input of the first layer."""
        if not len(token_ids):
            return self.embed(token_ids.new_zeros(1))[:0]
        if positions is None:
            positions = torch.arange(len(token_ids), device=token_ids.device)
        found: list[Tensor] = []

        def first(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(hidden)
            raise _StopError

        self._decode([first], IMPLEMENTATION, input_ids=token_ids[None], position_ids=positions[None])
        return found[0][0]

    def calls(self, hidden: Tensor, positions: Tensor, **options: Any) -> list[_Call]:
        """What the decoder gives each of its layers beside hidden states: tables of positions, for instance.

        Parameters
        ----------
        hidden : `[T, E]`; only its shape, dtype and device count.
        positions : `[T]`.
        options : for the decoder, and `implementation`.
        """
        implementation = options.pop("implementation", IMPLEMENTATION)
        found: list[_Call] = []
        count = len(self.layers)

        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            found.append((args, kwargs))
            if len(found) == count:
                raise _StopError
            return hidden_states

        self._decode(
            [record] * count, implementation, inputs_embeds=hidden[None], position_ids=positions[None], **options
        )
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """`[T, E]` behind the last layer -> `[T, V]`."""
        config = _Config(self.config, IMPLEMENTATION)

        def output(*_: Any, **__: Any) -> BaseModelOutputWithPast:
            normed = decoder(inputs_embeds=hidden[None], use_cache=False)
            return BaseModelOutputWithPast(last_hidden_state=normed.last_hidden_state)

        decoder = _twin(self.decoder, config, {"layers": [lambda *_, **__: hidden[None]] * len(self.layers)})
        name = next(name for name, child in self._model.named_modules() if child is self.decoder)
        if "." in name:
            raise EngineError(f"{type(self._model).__name__} has its decoder in {name}; kvloom reads logits of a child")
        model = _twin(self._model, self._model.config, {name: output})
        found: Tensor = model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return found

    # --------------------------------------------------------------------------------------------- in a layer

    def ask(self, layer: int, hidden: Tensor, positions: Tensor) -> Asked:
        """Run a layer `[T, E]`, `[T]` up to its attention.

        Raises
        ------
        EngineError : the layer does not call an attention function.
        """
        found: list[Asked] = []

        def attend(_: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any]) -> Tensor:
            found.append(Asked(query[0], key[0], value[0], options))
            raise _StopError

        args, kwargs = self._call(layer, hidden, positions)
        with suppress(_StopError):
            self._layer(layer, attend)(hidden[None], *args, **kwargs)
        if not found:
            kind = type(self.attention_of(layer)[1]).__name__
            raise EngineError(f"{kind} of layer {layer} does not let its attention function be chosen")
        return found[0]

    def finish(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """Run a layer `[T, E]` with the result `[Hq, T, Dv]` of its attention: `[T, E]`."""
        by_token = attended.transpose(0, 1)[None]
        args, kwargs = self._call(layer, hidden, None)
        if self.projects_alone:
            name, attention = self.attention_of(layer)
            projected = attention.o_proj(by_token.flatten(2))
            run = _twin(self.layers[layer], self.config, {name: lambda *_, **__: (projected, None)})
        else:
            run = self._layer(layer, lambda *_: by_token.contiguous())
        output = run(hidden[None], *args, **kwargs)
        found: Tensor = (output[0] if isinstance(output, tuple) else output)[0]
        return found

    def record(self, token_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Input and output `[T, E]` of each layer in a stock forward pass over tokens `[T]`."""
        found: list[tuple[Tensor, Tensor]] = []

        def recorded(layer: nn.Module) -> Callable[..., Any]:
            def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                output = layer(hidden_states, *args, **kwargs)
                found.append((hidden_states[0], (output[0] if isinstance(output, tuple) else output)[0]))
                return output

            return run

        twin = _twin(self.decoder, self.config, {"layers": [recorded(layer) for layer in self.layers]})
        positions = torch.arange(len(token_ids), device=token_ids.device)[None]
        twin(input_ids=token_ids[None], position_ids=positions, use_cache=False)
        return found

    # ------------------------------------------------------------------------------------------------- twins

    def _call(self, layer: int, hidden: Tensor, positions: Tensor | None) -> _Call:
        """The layer's arguments. All layers of a pass have one tensor of positions: they are made once for it."""
        last = self._last
        if positions is None:  # a step whose queries and keys are known: tables of any positions do, of this length
            if self.projects_alone and last is not None:
                return last[1][layer]
            return self.calls(hidden, torch.arange(len(hidden), device=hidden.device))[layer]
        if last is None or last[0] is not positions:
            self._last = last = positions, self.calls(hidden, positions)
        return last[1][layer]

    def _layer(self, layer: int, attend: _Attend) -> Any:
        name, attention = self.attention_of(layer)
        config = _Config(self.config, IMPLEMENTATION, attend)
        return _twin(self.layers[layer], config, {name: _twin(attention, config, {})})

    def _decode(self, layers: Sequence[Callable[..., Any]], implementation: str, **inputs: Any) -> None:
        twin = _twin(self.decoder, _Config(self.config, implementation), {"layers": layers})
        with suppress(_StopError):
            twin(use_cache=False, **inputs)


def _twin(module: Any, config: Any, children: Mapping[str, Any]) -> Any:
    """A copy of a module object that shares everything with it but its configuration and the children given."""
    twin = copy.copy(module)
    own = twin.__dict__
    own["_modules"] = {**module._modules, **children}  # noqa: SLF001  torch has no other name for it
    own["_compiled_call_impl"] = None  # of `module.compile()`: it would run the module itself
    if _CONFIG in own:
        own[_CONFIG] = config
    if own.pop("forward", None) is not None and (hook := own.get("_hf_hook")) is not None:
        own["forward"] = _hooked(module, twin, hook)
    return twin


def _hooked(module: Any, twin: Any, hook: Any) -> Callable[..., Any]:
    """The forward of a twin of a module whose weights accelerate fetches for every call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        try:
            output = type(twin).forward(twin, *args, **kwargs)
        except _StopError:
            hook.post_forward(module, None)
            raise
        return hook.post_forward(module, output)

    return forward
