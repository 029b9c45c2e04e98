"""How a vLLM model rotates its keys, found in its modules and checked against its own tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ....core import RopeSpec
from ....errors import EngineError
from ...identity.rotary import spec_of_rotary


def rope_of(model: Any, layers: Sequence[Any], head_dim: int) -> RopeSpec:
    """The one rotation of all layers.

    Parameters
    ----------
    model : the engine's `nn.Module`.
    layers : its attention modules.

    Raises
    ------
    EngineError : a layer has no rotary module beside it, layers differ, or the rotation is of an unknown kind: its
        table is not that of its frequencies, or covers a part of the head that cannot be told apart.
    """
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}
    specs = set()
    for layer in layers:
        path = names.get(id(layer))
        if path is None:
            raise EngineError(f"layer {layer.layer_name} is not a module of the model")
        rotary = getattr(modules[path.rpartition(".")[0]], "rotary_emb", None)
        if rotary is None:
            raise EngineError(f"layer {layer.layer_name} has no rotary module beside it")
        specs.add(spec_of_rotary(rotary, head_dim))
    if len(specs) != 1:
        raise EngineError(f"layers rotate their keys in {len(specs)} different ways")
    return specs.pop()
