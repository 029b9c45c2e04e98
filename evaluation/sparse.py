"""Attention behind a prefix through retrieval, as a session decodes, measured like a codec."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..connectors.hf.model import TransformersModel
from ..connectors.hf.retrieval.plan import layer_shape
from ..core import KVChunk
from ..errors import EngineError
from ..retrieval.attention import attend, attend_at, attend_selected, with_sinks
from ..retrieval.coverage import covering
from ..retrieval.selector import LearnsFromQueries, choose
from ..retrieval.settings import CHUNK_TOKENS, Retrieval
from .forcing import QUERIES, QUERY_POSITIONS, Approximation, as_it_is


def through_retrieval(retrieval: Retrieval, layers: TransformersModel) -> Approximation:
    """Every token behind the prefix attends to sinks, window and what is chosen for it.

    Harsher than a session, where a prompt is computed densely and only the answer's tokens retrieve: here the question,
    or the text that is continued, retrieves, too.
    """
    if any(here.softcap is not None for here in layers.attention):
        raise EngineError("the model caps its attention logits (softcap), and retrieval scores tokens without a cap")
    shapes = [layer_shape(layers, layer) for layer in range(layers.spec.num_layers)]

    def attend_behind(
        layer: int, prefix: KVChunk, queries: Tensor, keys: Tensor, values: Tensor, first: int
    ) -> Tensor | None:
        if layer < retrieval.dense_layers or layers.window_tokens[layer] is not None:
            return None
        start, window, shape = retrieval.sink_tokens, retrieval.window_tokens, shapes[layer]
        selector = retrieval.selector(shape, layer)
        is_built = False
        out = queries.new_empty(*queries.shape[:2], values.shape[-1])
        for place in range(queries.shape[1]):
            position = first + place
            stop = max(0, (position - window) // CHUNK_TOKENS * CHUNK_TOKENS)
            begin = start + len(selector)
            if stop > begin:
                selector.add(keys[:, begin:stop], values[:, begin:stop])
                if isinstance(selector, LearnsFromQueries) and not is_built:
                    asked, positions = prefix.extras[QUERIES][layer], prefix.extras[QUERY_POSITIONS]
                    selector.observe(asked[:, positions < first], positions[positions < first])
                    selector.build()
                    is_built = True
            query = queries[:, place]
            part = attend(query, *_near(keys, values, start, stop, position), scale=shape.scale)
            part = with_sinks(part, layers.attention[layer].sinks)
            selection = choose(selector, query, position, retrieval.budget(len(selector)), part[1])
            if retrieval.coverage is not None and selection.ids.shape[1]:
                rows = selection.ids.clamp(min=0)[..., None].expand(-1, -1, keys.shape[-1])
                chosen = keys.gather(1, rows)
                limits = {"coverage": retrieval.coverage, "scale": shape.scale}
                selection = covering(selection, chosen, query, part[1], **limits)
            attend_ids = partial(attend_at, query, keys, values, scale=shape.scale)
            part = attend_selected(part, selection, attend_ids)
            out[:, place] = part[0].to(out.dtype)
        return out

    name, parameters = retrieval.form[0], retrieval.fields
    return Approximation(name, parameters, as_it_is, is_layerwise=False, attend=attend_behind)


def _near(keys: Tensor, values: Tensor, start: int, stop: int, position: int) -> tuple[Tensor, Tensor]:
    """Sinks and window of the token at `position`, itself included."""
    if not stop:
        return keys[:, : position + 1], values[:, : position + 1]
    behind = slice(stop, position + 1)
    return (
        torch.cat((keys[:, :start], keys[:, behind]), dim=1),
        torch.cat((values[:, :start], values[:, behind]), dim=1),
    )
