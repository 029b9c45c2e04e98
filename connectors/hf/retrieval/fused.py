"""Indexes of documents: made once, alone, stored with their chunks, and put together as the documents are fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ....blend.blender import BlendedContext
from ....core import KVChunk, KVSpec
from ....retrieval.context_index import ContextIndex
from ....retrieval.selector import LayerShape
from ....retrieval.settings import CHUNK_TOKENS, Retrieval


@dataclass(frozen=True, slots=True)
class FusedIndex:
    """How much of a fused context's index came with its documents, in tokens times layers."""

    taken: int
    computed: int


def with_index(chunk: KVChunk, retrieval: Retrieval, shapes: Sequence[LayerShape | None]) -> KVChunk:
    """A document's chunk with its part of an index; itself if it has one, or if the method's index does not travel."""
    first = int(chunk.positions[0])
    index = ContextIndex(retrieval, shapes, start=first)
    if not index.travels or index.parts_of(chunk) is not None:
        return chunk
    index.take(chunk)
    extras, layered = index.extras_of(first, first + len(chunk))
    return replace(chunk, extras={**chunk.extras, **extras}, layered_extras=chunk.layered_extras | layered)


def fused_chunks(
    spec: KVSpec,
    token_ids: Tensor,
    blended: BlendedContext,
    starts: Sequence[int],
    stored: Sequence[KVChunk | None],
    retrieval: Retrieval,
    shapes: Sequence[LayerShape | None],
) -> tuple[list[KVChunk], FusedIndex]:
    """A fused context in chunks of `CHUNK_TOKENS`, with their parts of the index.

    What a document's own index says of its tokens is moved with them; where keys were recomputed, it is made anew. A
    method whose index cannot be moved to where a document stands (landmarks need a multiple of 8) indexes it again.

    Parameters
    ----------
    starts : first token of every document; before the first one stand the lead tokens.
    stored : the documents' chunks, with extras, where the store has them.
    """
    total = len(token_ids)
    changed = torch.zeros(spec.num_layers, total, dtype=torch.bool)
    for layer, fresh in enumerate(blended.fresh):
        changed[layer, fresh.cpu()] = True
    index, taken = ContextIndex(retrieval, shapes, start=0), 0
    bounds = [*([0] if starts and starts[0] else []), *starts, total]
    documents = [*([None] if starts and starts[0] else []), *stored]
    if index.travels:
        for document, (first, stop) in zip(documents, pairwise(bounds), strict=True):
            piece = _piece(spec, token_ids, blended, first, stop)
            parts = None if document is None or len(document) != len(piece) else index.parts_of(document)
            offset = 0 if document is None else first - int(document.positions[0])
            taken += len(piece) * index.place(parts, piece, offset, changed[:, first:stop])
    chunks = []
    for first in range(0, total, CHUNK_TOKENS):
        stop = min(first + CHUNK_TOKENS, total)
        chunk = _piece(spec, token_ids, blended, first, stop)
        if index.travels and len(chunk) == CHUNK_TOKENS:
            extras, layered = index.extras_of(max(first, retrieval.sink_tokens), stop)
            chunk = replace(chunk, extras=extras, layered_extras=layered)
        chunks.append(chunk)
    layers = sum(shape is not None for shape in shapes) if index.travels else 0
    return chunks, FusedIndex(taken, layers * total - taken)


def _piece(spec: KVSpec, token_ids: Tensor, blended: BlendedContext, first: int, stop: int) -> KVChunk:
    keys, values = (t[:, :, first:stop].cpu().contiguous() for t in (blended.keys, blended.values))
    return KVChunk(spec, token_ids[first:stop], torch.arange(first, stop), keys, values)
