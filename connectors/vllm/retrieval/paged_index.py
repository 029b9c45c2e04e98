"""Indexes over keys that lie in vLLM's blocks, for the decoding requests of one layer, and attention through them.

The attention backend is told rows of blocks, never whose they are. An index therefore belongs to what it was made of:
to a row of blocks, each as it was last written. `RowWrites` numbers every write that goes through the backend, which is
every one there is (the engine's, and those of kvloom's connector; others are refused at start). An index serves a row
if the row begins with the very blocks that it was made of and none of them was written since. Blocks that went to
another request were written by it; blocks that are shared through the prefix cache were not, and their keys are the
same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....errors import KVLoomError
from ....retrieval.attention import PartialAttention, attend, attend_selected
from ....retrieval.coverage import covering
from ....retrieval.growable import GrowableTensor
from ....retrieval.selector import LayerShape, LearnsFromQueries, SeesNear, Selection, choose
from ....retrieval.settings import Retrieval
from ..packings import GATHERS, Packing, unpacked
from .in_place import rows_in_place
from .rows import BlockKernel, DecodeRow, PromptPart, RowWrites, virtual_rows, window_grid

_LOG = logging.getLogger("kvloom")
_IDLE_STEPS = 64  # of the engine; then nobody decodes behind these blocks any more
_TOUCHED_LIMIT = 8.0  # a token of a whole block costs so much less than one that is gathered, on a processor


class _RowIndex:
    """An index of the tokens before `stop` that lie in `blocks`, as those were when `stamps` were taken.

    `keys` `[H, stop, D]`: a copy of theirs, token by token, where a cache holds keys channel by channel: there each
    channel of a token is a line of memory of its own.
    """

    def __init__(self, retrieval: Retrieval, shape: LayerShape, layer: int) -> None:
        self.selector = retrieval.selector(shape, layer)
        self.blocks = torch.empty(0, dtype=torch.int64)
        self.stamps = torch.empty(0, dtype=torch.int64)
        self.stop = 0
        self.claimed = -1  # in which step
        self.is_broken = False
        self.keys: GrowableTensor | None = None
        self.asked: list[Tensor] = []  # queries since it last grew, of neighbouring positions

    def begins(self, blocks: Tensor) -> bool:
        """Whether a row of blocks begins with those of this index."""
        count = len(self.blocks)
        return count <= len(blocks) and torch.equal(blocks[:count], self.blocks)


@dataclass(frozen=True, slots=True, eq=False)
class _Choice:
    """What a row attends to: `chosen` of what lies between the sinks and `stop`, and everything else.

    `keys` `[H, stop, D]`: a copy of those before `stop`, if there is one. `near`: attention to sinks and window, if it
    is known.
    """

    stop: int
    chosen: Selection
    keys: Tensor | None = None
    near: PartialAttention | None = None


_NOTHING = Selection(torch.empty(0, 0, dtype=torch.int64), 0)


@dataclass(slots=True)
class RetrievalCounts:
    """Over the life of a layer: rows decoded through an index, indexes made, rows that could not be searched and were
    attended to densely, tokens chosen over all KV heads, bytes read to choose.
    """

    rows: int = 0
    indexes: int = 0
    refused_rows: int = 0
    chosen_tokens: int = 0
    read_bytes: int = 0


@dataclass(slots=True, eq=False)
class PagedRetrieval:
    """Retrieval in one layer of an engine. Used by one thread, but for `writes`.

    Attributes
    ----------
    layer : its number in the model.
    packing : how keys and values lie in a block.
    block_tokens : N, of the kernel's blocks.
    break_even_tokens : as it was measured here; None if it was not.
    touched_limit : see `attend`.
    on_choice : told of the tokens chosen for every row, `[H, K]`, -1 for none; for measurements.
    """

    retrieval: Retrieval
    shape: LayerShape
    layer: int
    value_dim: int
    packing: Packing
    block_tokens: int
    break_even_tokens: int | None = None
    touched_limit: float = _TOUCHED_LIMIT
    on_choice: Callable[[Tensor], object] | None = None
    writes: RowWrites = field(default_factory=RowWrites)
    counts: RetrievalCounts = field(default_factory=RetrievalCounts)
    indexes: list[_RowIndex] = field(default_factory=list)
    _of_row: dict[int, _RowIndex] = field(default_factory=dict)
    _asked: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)  # by block: positions and queries
    _step: int = -1
    learns: bool = field(init=False)  # whether queries of prompts are worth keeping

    def __post_init__(self) -> None:
        self.learns = isinstance(self.retrieval.selector(self.shape, self.layer), LearnsFromQueries)

    def wrote(self, slots: Tensor, num_blocks: int) -> None:
        """To be told of every write to the cache, before or after it, but before the next `attend`."""
        self.writes.note(slots, self.block_tokens, num_blocks)
        if self._asked:  # whoever writes a block's first token begins it anew
            for slot in slots[slots % self.block_tokens == 0].tolist():
                self._asked.pop(slot // self.block_tokens, None)

    def heard(self, part: PromptPart, queries: Tensor) -> None:
        """Keeps the queries of a part of a prompt; `queries` `[T, Hq, D]` are those of the whole batch."""
        kept = queries[part.tokens].cpu()
        bounds = [i for i in range(len(part.blocks)) if i == 0 or part.blocks[i] != part.blocks[i - 1]]
        for first, stop in zip(bounds, [*bounds[1:], len(part.blocks)], strict=True):
            entry = part.positions[first:stop], kept[first:stop]
            self._asked.setdefault(part.blocks[first], []).append(entry)

    def attend(
        self, step: int, rows: Sequence[DecodeRow], queries: Tensor, cache: Tensor, kernel: BlockKernel | None = None
    ) -> Tensor:
        """Attention of one token of each row: queries `[R, Hq, D]` -> `[R, Hq, Dv]`, in their dtype.

        With a kernel, a KV head attends to all tokens of the blocks that hold some of those chosen for it: more than
        was asked for. Where that would be more than `touched_limit` times as many, and where the selector estimates
        the rest, the chosen tokens are read one by one: where they lie, by a compiled kernel, or else from copies.

        Parameters
        ----------
        step : of the engine; within one no index serves two rows.
        cache : of this layer, `[B, H, N, C]`; holds the tokens themselves already.
        kernel : the engine's own, over rows of blocks of one KV head.
        """
        self._begin(step)
        out = queries.new_empty(len(rows), self.shape.query_heads, self.value_dim)
        of_blocks: dict[int, NDArray[np.bool_]] = {}  # of the rows for the kernel, see `_blocks_of`
        for place, row in enumerate(rows):
            choice = self._choice(row, queries[place], cache)
            blocks = None if kernel is None else self._blocks_of(row, choice)
            if blocks is not None:
                of_blocks[place] = blocks
            else:
                out[place] = self._attend_to(row, choice, queries[place], cache)
        if kernel is not None and of_blocks:
            places = list(of_blocks)
            chosen_rows, chosen_blocks = [rows[place] for place in places], list(of_blocks.values())
            table, lengths = virtual_rows(chosen_rows, chosen_blocks, self.block_tokens)
            grouped = queries[places].view(-1, self.shape.group, self.shape.head_dim)
            found = kernel(grouped, cache, table.to(cache.device), lengths.to(cache.device))
            out[places] = found.view(len(places), *out.shape[1:])
        return out

    def grow(self, step: int, rows: Sequence[DecodeRow], cache: Tensor) -> None:
        """Indexes what prompts have computed so far, so that the first decoded token finds its index made.

        Not for methods that learn from queries, which are built from the whole prompt.
        """
        if self.learns:
            return
        self._begin(step)
        for row in rows:
            if self.stop(row.position):
                self._index_of(row, cache)

    def stop(self, position: int) -> int:
        """How far an index reaches for a token at `position`; what is behind is near. 0 for not at all."""
        grid = window_grid(self.block_tokens)
        stop = max(0, (position - self.retrieval.window_tokens) // grid * grid)
        return stop if stop > self.retrieval.sink_tokens else 0

    # ------------------------------------------------------------------------------------------------- indexes

    def _begin(self, step: int) -> None:
        if step == self._step:
            return
        self._step = step
        self.indexes = [index for index in self.indexes if step - index.claimed <= _IDLE_STEPS]

    def _index_of(self, row: DecodeRow, cache: Tensor) -> _RowIndex | None:
        """The row's index, up to date; None if there can be none."""
        index = self._find(row)
        if index is None:
            self.indexes = [one for one in self.indexes if torch.equal(self.writes.of(one.blocks), one.stamps)]
            index = _RowIndex(self.retrieval, self.shape, self.layer)
            self.indexes.append(index)
            self.counts.indexes += 1
        index.claimed = self._step
        self._of_row[row.number] = index
        if not index.is_broken:
            try:
                self._extend(index, row, cache)
            except (ValueError, KVLoomError) as exc:
                self._give_up(index, row, exc)
        return None if index.is_broken else index

    def _find(self, row: DecodeRow) -> _RowIndex | None:
        """An index that serves the row and no other one of this step: the longest, or that of the last step."""
        last = self._of_row.get(row.number)
        if last is not None and self._serves(last, row):
            return last
        fitting = [index for index in self.indexes if self._serves(index, row)]
        return max(fitting, key=lambda index: index.stop, default=None)

    def _serves(self, index: _RowIndex, row: DecodeRow) -> bool:
        if index.claimed == self._step or index.stop > self.stop(row.position) or not index.begins(row.blocks):
            return False
        return torch.equal(self.writes.of(index.blocks), index.stamps)

    def _extend(self, index: _RowIndex, row: DecodeRow, cache: Tensor) -> None:
        """Takes over what has left the window. Raises `ValueError` for keys that cannot be searched."""
        stop = self.stop(row.position)
        if stop <= index.stop:
            return
        if isinstance(index.selector, LearnsFromQueries) and index.asked:
            positions = torch.arange(row.position - len(index.asked), row.position)
            index.selector.observe(torch.stack(index.asked, 1), positions)
            index.asked.clear()
        is_new = not index.stop
        blocks = row.blocks[index.stop // self.block_tokens : stop // self.block_tokens]
        stamps = self.writes.of(blocks)
        if not bool(stamps.all()):
            raise ValueError("some of its blocks were filled past the attention backend")
        keys, values = unpacked(self.packing, cache[blocks.to(cache.device)], self.shape.head_dim, self.value_dim)
        places = rows_in_place(self.packing, cache, self.shape.head_dim)
        if places is not None and places.keys.stride(3) != 1:
            index.keys = index.keys or GrowableTensor(1)
            index.keys.add(keys)
        skip = max(0, self.retrieval.sink_tokens - index.stop)
        index.selector.add(keys[:, skip:].cpu(), values[:, skip:].cpu())
        index.blocks, index.stamps = torch.cat((index.blocks, blocks)), torch.cat((index.stamps, stamps))
        index.stop = stop
        if is_new and isinstance(index.selector, LearnsFromQueries):
            self._teach(index.selector, row)
            index.selector.build()

    def _teach(self, selector: LearnsFromQueries, row: DecodeRow) -> None:
        """The queries of the prompt, as far as they were computed here."""
        found = [entry for block in row.blocks.tolist() for entry in self._asked.get(block, ())]
        for positions, queries in found:
            selector.observe(queries.float().transpose(0, 1), positions)

    def _give_up(self, index: _RowIndex, row: DecodeRow, exc: Exception) -> None:
        """Attends to this context densely from now on: the engine has others to serve."""
        index.is_broken, index.stop = True, self.stop(row.position)
        index.blocks = row.blocks[: index.stop // self.block_tokens]
        index.stamps = self.writes.of(index.blocks)
        _LOG.warning("layer %d: a context is attended to densely, it cannot be searched: %s", self.layer, exc)

    # ----------------------------------------------------------------------------------------------- attention

    def _choice(self, row: DecodeRow, queries: Tensor, cache: Tensor) -> _Choice:
        """What is attended to beside the near tokens; everything is near where nothing can be searched."""
        index = self._index_of(row, cache) if self.stop(row.position) else None
        if index is not None:
            try:
                choice = self._choose(index, row, queries, cache)
                self.counts.rows += 1
                return choice
            except (ValueError, KVLoomError) as exc:
                self._give_up(index, row, exc)
        self.counts.refused_rows += 1
        return _Choice(0, _NOTHING)

    def _choose(self, index: _RowIndex, row: DecodeRow, queries: Tensor, cache: Tensor) -> _Choice:
        asked = queries.detach().to("cpu", torch.float32)
        if self.learns:
            index.asked.append(asked)
        budget = self.retrieval.budget(len(index.selector))
        near = None
        if self.retrieval.coverage is not None or isinstance(index.selector, SeesNear):
            near = self._near(row, index.stop, queries, cache)
        of_near = None if near is None else near[1].cpu()
        chosen = choose(index.selector, asked, row.position, budget, of_near)
        if self.retrieval.coverage is not None and near is not None:
            if index.keys is None:
                keys = self._rows_at(row, cache, chosen.ids)[0]
            else:
                rows = chosen.ids.clamp(min=0)[..., None].expand(-1, -1, self.shape.head_dim)
                keys = index.keys.all.gather(1, rows)
            limits = {"coverage": self.retrieval.coverage, "scale": self.shape.scale}
            chosen = covering(chosen, keys, queries, near[1], **limits)
        self.counts.chosen_tokens += int(np.count_nonzero(chosen.ids.numpy() >= 0))
        self.counts.read_bytes += chosen.read_bytes
        if self.on_choice is not None:
            self.on_choice(chosen.ids)
        return _Choice(index.stop, chosen, None if index.keys is None else index.keys.all, near)

    def _blocks_of(self, row: DecodeRow, choice: _Choice) -> NDArray[np.bool_] | None:
        """For each KV head, which of the row's blocks hold tokens that it attends to, `[H, n]`; None to gather."""
        ids, N, last = choice.chosen.ids, self.block_tokens, row.position // self.block_tokens
        if choice.chosen.rest is not None:
            return None
        blocks = np.zeros((self.shape.kv_heads, last + 1), np.bool_)
        if ids.numel():
            of_ids = ids.numpy() // N  # -1 for none becomes the last block, which is attended to anyway
            blocks[np.arange(len(blocks))[:, None], of_ids] = True
            if np.count_nonzero(blocks) * N > self.touched_limit * ids.numel():
                return None
        blocks[:, : -(-self._sinks(choice.stop) // N)] = True
        blocks[:, choice.stop // N :] = True
        return blocks

    def _attend_to(self, row: DecodeRow, choice: _Choice, queries: Tensor, cache: Tensor) -> Tensor:
        """Of exactly the tokens that were chosen: `[Hq, Dv]`."""
        near = self._near(row, choice.stop, queries, cache) if choice.near is None else choice.near
        places = rows_in_place(self.packing, cache, self.shape.head_dim)
        attend_ids = partial(self._attend_at, row, queries, cache)
        if places is not None:
            where = (queries, row.blocks, self.block_tokens)
            attend_ids = partial(places.attend, *where, scale=self.shape.scale, keys=choice.keys)
        return attend_selected(near, choice.chosen, attend_ids)[0].to(queries.dtype)

    def _sinks(self, stop: int) -> int:
        return self.retrieval.sink_tokens if stop else 0

    def _near(self, row: DecodeRow, stop: int, queries: Tensor, cache: Tensor) -> PartialAttention:
        """Attention to sinks and window."""
        places = rows_in_place(self.packing, cache, self.shape.head_dim)
        if places is None:
            return self._attend_near(row, stop, queries, cache)
        ids = torch.cat((torch.arange(self._sinks(stop)), torch.arange(stop, row.position + 1)))
        ids = ids.expand(self.shape.kv_heads, -1)
        return places.attend(queries, row.blocks, self.block_tokens, ids, scale=self.shape.scale)

    def _attend_near(self, row: DecodeRow, stop: int, queries: Tensor, cache: Tensor) -> PartialAttention:
        """Sinks and window, read by whole blocks."""
        N, sinks = self.block_tokens, self._sinks(stop)
        first = -(-sinks // N)
        numbers = torch.cat((row.blocks[:first], row.blocks[stop // N : row.position // N + 1]))
        keys, values = unpacked(self.packing, cache[numbers.to(cache.device)], self.shape.head_dim, self.value_dim)
        last = first * N + row.position - stop + 1
        visible = None
        if sinks != first * N:
            visible = torch.ones(self.shape.kv_heads, last, dtype=torch.bool, device=cache.device)
            visible[:, sinks : first * N] = False
        return attend(queries, keys[:, :last], values[:, :last], scale=self.shape.scale, visible=visible)

    def _attend_at(self, row: DecodeRow, queries: Tensor, cache: Tensor, ids: Tensor) -> PartialAttention:
        keys, values = self._rows_at(row, cache, ids)
        return attend(queries, keys, values, scale=self.shape.scale, visible=ids.to(cache.device) >= 0)

    def _rows_at(self, row: DecodeRow, cache: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[H, K, D]` and values of the chosen tokens `ids`; those of -1 are undefined."""
        rows = ids.to(cache.device).clamp(min=0)
        numbers = row.blocks.to(cache.device)[rows // self.block_tokens]
        keys, values = GATHERS[self.packing](cache, self.shape.head_dim, numbers, rows % self.block_tokens)
        return keys, values
