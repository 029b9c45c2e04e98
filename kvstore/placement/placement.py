"""Where encoded chunks go: into every tier when they are put, up when they are read, down when a tier is full.

What goes then is for the eviction policy of the tier to say, within the quotas of namespaces (`TierState.victim`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

from ...core import ChunkInfo, ChunkKey, EncodedChunk
from ...errors import ChunkTooLargeError, CodecError, SpecMismatchError, TierError, TierFullError
from ..encoding.tier_codecs import TierCodecs
from ..guard.deadline import Deadline
from .catalog import Catalog, Pinned
from .tier_io import TierIO

_FIRST_LOOK = 32  # keys
_VAIN_EVICTIONS = 2  # of as many bytes as are needed, although by the catalog there was space


class Placement:
    """Moves encoded chunks between tiers. Every method may be called from any thread.

    Parameters
    ----------
    tiers : fastest first.

    Attributes
    ----------
    deadline : of the calling thread.
    """

    def __init__(self, catalog: Catalog, tiers: Sequence[TierIO], codecs: TierCodecs, deadline: Deadline) -> None:
        self.deadline = deadline
        self._catalog = catalog
        self._tiers = tiers
        self._codecs = codecs

    def put(self, key: ChunkKey, blobs: Sequence[EncodedChunk], info: ChunkInfo) -> int:
        """Write to every tier that takes the chunk; how many did. Raises the last `TierError` if none did.

        Parameters
        ----------
        blobs : the chunk as each tier is to hold it.
        """
        refusal: TierError | None = None
        passed_over: list[TierIO] = []
        try:
            for tier, blob in zip(self._tiers, blobs, strict=True):
                try:
                    self._insert(tier, key, blob, info)
                except TierError as exc:
                    refusal = exc
                    tier.refused(key, exc)
                    passed_over.append(tier)
            if refusal is not None and len(passed_over) == len(self._tiers):
                raise refusal
        finally:
            refusal = None  # its traceback leads back to this frame, a cycle that would keep the chunk alive
        for tier in passed_over:
            self._remove_older(tier, key, info)
        return len(self._tiers) - len(passed_over)

    def transcode(self, tier: TierIO, blob: EncodedChunk) -> EncodedChunk:
        """The chunk as this tier is to hold it; as it is where that cannot be had, which is exact as well."""
        try:
            return self._codecs.transcode(tier.index, blob)
        except (CodecError, SpecMismatchError) as exc:
            tier.warn(exc)
            return blob

    def promote(self, key: ChunkKey, blob: EncodedChunk) -> bool:
        """Copy a chunk to the first tier; False if that has no space, though it might have."""
        first = self._tiers[0]
        info = self._catalog.info(key)
        try:
            self._transfer(first, key, blob, info, promotions=1)
        except TierError as exc:
            first.refused(key, exc)
            return isinstance(exc, TierFullError) and exc.needed_bytes > first.state.most_bytes(info.namespace)
        return True

    def promote_stored(self, key: ChunkKey) -> bool:
        """Promote a chunk from where it is, if it is stored; False if the first tier has no space, though it might."""
        self.follow_changes()
        if not self._catalog.locate([key]):
            self.look_for([key])
        if self._catalog.locate([key]) not in ([], [self._tiers[0].state]):
            for tier in self._tiers[1:]:
                blob, *_ = tier.read(key)
                if blob is not None:
                    return self.promote(key, blob)
        return True

    def follow_changes(self) -> None:
        """Have the catalog follow what other processes did to shared tiers."""
        for tier in self._tiers:
            tier.follow_changes()

    def look_for(self, keys: Sequence[ChunkKey]) -> bool:
        """Ask tiers that others write to for these keys; whether that found any that was not known."""
        found = [tier.finder.look_for(keys) for tier in self._tiers if tier.finder is not None]
        return any(found)

    def look_for_prefix(self, keys: Sequence[ChunkKey], known: int) -> None:
        """The same for the leading keys, of which the catalog knows the first `known`: as far as they go on.

        More are asked for at a time as more are found: most look-ups find nothing.
        """
        step = _FIRST_LOOK
        while known < len(keys) and self.look_for(keys[known : known + step]):
            found = self._catalog.match(keys)
            if found < known + step:
                return
            known, step = found, 4 * step

    def count_in_first(self, keys: Iterable[ChunkKey]) -> int:
        """How many of the keys the first tier holds."""
        return sum(self._catalog.locate([key]) == [self._tiers[0].state] for key in keys)

    def recover(self) -> None:
        """For a thread that an exception has taken out of a call: what it held or had begun is set right."""
        for tier in self._tiers:
            tier.recover()
        self._catalog.recover()
        self.deadline.clear()

    def pinned(self, keys: Iterable[ChunkKey], deadline_s: float | None = None) -> Pinned:
        return self._catalog.pinned(keys, deadline_s)

    def _transfer(self, tier: TierIO, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, **counts: int) -> None:
        """Put a chunk that another tier holds into this one, as that is to hold it."""
        fitting = self.transcode(tier, blob)
        self._insert(tier, key, fitting, info, transcodes=int(fitting is not blob), **counts)

    def _insert(self, tier: TierIO, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, **counts: int) -> None:
        """Put into one tier, evicting until the chunk fits; raises `TierError` if that cannot be done."""
        tier.follow_changes()  # so that what others wrote before counts as older
        self._catalog.begin_insertion(tier.state)
        try:
            self._make_space_and_write(tier, key, blob, info, **counts)
        finally:
            self._catalog.end_insertion(tier.state)
        self._trim(tier, key, info)

    def _make_space_and_write(
        self, tier: TierIO, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo, **counts: int
    ) -> None:
        state, vain_bytes = tier.state, 0
        while True:
            excess_bytes = self._catalog.excess_bytes(state, key, blob.nbytes, info.namespace)
            try:
                if excess_bytes > 0:
                    _refuse_over_limit(tier, blob.nbytes, info.namespace, excess_bytes)
                tier.write(key, blob, info, **counts)
                return
            except TierFullError as exc:
                needed_bytes = exc.needed_bytes
                if isinstance(exc, ChunkTooLargeError) or needed_bytes > state.most_bytes(info.namespace):
                    raise
                if self._remove_expired(tier):
                    continue
                # A device that others have filled, or memory that readers still hold, is not to be waited for by
                # evicting everything. What others insert here at the same time may take what this evicts.
                if vain_bytes >= _VAIN_EVICTIONS * needed_bytes * len(state.inserting):
                    raise
                is_vain = excess_bytes <= 0 and self._catalog.fits(state, needed_bytes)
                freed_bytes = self._evict(tier, key, info, own_group=excess_bytes > 0)
                if freed_bytes is None:
                    raise
                vain_bytes += freed_bytes if is_vain else 0

    def _remove_expired(self, tier: TierIO) -> bool:
        """Remove an expired chunk; False if there is none."""
        key = self._catalog.expired(tier.state)
        if key is not None:
            tier.remove(key, "expirations")
        return key is not None

    def _evict(self, tier: TierIO, key: ChunkKey, info: ChunkInfo, *, own_group: bool) -> int | None:
        """Make space for `key` by removing a chunk that is not pinned, after demoting it.

        Returns the bytes that are free by that, 0 if another thread was faster; None if nothing may go. When the
        thread's deadline left no time to demote the chunk, it stays.
        """
        tier.follow_changes()
        victim = self._catalog.choose_victim(tier.state, key, info, own_group=own_group)
        if victim is None:
            return None
        try:
            self._demote(tier, victim)
            if self.deadline.left_s() <= 0:
                return None
            residency = tier.remove(victim, "evictions")
        finally:
            self._catalog.release_victim(tier.state, victim)
        return 0 if residency is None else residency.nbytes

    def _demote(self, tier: TierIO, key: ChunkKey) -> None:
        """Copy a chunk to the next tier that takes it, unless a slower tier has it already."""
        slower = self._tiers[tier.index + 1 :]
        if not slower or any(self._catalog.residency(other.state, key) for other in slower):
            return
        blob, *_ = tier.read(key, is_use=False)
        if blob is None:
            return
        info = self._catalog.info(key)
        for other in slower:
            try:
                self._transfer(other, key, blob, info)
            except TierError as exc:
                other.refused(key, exc)
            else:
                self._catalog.count(tier.state, demotions=1)
                return

    def _trim(self, tier: TierIO, key: ChunkKey, info: ChunkInfo) -> None:
        """Bring a namespace back to its limit: what the tier adds to the tensors was not known before."""
        group = tier.state.group(info.namespace)
        try:
            while group.is_over and self._evict(tier, key, info, own_group=True) is not None:
                pass
        except TierError as exc:  # the chunk itself is written
            tier.failed(exc)

    def _remove_older(self, tier: TierIO, key: ChunkKey, info: ChunkInfo) -> None:
        """A copy that the last `put` did not write must not outlive the new one, nor count for another namespace."""
        held = self._catalog.residency(tier.state, key)
        if held is None or (held.info.expires_at_s, held.info.namespace) == (info.expires_at_s, info.namespace):
            return
        try:
            tier.remove(key, "deletions")
        except TierError as exc:
            tier.failed(exc)


def _refuse_over_limit(tier: TierIO, nbytes: int, namespace: str, excess_bytes: float) -> NoReturn:
    raise TierFullError(
        f"tier {tier.tier.name!r}: {nbytes} bytes exceed the limit of namespace {namespace!r} "
        f"by {excess_bytes}, and nothing of it can go; raise its Quota, or unpin some of its chunks",
        needed_bytes=nbytes,
    )
