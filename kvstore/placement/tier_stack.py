"""Encoded chunks in a stack of tiers, fastest first: how they get there, and where they go when a tier is full.

What goes then is for the eviction policy of the tier to say (`policy.py`), within the quotas of namespaces
(`level.py`); what may evict others, for its admission policy (`admission.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import NoReturn

from ...core import ChunkInfo, ChunkKey, EncodedChunk
from ...errors import CodecError, SpecMismatchError, TierError, TierFullError
from ..encoding.tier_codecs import Forms
from .catalog import Books
from .tier_io import Clerk, whole
from .tier_state import Level

_VAIN_EVICTIONS = 2  # of as many bytes as are needed, although by the books there was room


class TierStack:
    """Moves encoded chunks between tiers. Every method may be called from any thread."""

    def __init__(self, books: Books, clerk: Clerk, forms: Forms) -> None:
        self.levels = books.levels
        self.patience = clerk.patience
        self._books = books
        self._clerk = clerk
        self._forms = forms

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are in some tier that answers, unexpired."""
        self._clerk.catch_up(*self.levels)
        return self._books.match(keys)

    def locate(self, key: ChunkKey) -> int | None:
        """Index of the fastest tier that answers and holds the chunk, unexpired."""
        self._clerk.catch_up(*self.levels)
        return self._books.locate(key)

    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]:
        """For each leading key, the fastest tier that answers and holds it, unexpired."""
        self._clerk.catch_up(*self.levels)
        return self._books.locate_prefix(keys)

    def count_in_first(self, keys: Iterable[ChunkKey]) -> int:
        """How many of the keys the first tier holds."""
        return sum(self._books.locate(key) == 0 for key in keys)

    def pinned(self, keys: Iterable[ChunkKey], deadline_s: float | None) -> AbstractContextManager[None]:
        return self._books.pinned(keys, deadline_s)

    def put(self, key: ChunkKey, encode: Callable[[int], EncodedChunk], info: ChunkInfo, *, everywhere: bool) -> int:
        """Writes to every tier, or to the first that takes the chunk; returns how many did.

        0 if it was not admitted. Raises the last `TierError` if no tier took it and none turned it away for that, and
        what `encode` raises, before anything is written.

        Parameters
        ----------
        encode : gives the chunk in the form of a tier, by index.
        """
        refusal: TierError | None = None
        admitted = True
        written: list[Level] = []
        for index in range(len(self.levels)) if everywhere else ():
            encode(index)
        try:
            for index, level in enumerate(self.levels):
                try:
                    if self.insert(index, key, encode(index), info):
                        written.append(level)
                        if not everywhere:
                            break
                    else:
                        admitted = False
                except TierError as exc:
                    refusal = exc
                    self._clerk.faults.refused(level, key, exc)
            if refusal is not None and admitted and not written:
                raise refusal
        finally:
            refusal = None  # its traceback leads back to this frame, a cycle that would keep the chunk alive
        for level in self.levels if written else ():
            if level not in written:
                self._remove_older(level, key, info)
        return len(written)

    def promote(self, key: ChunkKey, blob: EncodedChunk) -> bool:
        """Copies a chunk to the first tier; False if that has no room, though it might have."""
        first = self.levels[0]
        info = self._books.info(key)
        try:
            self.insert(0, key, blob, info, was_read=True)
        except TierError as exc:
            self._clerk.faults.refused(first, key, exc)
            return isinstance(exc, TierFullError) and exc.needed_bytes > first.most_bytes(info.namespace)
        self._books.count(first, promotions=1)
        return True

    def raise_to_first(self, key: ChunkKey) -> bool:
        """Promotes a chunk from where it is, if it is stored; False if the first tier has no room, though it might."""
        found_at = self.locate(key)
        for level in self.levels[1:] if found_at else ():
            blob, *_ = self._clerk.fetch(level, key, whole(key))
            if blob is not None:
                return self.promote(key, blob)
        return True

    def reads(self, level: Level, key: ChunkKey) -> int:
        """How often the chunk was read in this tier."""
        held = self._books.held(level, key)
        return 0 if held is None else held.reads

    def demote(self, index: int, key: ChunkKey) -> None:
        """Copies a chunk to the next tier that takes it, unless a slower tier has it already."""
        slower = range(index + 1, len(self.levels))
        if not slower or any(self._books.held(self.levels[i], key) for i in slower):
            return
        was_read = self.reads(self.levels[index], key) > 0
        blob, *_ = self._clerk.fetch(self.levels[index], key, whole(key), is_use=False)
        if blob is None:
            return
        for i in slower:
            try:
                done = self.insert(i, key, blob, was_read=was_read)
            except TierError as exc:
                self._clerk.faults.refused(self.levels[i], key, exc)
            else:
                if done:
                    self._books.count(self.levels[index], demotions=1)
                    return

    def insert(
        self, index: int, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo | None = None, *, was_read: bool = False
    ) -> bool:
        """Puts into one tier, in its form, evicting until the chunk fits; False if it may not evict others.

        Parameters
        ----------
        info : None for what another tier remembers of the chunk.
        was_read : in another tier, so that it may evict others.

        Raises
        ------
        TierError : it cannot be done.
        """
        level = self.levels[index]
        info = self._books.info(key) if info is None else info
        came_as, blob = blob, self._in_form(index, blob)
        self._clerk.catch_up(level)  # so that what others wrote before counts as older
        admitted = was_read or self._books.admits(level, key, blob.nbytes)
        with self._books.inserting(level):
            written = self._fit_in(index, key, blob, info, may_evict=admitted)
        if written:
            self._trim(index, key, info)
            if blob is not came_as:
                self._books.count(level, transcodes=1)
        return written

    def _in_form(self, index: int, blob: EncodedChunk) -> EncodedChunk:
        """The chunk as this tier is to hold it; as it is where that cannot be had, which is exact as well."""
        try:
            return self._forms.fitted(index, blob)
        except (CodecError, SpecMismatchError) as exc:
            self._clerk.faults.warn(self.levels[index], exc)
            return blob

    def _fit_in(self, index: int, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, *, may_evict: bool) -> bool:
        level = self.levels[index]
        vain_bytes = 0
        while True:
            excess_bytes = self._books.excess_bytes(level, key, blob.nbytes, info.namespace)
            at_limit = excess_bytes > 0
            try:
                if at_limit:
                    _refuse_over_limit(level, blob.nbytes, info.namespace, excess_bytes)
                self._clerk.write(level, key, blob, info)
                return True
            except TierFullError as exc:
                needed_bytes = exc.needed_bytes
                if needed_bytes > level.most_bytes(info.namespace):
                    raise
                if self._expire(level):
                    continue
                if not may_evict:
                    self._books.turn_away(level, key, "not_admitted")
                    return False
                # A device that others have filled, or memory that readers have not let go, is not to be waited for by
                # evicting everything. What others insert here at the same time may take what this evicts.
                if vain_bytes >= _VAIN_EVICTIONS * needed_bytes * level.inserts:
                    raise
                is_vain = not at_limit and self._books.fits(level, needed_bytes)
                freed_bytes = self._evict(index, key, info, own_room=at_limit)
                if freed_bytes is None:
                    raise
                vain_bytes += freed_bytes if is_vain else 0

    def _expire(self, level: Level) -> bool:
        """Removes an expired chunk; False if there is none."""
        key = self._books.expired(level)
        if key is not None:
            self._clerk.remove(level, key, "expirations")
        return key is not None

    def _evict(self, index: int, key: ChunkKey, info: ChunkInfo, *, own_room: bool) -> int | None:
        """Makes room for `key` by removing a chunk that is not pinned, after demoting it.

        Returns the bytes that are free by that, 0 if another thread was faster; None if nothing may go. No chunk goes
        without having been demoted because this thread was in a hurry.
        """
        level = self.levels[index]
        self._clerk.catch_up(level)
        victim = self._books.choose_victim(level, key, info, own_room=own_room)
        if victim is None:
            return None
        try:
            self.demote(index, victim)
            if self.patience.left_s() <= 0:
                return None
            held = self._clerk.remove(level, victim, "evictions")
        finally:
            self._books.let_go(level, victim)
        return 0 if held is None else held.nbytes

    def _trim(self, index: int, key: ChunkKey, info: ChunkInfo) -> None:
        """Brings a namespace back to its limit: what the tier adds to the tensors was not known before."""
        level = self.levels[index]
        room = level.room(info.namespace)
        try:
            while room.is_over and self._evict(index, key, info, own_room=True) is not None:
                pass
        except TierError as exc:  # the chunk itself is written
            self._clerk.faults.failed(level, exc)

    def _remove_older(self, level: Level, key: ChunkKey, info: ChunkInfo) -> None:
        """A copy that the last `put` did not write must not outlive the new one, nor count for another namespace."""
        held = self._books.held(level, key)
        if held is None or (held.info.expires_at_s, held.info.namespace) == (info.expires_at_s, info.namespace):
            return
        try:
            self._clerk.remove(level, key, "deletions")
        except TierError as exc:
            self._clerk.faults.failed(level, exc)


def _refuse_over_limit(level: Level, nbytes: int, namespace: str, excess_bytes: float) -> NoReturn:
    raise TierFullError(
        f"tier {level.tier.name!r}: {nbytes} bytes exceed the limit of namespace {namespace!r} "
        f"by {excess_bytes}, and nothing of it can go; raise its Quota, or unpin some of its chunks",
        needed_bytes=nbytes,
    )
