"""Which chunks of requests are stored and which are to be stored. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ....core import ChunkKey
from ..groups import GroupShape
from ..messages import Document, Save, Scheduled
from .known_documents import KnownDocuments
from .requests import Request
from .step_filter import StepFilter

_NEVER = 1 << 62  # tokens


@dataclass(slots=True)
class _Progress:
    request: Request
    alone: tuple[Document, ...]  # documents to store, which this request computes as if they were alone
    chunks: int = 0  # leading chunks that are stored or about to be
    planned: int = 0  # saves


class SaveTracker:
    """Plans saves of prefixes and documents by the step that completes them. Methods do nothing for requests that are
    not to be saved.

    Parameters
    ----------
    chunk_tokens : of a chunk.
    block_tokens : of the engine.
    known : is given every document that is stored.
    shapes : see `Planner`.
    """

    def __init__(
        self, chunk_tokens: int, block_tokens: int, known: KnownDocuments | None, shapes: Sequence[GroupShape] = ()
    ) -> None:
        self._chunk_tokens = chunk_tokens
        self._block_tokens = block_tokens
        self._known = known
        self._shapes = shapes
        self._progress: dict[str, _Progress] = {}
        self._filter = StepFilter()  # of the step that completes the next chunk or document

    def open(self, request_id: str, request: Request) -> None:
        """Track a request."""
        if request.options.save:
            self._progress[request_id] = _Progress(request, request.alone)
            self._filter.expect(request_id, 0)

    def close(self, request_id: str) -> int:
        """Forget a request; the number of its planned saves."""
        self._filter.forget(request_id)
        progress = self._progress.pop(request_id, None)
        return 0 if progress is None else progress.planned

    def reset(self, known: KnownDocuments | None) -> None:
        """Forget all requests; `known` is given documents from now on."""
        for request_id in self._progress:
            self._filter.forget(request_id)
        self._progress.clear()
        self._known = known

    def resume(self, request_id: str) -> None:
        """The engine admits the request: how many of its tokens are computed is not known."""
        if request_id in self._progress:
            self._filter.expect(request_id, 0)

    def skip(self, request_id: str, chunks: int) -> None:
        """So many leading chunks of the request are stored."""
        if (progress := self._progress.get(request_id)) is not None:
            progress.chunks = max(progress.chunks, chunks)

    def restart(self, request_id: str) -> None:
        """A chunk was lost: store all chunks of the request anew, as soon as they are computed."""
        if (progress := self._progress.get(request_id)) is not None:
            progress.chunks = 0
            self._filter.expect(request_id, 0)

    def passes(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether a step completes no chunk or document, see `StepFilter.passes`."""
        return self._filter.passes(new_tokens)

    def plan(self, each: Scheduled, token_s: float | None, *, pays: bool = True) -> list[Save]:
        """Saves of the chunks and documents that the step completes, computed in `token_s` a token if that is known.

        Of documents alone, if chunks of the prefix do not pay.
        """
        progress = self._progress.get(each.request_id)
        if progress is None:
            return []
        request, saves = progress.request, []
        # Placeholders of steps that are still under way follow the known tokens.
        known = min(each.computed_tokens, len(request.token_ids))
        count = (known if request.inexact is None else min(known, request.inexact)) // self._chunk_tokens
        if count > progress.chunks:
            request.keys.extend()
            for chunk in range(progress.chunks, count) if pays else ():
                if self._shapes:
                    saves += self._pieces(request, each, chunk, token_s)
                    continue
                after = request.keys.of(chunk - 1) if chunk else None
                start, stop = chunk * self._chunk_tokens, (chunk + 1) * self._chunk_tokens
                saves.append(
                    self._save(request, each, request.keys.of(chunk), after, start, stop, token_s, is_prefix=True)
                )
            progress.chunks = count
        for document in progress.alone:
            if document.stop <= known:
                start, stop = document.start, document.stop
                saves.append(self._save(request, each, document.keys, None, start, stop, token_s, is_prefix=False))
                if self._known is not None:
                    self._known.add(np.asarray(request.token_ids[start:stop], dtype=np.int64), document.keys[0])
                progress.alone = ()
        progress.planned += sum(not save.group for save in saves)
        # Drafted tokens may yet be accepted, beyond those that count as computed.
        self._filter.expect(each.request_id, self._next(progress) - each.computed_tokens - each.new_tokens)
        return saves

    def _pieces(self, request: Request, each: Scheduled, chunk: int, token_s: float | None) -> list[Save]:
        """Saves of a chunk's pieces, in every group that still has all of it.

        A piece is of no use without what it is a piece of: it goes first.
        """
        saves: list[Save] = []
        is_chained = self._shapes[0].is_full
        for group, (shape, blocks) in enumerate(zip(self._shapes, (each.blocks, *each.further), strict=True)):
            start, stop = shape.piece(chunk, self._chunk_tokens)
            if not shape.has_all(blocks, start, stop):
                continue
            after = None
            if is_chained and (group or chunk):
                after = request.keys.of(chunk if group else chunk - 1)
            first, last = start // shape.block_tokens, -(-stop // shape.block_tokens)
            token_ids = np.asarray(request.token_ids[start:stop], dtype=np.int64)
            cost_s = None if group or token_s is None else token_s * len(token_ids)
            row = tuple(blocks[first:last])
            keys = request.keys.of(chunk, group)
            saves.append(Save(keys, after, token_ids, start, row, cost_s, each.request_id, not group, group))
        return saves

    def _next(self, progress: _Progress) -> int:
        """Tokens of the request at which the next chunk or document is complete."""
        stop, inexact = (progress.chunks + 1) * self._chunk_tokens, progress.request.inexact
        stops = [document.stop for document in progress.alone]
        if inexact is None or stop <= inexact:
            stops.append(stop)
        return min(stops, default=_NEVER)

    def _save(
        self,
        request: Request,
        each: Scheduled,
        keys: tuple[ChunkKey, ...],
        after: tuple[ChunkKey, ...] | None,
        start: int,
        stop: int,
        token_s: float | None,
        *,
        is_prefix: bool,
    ) -> Save:
        first, last = start // self._block_tokens, -(-stop // self._block_tokens)
        token_ids = np.asarray(request.token_ids[start:stop], dtype=np.int64)
        cost_s = None if token_s is None else token_s * len(token_ids)
        return Save(keys, after, token_ids, start, tuple(each.blocks[first:last]), cost_s, each.request_id, is_prefix)
