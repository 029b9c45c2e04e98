"""One sequence that is being decoded: sinks and window beside the model, everything between in the store."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ....blend.attention import causal_attention
from ....core import ChunkKey, KVChunk
from ....errors import TierError
from ....kvstore.keys import content_key, derived_key, prefix_keys
from ....retrieval.attention import attend, attend_selected
from ....retrieval.context_index import ContextIndex
from ....retrieval.pages import Pages
from ....retrieval.selector import Selection
from ....retrieval.settings import CHUNK_TOKENS
from .near import NearTokens
from .plan import Counts, Plan, Segment

_SWITCHES = "session.switches"


@dataclass(frozen=True, slots=True, eq=False)
class _Settled:
    """A chunk as the store gave it back, or as it was if the store did not take it."""

    chunk: KVChunk
    was_taken: bool
    was_rebuilt: bool


class Context:
    """Keys and values of one sequence, and attention over them.

        tokens                     are                          owned by
        [0, sink_tokens)           near, and in the first chunk the session, the store
        [0, stop)                  chunks in the store          the store, pinned and referred to until `close`
        [stop, length)             near: the window             the session

    `stop` follows `length` in steps of `CHUNK_TOKENS`, at least `window_tokens` behind. While the sequence is shorter
    than the break-even, nothing leaves, `stop` is 0 and attention is dense. What leaves is put into the store and
    indexed by `worker`, in order; results are taken over where it does not matter how fast it was.

    A token that was decoded with retrieval, or stands behind one, has approximate keys and values. Its chunk's key says
    so: it derives from the prefix key, the form of the retrieval and where it began and ended.
    """

    def __init__(self, plan: Plan, worker: Executor) -> None:
        self.plan = plan
        self.ids: list[int] = []
        self.length = 0
        self.stop = 0
        self.switches: list[int] = []  # where attention became sparse, dense again, and so on
        self.dense_until = 0
        self.is_done = False
        self.counts = Counts()
        spec = plan.spec
        self._near = [
            NearTokens(spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.dtype, plan.device)
            for _ in range(spec.num_layers)
        ]
        self.index = ContextIndex(plan.retrieval, plan.retrieving_shapes)
        self._chunks: list[KVChunk] = []
        self._pages = [Pages(CHUNK_TOKENS) for _ in range(spec.num_layers)]
        self._held: dict[int, tuple[KVChunk, bool]] = {}  # still within the window; whether the store has it
        self._plain_keys: list[ChunkKey] = []
        self.origin = ""  # says how keys and values came to be, where not from the tokens alone
        self._worker = worker
        self._tasks: deque[Future[_Settled]] = deque()  # of the last chunks, in order
        self._lessons: deque[Future[None]] = deque()
        self._fresh = 0  # how many of them began with the last step
        self._asked: list[list[Tensor]] = [[] for _ in range(spec.num_layers)]
        self._pins = ExitStack()

    # ----------------------------------------------------------------------------------------------- attention

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """The next tokens of one layer, `[H, T, D]` and `[H, T, Dv]`."""
        self._near[layer].append(keys, values)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Of the tokens just appended: `[Hq, T, D]` -> `[Hq, T, Dv]`."""
        if self._is_sparse(queries.shape[1]) and self.plan.retrieves(layer):
            return self._attend_to_chosen(layer, queries[:, 0])[:, None]
        return self._attend_to_all(layer, queries)

    def advance(self, count: int) -> None:
        """All layers have attended for so many tokens; what has left the window goes to the store."""
        is_sparse = self._is_sparse(count)
        self.counts.sparse_steps += is_sparse
        self.counts.dense_steps += count == 1 and self.length >= self.dense_until and not is_sparse
        if (is_sparse and not self.plan.retrieval.is_exact) != bool(len(self.switches) % 2):
            self.switches.append(self.length)
        self.length += count
        self._retire()

    def _is_sparse(self, count: int) -> bool:
        return count == 1 and self.stop > 0 and self.length >= self.dense_until

    def _attend_to_all(self, layer: int, queries: Tensor) -> Tensor:
        plan, count = self.plan, queries.shape[1]
        self._collect(keep=self._fresh)
        if self.index.learns and plan.retrieves(layer) and count > 1:
            positions = torch.arange(self.length, self.length + count)
            sample = queries.detach().to("cpu", copy=True)
            self._lessons.append(self._worker.submit(self.index.observe, layer, sample, positions))
        window = plan.window_tokens[layer]
        first = 0 if window is None else max(0, self.length - window + 1)
        first, keys, values = self._from(layer, first)
        positions = torch.arange(self.length - first, self.length - first + count, device=queries.device)
        return causal_attention(queries, keys, values, positions, scale=plan.shapes[layer].scale, window_tokens=window)

    def _from(self, layer: int, first: int) -> tuple[int, Tensor, Tensor]:
        """Keys and values of a layer from `first` on or somewhat before; with where they begin."""
        near, device = self._near[layer], self.plan.device
        if not self.stop:
            return first, near.keys[:, first:], near.values[:, first:]
        sinks = self.plan.retrieval.sink_tokens
        chunks = self._chunks[first // CHUNK_TOKENS :]
        if not chunks:
            here = sinks + first - self.stop
            return first, near.keys[:, here:], near.values[:, here:]
        keys = torch.cat([*(chunk.keys[layer].to(device) for chunk in chunks), near.keys[:, sinks:]], dim=1)
        values = torch.cat([*(chunk.values[layer].to(device) for chunk in chunks), near.values[:, sinks:]], dim=1)
        return first // CHUNK_TOKENS * CHUNK_TOKENS, keys, values

    def _attend_to_chosen(self, layer: int, queries: Tensor) -> Tensor:
        self._collect()
        selector, near, shape = self.index.layers[layer], self._near[layer], self.plan.shapes[layer]
        attended = attend(queries, near.keys, near.values, scale=shape.scale)
        covered = 0 if selector is None else len(selector)
        budget = self.plan.retrieval.budget(covered)
        if selector is not None and budget:
            asked = queries.cpu()
            if self.index.learns:
                self._asked[layer].append(asked)
            if budget >= covered:
                ids = torch.arange(selector.start, selector.start + covered).expand(shape.kv_heads, -1)
                selection = Selection(ids, 0)
            else:
                selection = selector.select(asked, self.length, budget)
            self.counts.read_bytes += selection.read_bytes
            self.counts.chosen_tokens += int((selection.ids >= 0).sum())
            attended = attend_selected(
                attended, selection, partial(self._pages[layer].attend, asked, scale=shape.scale)
            )
        return attended[0].to(queries.dtype)

    # -------------------------------------------------------------------------------------------------- chunks

    def _retire(self) -> None:
        """Chunks that are all behind the window leave it."""
        self._fresh = 0
        plan, spec = self.plan, self.plan.spec
        if max(self.length, self.dense_until) < plan.break_even_tokens:
            return
        sinks = plan.retrieval.sink_tokens
        while self.length - self.stop >= CHUNK_TOKENS + plan.retrieval.window_tokens:
            index, first = self.stop // CHUNK_TOKENS, sinks if self.stop else 0
            chunk, was_stored = self._held.pop(index, (None, False))
            if chunk is None:
                here = slice(first, first + CHUNK_TOKENS)
                chunk = KVChunk(
                    spec,
                    torch.tensor(self.ids[self.stop : self.stop + CHUNK_TOKENS]),
                    torch.arange(self.stop, self.stop + CHUNK_TOKENS),
                    torch.stack([near.keys[:, here] for near in self._near]).cpu(),
                    torch.stack([near.values[:, here] for near in self._near]).cpu(),
                )
            for near in self._near:
                near.remove(sinks, first + CHUNK_TOKENS)
            self._observe_asked()
            self._chunks.append(chunk)
            self.stop += CHUNK_TOKENS
            after = self.key_of(index - 1) if index else None
            self._tasks.append(self._worker.submit(self._settle, chunk, self.key_of(index), after, was_stored))
            self._fresh += 1

    def _settle(self, chunk: KVChunk, key: ChunkKey, after: ChunkKey | None, was_stored: bool) -> _Settled:
        """Indexes a chunk and stores it with its part of the index; runs in the worker."""
        first = int(chunk.positions[0])
        was_rebuilt = not self.index.take(chunk) and was_stored and self.index.travels
        extras, layered = self.index.extras_of(first, first + len(chunk))
        store = self.plan.store
        if not was_stored or not extras.keys() <= chunk.extras.keys() or (was_rebuilt and extras):
            chunk = replace(
                chunk,
                extras={**chunk.extras, **extras},
                layered_extras=(chunk.layered_extras - extras.keys()) | layered,
            )
            was_stored = False
        self._pins.enter_context(store.pinned([key]))
        if was_stored:
            return _Settled(chunk, True, was_rebuilt)
        with suppress(TierError):  # it stays in our memory, and the store has counted the fault
            store.put(key, chunk, after=after)
            found = store.get(key)
            if found is not None:
                return _Settled(_on_cpu(found), True, was_rebuilt)
        return _Settled(chunk, False, was_rebuilt)

    def _collect(self, keep: int = 0) -> None:
        """Takes over what the worker has done of all chunks but the last `keep`; waits for it."""
        while len(self._tasks) > keep:
            settled = self._tasks.popleft().result()
            place = len(self._chunks) - len(self._tasks) - 1
            self._chunks[place] = settled.chunk
            self.counts.unstored_chunks += not settled.was_taken
            self.counts.rebuilt_chunks += settled.was_rebuilt
            for layer, pages in enumerate(self._pages):
                pages.append(settled.chunk.keys[layer], settled.chunk.values[layer])
        while self._lessons and (not keep or self._lessons[0].done()):
            self._lessons.popleft().result()

    def _observe_asked(self) -> None:
        """Hands the queries of the last steps to the index."""
        for layer, asked in enumerate(self._asked):
            if asked:
                positions = torch.arange(self.length - len(asked), self.length)
                stacked = torch.stack(asked, dim=1)
                self._lessons.append(self._worker.submit(self.index.observe, layer, stacked, positions))
                asked.clear()

    def begin_answer(self) -> None:
        """The prompt, but for its last token, is through; from the token behind it on, attention may be sparse."""
        self.dense_until = len(self.ids)
        self.settle()

    def explain(self) -> str:
        """Whether attention is dense or retrieved by now, and why."""
        retrieval, limit = self.plan.retrieval, self.plan.break_even_tokens
        if self.length < limit:
            return f"dense: {self.length:,} tokens are below the break-even of {limit:,}"
        if not self.stop:
            return f"dense: {self.length:,} tokens fit sinks and window"
        covered = self.stop - retrieval.sink_tokens
        return (
            f"{retrieval.method}: {retrieval.budget(covered):,} of {covered:,} tokens for each KV head, beside "
            f"{retrieval.sink_tokens} sinks and the last {self.length - self.stop:,}"
        )

    def settle(self) -> None:
        """Everything that left the window is stored and indexed when this returns."""
        self._collect()
        if self.index.learns:
            self._worker.submit(self.index.build).result()

    # --------------------------------------------------------------------------------------------------- store

    def key_of(self, index: int) -> ChunkKey:
        """Under which the store has chunk `index`."""
        stop = (index + 1) * CHUNK_TOKENS
        if index >= len(self._plain_keys):  # ids only ever grow at their end
            self._plain_keys = prefix_keys(self.plan.spec, self.ids, chunk_tokens=CHUNK_TOKENS, salt=self.plan.salt)
        plain = self._plain_keys[index]
        switches = [switch for switch in self.switches if switch < stop]
        if not switches and not self.origin:
            return plain
        return derived_key(plain, f"{self.origin} {self.plan.retrieval.form if switches else ''} {switches}")

    def save(self) -> ChunkKey:
        """Stores the window, so that the sequence can be taken up elsewhere; the key of that.

        Raises
        ------
        TierError : no tier takes it.
        """
        self.settle()
        first = self.plan.retrieval.sink_tokens if self.stop else 0
        record = KVChunk(
            self.plan.spec,
            torch.tensor(self.ids[self.stop : self.length]),
            torch.arange(self.stop, self.length),
            torch.stack([near.keys[:, first:] for near in self._near]).cpu(),
            torch.stack([near.values[:, first:] for near in self._near]).cpu(),
            extras={_SWITCHES: torch.tensor(self.switches, dtype=torch.int64), **self.index.state()},
        )
        key = self._record_key(self.length)
        self.plan.store.put(key, record)
        return key

    def take_up(self) -> list[Segment]:
        """Takes what the store has of `ids`, whose last token is never computed here; what is still to be computed.

        If all that `save` left is there, nothing is. Otherwise all behind the first chunk that is missing, in the way
        in which it was computed before; a sequence that was never saved, densely.
        """
        last = len(self.ids) - 1
        record = self.plan.store.get(self._record_key(last)) if last > 0 else None
        switches = [] if record is None else record.extras[_SWITCHES].tolist()
        self.dense_until, self.switches = last, list(switches)
        until = last if record is None else int(record.positions[0])
        self._load(until)
        if record is not None and self.length == until:
            self._take(record)
            self._collect()
            self.counts.has_index_state = self._worker.submit(self.index.restore_state, record.extras).result()
            return []
        self.counts.lost_chunks += record is not None
        bounds = [self.length, *(switch for switch in switches if switch > self.length), last]
        is_sparse = sum(switch <= self.length for switch in switches) % 2
        self.switches = [switch for switch in switches if switch < self.length]
        return [Segment(a, b, (i + is_sparse) % 2 == 1) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]

    def adopt(self, token_ids: Tensor, keys: Tensor, values: Tensor, origin: str) -> None:
        """Begins with tokens `[S]` whose keys `[L, H, S, D]` and values `[L, H, S, Dv]` were computed elsewhere.

        `origin` says how, as part of the keys under which they are stored.
        """
        self.origin = origin
        for first in range(0, len(token_ids), CHUNK_TOKENS):
            here = slice(first, first + CHUNK_TOKENS)
            ids = token_ids[here]
            chunk = KVChunk(
                self.plan.spec, ids, torch.arange(first, first + len(ids)), keys[:, :, here], values[:, :, here]
            )
            self.ids += ids.tolist()
            self.dense_until = len(self.ids)
            self._take(chunk)

    def _load(self, until: int) -> None:
        """Takes the chunks that the store has, from the beginning, as far as they end at `until` or before."""
        while self.length + CHUNK_TOKENS <= until:
            index = self.length // CHUNK_TOKENS
            key = self.key_of(index)
            chunk = self.plan.store.get(key) if key in self.plan.store else None
            if chunk is None or chunk.token_ids.tolist() != self.ids[self.length : self.length + CHUNK_TOKENS]:
                return
            self._held[index] = _on_cpu(chunk), True
            self._take(chunk)

    def _take(self, chunk: KVChunk) -> None:
        """The next tokens, computed before."""
        for layer, near in enumerate(self._near):
            near.append(chunk.keys[layer].to(self.plan.device), chunk.values[layer].to(self.plan.device))
        self.length += len(chunk)
        self.counts.reused_tokens += len(chunk)
        self._retire()
        self._collect(keep=self._fresh)

    def _record_key(self, length: int) -> ChunkKey:
        whole = content_key(self.plan.spec, self.ids[:length], salt=self.plan.salt)
        return derived_key(whole, f"session {self.origin} {self.plan.retrieval.form}")

    def close(self) -> None:
        """Lets go of the store's chunks."""
        tasks: list[Future[Any]] = [*self._tasks, *self._lessons]
        for task in tasks:
            task.cancel()
        wait(tasks)
        self._pins.close()


def _on_cpu(chunk: KVChunk) -> KVChunk:
    """Where pages are read; a tier on a device gives its own memory."""
    if chunk.keys.device.type == "cpu":
        return chunk
    extras = {name: tensor.cpu() for name, tensor in chunk.extras.items()}
    return replace(chunk, keys=chunk.keys.cpu(), values=chunk.values.cpu(), extras=extras)
