"""One sequence that is being decoded: sinks and window beside the model, everything between in the store."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import torch
from torch import Tensor

from ....blend.attention import layer_attention
from ....core import ChunkKey, KVChunk
from ....kvstore.keys import content_key, derived_key, prefix_keys
from ....retrieval.attention import attend, with_sinks
from ....retrieval.context_index import ContextIndex
from ....retrieval.settings import CHUNK_TOKENS
from .chunks import IndexedChunks, SequenceCounts, on_cpu
from .plan import RetrievalPlan
from .sink_window import SinkWindow

_SWITCHES = "session.switches"


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens `[start, stop)` to be computed: densely and at once, or one after the other with retrieval."""

    start: int
    stop: int
    is_sparse: bool


class DecodedSequence:
    """Keys and values of one sequence, and attention over them.

        tokens                     are in                              owned by
        [0, sink_tokens)           sinks, and in the first chunk       the session, the store
        [0, stop)                  chunks                              the store, pinned and referred to until `close`
        [stop, length)             the window                          the session

    `stop` follows `length` in steps of `CHUNK_TOKENS`, at least `window_tokens` behind. While the sequence is shorter
    than the break-even, no chunk leaves the window, `stop` is 0 and attention is dense.

    A token that was decoded with retrieval, or follows such a token, has approximate keys and values. The key of its
    chunk derives from the prefix key, the form of the retrieval and the places where retrieval began and ended.

    Attributes
    ----------
    ids : all tokens; the last one is not computed before the next step.
    length : tokens whose keys and values are here.
    switches : positions where attention became sparse, dense again, and so on.
    dense_until : tokens before this one are attended to densely, whatever the length.
    is_done : the sequence has ended; steps of its batch leave it as it is.
    """

    def __init__(self, plan: RetrievalPlan, worker: Executor) -> None:
        self.plan = plan
        self.ids: list[int] = []
        self.length = 0
        self.stop = 0
        self.switches: list[int] = []
        self.dense_until = 0
        self.is_done = False
        self.counts = SequenceCounts()
        self.chunks = IndexedChunks(plan, worker, self.counts)
        spec = plan.spec
        self._sink_window = [
            SinkWindow(spec.num_kv_heads, spec.head_dim, spec.value_dim, spec.dtype, plan.device)
            for _ in range(spec.num_layers)
        ]
        self._resumed: dict[int, KVChunk] = {}  # chunks of the store that are still within the window
        self._prefix_keys: list[ChunkKey] = []
        self._origin = ""  # how the first keys and values were made, if not from the tokens alone
        self._new_chunks = 0  # that left the window in the last step

    @property
    def index(self) -> ContextIndex:
        """Of what lies between sinks and window."""
        return self.chunks.index

    @property
    def window_tokens(self) -> int:
        """Tokens in sinks and window."""
        return len(self._sink_window[0])

    # ----------------------------------------------------------------------------------------------- attention

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Take the next tokens of one layer, `[H, T, D]` and `[H, T, Dv]`."""
        self._sink_window[layer].append(keys, values)

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        """Attention of the tokens that were just appended: `[Hq, T, D]` -> `[Hq, T, Dv]`."""
        if self._is_sparse(queries.shape[1]) and self.plan.retrieves(layer):
            return self._attend_sparse(layer, queries[:, 0])[:, None]
        return self._attend_dense(layer, queries)

    def advance(self, count: int) -> None:
        """End a step in which all layers have attended for `count` tokens; chunks may leave the window."""
        is_sparse = self._is_sparse(count)
        self.counts.sparse_steps += is_sparse
        self.counts.dense_steps += count == 1 and self.length >= self.dense_until and not is_sparse
        if (is_sparse and not self.plan.retrieval.is_exact) != bool(len(self.switches) % 2):
            self.switches.append(self.length)
        self.length += count
        self._retire()

    def _is_sparse(self, count: int) -> bool:
        return count == 1 and self.stop > 0 and self.length >= self.dense_until

    def _attend_dense(self, layer: int, queries: Tensor) -> Tensor:
        plan, count = self.plan, queries.shape[1]
        self.chunks.collect(keep=self._new_chunks)
        if count > 1:
            self.chunks.observe(layer, queries, self.length)
        window = plan.attention[layer].window_tokens
        first = 0 if window is None else max(0, self.length - window + 1)
        first, keys, values = self._from(layer, first)
        positions = torch.arange(self.length - first, self.length - first + count, device=queries.device)
        return layer_attention(plan.attention[layer], queries, keys, values, positions)

    def _attend_sparse(self, layer: int, queries: Tensor) -> Tensor:
        held = self._sink_window[layer]
        near = attend(queries, held.keys, held.values, scale=self.plan.shapes[layer].scale)
        near = with_sinks(near, self.plan.attention[layer].sinks)
        return self.chunks.attend(layer, queries, near, self.length)[0].to(queries.dtype)

    def _from(self, layer: int, first: int) -> tuple[int, Tensor, Tensor]:
        """Position, at or before `first`, from which on keys and values of a layer follow."""
        held = self._sink_window[layer]
        if not self.stop:
            return first, held.keys[:, first:], held.values[:, first:]
        sinks = self.plan.retrieval.sink_tokens
        if first >= self.stop:
            here = sinks + first - self.stop
            return first, held.keys[:, here:], held.values[:, here:]
        chunk = first // CHUNK_TOKENS
        keys, values = self.chunks.keys_and_values(layer, chunk)
        return (
            chunk * CHUNK_TOKENS,
            torch.cat([*keys, held.keys[:, sinks:]], dim=1),
            torch.cat([*values, held.values[:, sinks:]], dim=1),
        )

    def _retire(self) -> None:
        """Move chunks that are entirely behind the window to the store."""
        self._new_chunks = 0
        plan = self.plan
        if max(self.length, self.dense_until) < plan.break_even_tokens:
            return
        sinks = plan.retrieval.sink_tokens
        while self.length - self.stop >= CHUNK_TOKENS + plan.retrieval.window_tokens:
            place, first = len(self.chunks), sinks if self.stop else 0
            resumed = self._resumed.pop(place, None)
            chunk = self._chunk_of(slice(first, first + CHUNK_TOKENS)) if resumed is None else resumed
            for held in self._sink_window:
                held.remove(sinks, first + CHUNK_TOKENS)
            self.chunks.observe_steps(self.length)
            self.stop += CHUNK_TOKENS
            after = self.key_of(place - 1) if place else None
            self.chunks.append(chunk, self.key_of(place), after=after, is_stored=resumed is not None)
            self._new_chunks += 1

    def _chunk_of(self, held: slice, extras: Mapping[str, Tensor] = MappingProxyType({})) -> KVChunk:
        """The tokens from `stop` on, which are at the places `held` of sinks and window."""
        keys = torch.stack([layer.keys[:, held] for layer in self._sink_window]).cpu()
        stop = self.stop + keys.shape[2]
        return KVChunk(
            self.plan.spec,
            torch.tensor(self.ids[self.stop : stop]),
            torch.arange(self.stop, stop),
            keys,
            torch.stack([layer.values[:, held] for layer in self._sink_window]).cpu(),
            extras=extras,
        )

    # ------------------------------------------------------------------------------------------------- answers

    def begin_answer(self) -> None:
        """Decode from here on: the prompt is computed, but for its last token; the tokens behind that may retrieve."""
        self.dense_until = len(self.ids)
        self.chunks.flush()

    def explain(self) -> str:
        """Whether attention is dense or retrieves by now, and why."""
        retrieval, limit = self.plan.retrieval, self.plan.break_even_tokens
        if self.length < limit:
            return f"dense: {self.length:,} tokens are below the break-even of {limit:,}"
        if not self.stop:
            return f"dense: {self.length:,} tokens fit sinks and window"
        covered = self.stop - retrieval.sink_tokens
        share = "" if retrieval.coverage is None else f", pruned to {retrieval.coverage:.1%} of the attention"
        return (
            f"{retrieval.method}: {retrieval.budget(covered):,} of {covered:,} tokens for each KV head{share}, beside "
            f"{retrieval.sink_tokens} sinks and the last {self.length - self.stop:,}"
        )

    # --------------------------------------------------------------------------------------------------- store

    def key_of(self, place: int) -> ChunkKey:
        """Key under which the store holds the chunk at `place`."""
        stop = (place + 1) * CHUNK_TOKENS
        if place >= len(self._prefix_keys):  # ids only grow at their end
            self._prefix_keys = prefix_keys(self.plan.spec, self.ids, chunk_tokens=CHUNK_TOKENS, salt=self.plan.salt)
        plain = self._prefix_keys[place]
        switches = [switch for switch in self.switches if switch < stop]
        if not switches and not self._origin:
            return plain
        return derived_key(plain, f"{self._origin} {self.plan.retrieval.form if switches else ''} {switches}")

    def save(self) -> ChunkKey:
        """Store the window and the state of the index, so that the sequence can be resumed elsewhere; the key of that.

        Raises
        ------
        TierError : no tier takes it.
        """
        self.chunks.flush()
        first = self.plan.retrieval.sink_tokens if self.stop else 0
        extras = {_SWITCHES: torch.tensor(self.switches, dtype=torch.int64), **self.index.state()}
        record = self._chunk_of(slice(first, None), extras)
        key = self._record_key(self.length)
        self.plan.store.put(key, record)
        return key

    def resume(self) -> list[TokenSpan]:
        """Take from the store what it has of `ids`, without the last token; the tokens that must still be computed.

        If everything that `save` stored is there, none. Otherwise all from the first missing chunk on, in the way in
        which they were computed before; those of a sequence that was never saved, densely.
        """
        last = len(self.ids) - 1
        record = self.plan.store.get(self._record_key(last)) if last > 0 else None
        switches = [] if record is None else record.extras[_SWITCHES].tolist()
        self.dense_until, self.switches = last, list(switches)
        until = last if record is None else int(record.positions[0])
        self._load(until, may_compute=record is None)
        if record is not None and self.length == until:
            self._take(record)
            self.counts.has_index_state = self.chunks.restore_index(dict(record.extras))
            return []
        self.counts.lost_chunks += record is not None
        bounds = [self.length, *(switch for switch in switches if switch > self.length), last]
        is_sparse = sum(switch <= self.length for switch in switches) % 2
        self.switches = [switch for switch in switches if switch < self.length]
        return [TokenSpan(a, b, (i + is_sparse) % 2 == 1) for i, (a, b) in enumerate(pairwise(bounds)) if a < b]

    def start_with(self, token_ids: Tensor, keys: Tensor, values: Tensor, origin: str) -> None:
        """Begin with tokens `[S]` whose keys `[L, H, S, D]` and values `[L, H, S, Dv]` were computed elsewhere.

        `origin` says how, as part of the keys under which they are stored.
        """
        self._origin = origin
        for first in range(0, len(token_ids), CHUNK_TOKENS):
            here = slice(first, first + CHUNK_TOKENS)
            ids, spec = token_ids[here], self.plan.spec
            self.ids += ids.tolist()
            self.dense_until = len(self.ids)
            self._take(KVChunk(spec, ids, torch.arange(first, first + len(ids)), keys[:, :, here], values[:, :, here]))

    def _load(self, until: int, *, may_compute: bool) -> None:
        """Take the chunks that the store has, from the beginning, as far as they end at `until` or before.

        Parameters
        ----------
        may_compute : end where computing the next chunk takes less time than loading it.
        """
        plan, choice = self.plan, self.plan.choice
        nbytes = CHUNK_TOKENS * plan.spec.token_bytes
        while self.length + CHUNK_TOKENS <= until:
            place = self.length // CHUNK_TOKENS
            key = self.key_of(place)
            if may_compute and (tier := plan.store.locate(key)) is not None:
                decided = choice.decide(tier, nbytes, CHUNK_TOKENS, self.length)
                self.counts.decision = decided.reason
                if not decided.loads:
                    keys = [self.key_of(later) for later in range(place, until // CHUNK_TOKENS)]
                    self.counts.computed_hits += CHUNK_TOKENS * plan.store.match(keys)
                    return
            hit = plan.store.read(key)
            if hit is None or hit.chunk.token_ids.tolist() != self.ids[self.length : self.length + CHUNK_TOKENS]:
                return
            choice.observe_load(hit.tier, nbytes, hit.load_s)
            self._resumed[place] = on_cpu(hit.chunk)
            self._take(hit.chunk)

    def _take(self, chunk: KVChunk) -> None:
        """Append tokens that were computed before."""
        for layer, held in enumerate(self._sink_window):
            held.append(chunk.keys[layer].to(self.plan.device), chunk.values[layer].to(self.plan.device))
        self.length += len(chunk)
        self.counts.reused_tokens += len(chunk)
        self._retire()
        self.chunks.collect(keep=self._new_chunks)

    def _record_key(self, length: int) -> ChunkKey:
        whole = content_key(self.plan.spec, self.ids[:length], salt=self.plan.salt)
        return derived_key(whole, f"session {self._origin} {self.plan.retrieval.form}")

    def close(self) -> None:
        """Unpin the chunks, see `IndexedChunks.close`."""
        self.chunks.close()
