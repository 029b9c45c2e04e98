"""The chunks of one sequence that have left its window: stored, indexed, and attended to where the store holds them."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....core import ChunkKey, KVChunk
from ....errors import TierError
from ....retrieval.attention import PartialAttention, attend_selected
from ....retrieval.context_index import ContextIndex
from ....retrieval.coverage import covering
from ....retrieval.paged_kv import PagedKV
from ....retrieval.selector import choose
from ....retrieval.settings import CHUNK_TOKENS
from .plan import RetrievalPlan


@dataclass(slots=True)
class SequenceCounts:
    """What was done for one sequence, in tokens, chunks and steps.

    Attributes
    ----------
    reused_tokens, computed_tokens : of prompts; tokens whose decoding is repeated count as computed.
    computed_hits : tokens of `computed_tokens` that are stored, and took less time to compute than to load.
    decision : why what is stored of a prompt was loaded, or not, in the end: a word of `Reason`; empty if nothing was
        to be decided.
    lost_chunks : missing in the store although the sequence was saved; their tokens were computed again.
    unstored_chunks : refused by the store; the session keeps them in its own memory.
    rebuilt_chunks : stored chunks whose part of the index was missing or another index's.
    has_index_state : the index of the whole sequence was read from the store, and not built again.
    sparse_steps, dense_steps : tokens decoded with and without retrieval.
    chosen_tokens, read_bytes : by selectors, over all layers and KV heads.
    """

    reused_tokens: int = 0
    computed_tokens: int = 0
    computed_hits: int = 0
    decision: str = ""
    lost_chunks: int = 0
    unstored_chunks: int = 0
    rebuilt_chunks: int = 0
    has_index_state: bool = False
    sparse_steps: int = 0
    dense_steps: int = 0
    chosen_tokens: int = 0
    read_bytes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Stored:
    """A chunk as the store gave it back, or as it was if the store refused it."""

    chunk: KVChunk
    was_taken: bool
    was_rebuilt: bool


class IndexedChunks:
    """Chunks of one sequence, in the store and pinned there until `close`, with the index over them.

    A worker stores and indexes them in order, beside the sequence. `collect` takes over what it has done, at points
    that do not depend on its speed; so neither do answers.

    Parameters
    ----------
    worker : runs one task at a time.
    counts : of the sequence.
    """

    def __init__(self, plan: RetrievalPlan, worker: Executor, counts: SequenceCounts) -> None:
        self.index = ContextIndex(plan.retrieval, plan.retrieving_shapes)
        self._plan, self._worker, self._counts = plan, worker, counts
        self._chunks: list[KVChunk] = []
        self._pages = [PagedKV(CHUNK_TOKENS) for _ in range(plan.spec.num_layers)]
        self._storing: deque[Future[_Stored]] = deque()  # of the last chunks, in order
        self._observing: deque[Future[None]] = deque()
        self._step_queries: list[list[Tensor]] = [[] for _ in range(plan.spec.num_layers)]
        self._pins = ExitStack()

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, place: int) -> KVChunk:
        return self._chunks[place]

    # ------------------------------------------------------------------------------------------------- storing

    def append(self, chunk: KVChunk, key: ChunkKey, *, after: ChunkKey | None, is_stored: bool) -> None:
        """Store and index the next chunk in the background."""
        self._chunks.append(chunk)
        self._storing.append(self._worker.submit(self._store, chunk, key, after, is_stored))

    def collect(self, *, keep: int = 0) -> None:
        """Wait for the worker and take over its results, for all chunks but the last `keep`."""
        while len(self._storing) > keep:
            stored = self._storing.popleft().result()
            self._chunks[len(self._chunks) - len(self._storing) - 1] = stored.chunk
            self._counts.unstored_chunks += not stored.was_taken
            self._counts.rebuilt_chunks += stored.was_rebuilt
            for layer, pages in enumerate(self._pages):
                pages.append(stored.chunk.keys[layer], stored.chunk.values[layer])
        while self._observing and (not keep or self._observing[0].done()):
            self._observing.popleft().result()

    def flush(self) -> None:
        """Wait until every chunk is stored and indexed, and the index is built."""
        self.collect()
        if self.index.learns:
            self._worker.submit(self.index.build).result()

    def restore_index(self, extras: dict[str, Tensor]) -> bool:
        """Take the state of the index from what `index.state` gave, see `ContextIndex.restore_state`."""
        self.collect()
        return self._worker.submit(self.index.restore_state, extras).result()

    def close(self) -> None:
        """Give up what is not stored yet, and let the worker unpin the rest. May be called again."""
        tasks: list[Future[Any]] = [*self._storing, *self._observing]
        for task in tasks:
            task.cancel()
        # In the worker, which no Ctrl-C interrupts: pins are released whole.
        self._worker.submit(self._pins.close)

    def _store(self, chunk: KVChunk, key: ChunkKey, after: ChunkKey | None, is_stored: bool) -> _Stored:
        first = int(chunk.positions[0])
        was_rebuilt = not self.index.add(chunk) and is_stored and self.index.travels
        extras, layered = self.index.extras_of(first, first + len(chunk))
        store = self._plan.store
        if not is_stored or not extras.keys() <= chunk.extras.keys() or (was_rebuilt and extras):
            chunk = replace(
                chunk,
                extras={**chunk.extras, **extras},
                layered_extras=(chunk.layered_extras - extras.keys()) | layered,
            )
            is_stored = False
        self._pins.enter_context(store.pinned([key]))
        if is_stored:
            return _Stored(chunk, True, was_rebuilt)
        with suppress(TierError):  # the chunk stays in our memory, and the store has counted the fault
            store.put(key, chunk, after=after)
            found = store.get(key)
            if found is not None:
                return _Stored(on_cpu(found), True, was_rebuilt)
        return _Stored(chunk, False, was_rebuilt)

    # ----------------------------------------------------------------------------------------------- attention

    def keys_and_values(self, layer: int, first_chunk: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of a layer from a chunk on, one tensor a chunk, on the model's device."""
        chunks, device = self._chunks[first_chunk:], self._plan.device
        return [c.keys[layer].to(device) for c in chunks], [c.values[layer].to(device) for c in chunks]

    def attend(self, layer: int, queries: Tensor, near: PartialAttention, position: int) -> PartialAttention:
        """Attention of one token over `near` and the tokens that the layer's selector chooses.

        Parameters
        ----------
        queries : `[Hq, D]`, of the token at `position`.
        near : their attention over sinks and window.
        """
        self.collect()
        selector = self.index.layers[layer]
        budget = 0 if selector is None else self._plan.retrieval.budget(len(selector))
        if selector is None or not budget:
            return near
        asked, scale = queries.cpu(), self._plan.shapes[layer].scale
        if self.index.learns:
            self._step_queries[layer].append(asked)
        of_near = near[1].cpu()
        selection = choose(selector, asked, position, budget, of_near)
        coverage = self._plan.retrieval.coverage
        if coverage is not None:
            keys = self._pages[layer].keys_at(selection.ids)
            selection = covering(selection, keys, asked, of_near, coverage=coverage, scale=scale)
        self._counts.read_bytes += selection.read_bytes
        self._counts.chosen_tokens += int((selection.ids >= 0).sum())
        return attend_selected(near, selection, partial(self._pages[layer].attend, asked, scale=scale))

    def observe(self, layer: int, queries: Tensor, first: int) -> None:
        """Give the layer's index the queries of a prompt `[Hq, T, D]`, from position `first` on, if it learns."""
        if self.index.learns and self._plan.retrieves(layer):
            sample = queries.detach().to("cpu", copy=True)
            self._observe(layer, sample, torch.arange(first, first + queries.shape[1]))

    def observe_steps(self, length: int) -> None:
        """Give the index the queries of the last decode steps, of a sequence of `length` tokens."""
        for layer, queries in enumerate(self._step_queries):
            if queries:
                self._observe(layer, torch.stack(queries, dim=1), torch.arange(length - len(queries), length))
                queries.clear()

    def _observe(self, layer: int, queries: Tensor, positions: Tensor) -> None:
        self._observing.append(self._worker.submit(self.index.observe, layer, queries, positions))


def on_cpu(chunk: KVChunk) -> KVChunk:
    """The chunk in memory of the processor, where pages are read: a tier on a device gives its own memory."""
    if chunk.keys.device.type == "cpu":
        return chunk
    extras = {name: tensor.cpu() for name, tensor in chunk.extras.items()}
    return replace(chunk, keys=chunk.keys.cpu(), values=chunk.values.cpu(), extras=extras)
