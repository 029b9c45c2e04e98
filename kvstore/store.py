"""KVStore: chunks in, chunks out, at any position; the border where faults below become misses above."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Self

from torch import Tensor

from ..compress.raw import RawCodec
from ..core import ChunkInfo, ChunkKey, Codec, EncodedChunk, KVChunk, ReadsLayers, Tier
from ..errors import CodecError, SpecMismatchError, TierError, TierUnavailableError
from .keys import KEY_BYTES
from .policy import EvictionPolicy, policy_factory
from .prefetch import Prefetch, PrefetchQueue
from .stack import Fetch, TierStack, whole
from .stats import StoreStats


class KVStore:
    """Keeps chunks in tiers and finds them again.

    A chunk found in a slower tier is promoted to the first. A tier that is full evicts the chunk that its policy names
    among those that are not pinned; the victim is demoted to the next tier that takes it. Corrupt chunks and failing
    tiers are misses, counted by `stats` and logged. Every method may be called from any thread; encoding, decoding and
    I/O run outside the locks of the store.

    Parameters
    ----------
    tiers : fastest first; the store owns them and closes them.
    codec : what chunks are encoded with; None for `RawCodec()`.
    codecs : further codecs, for stored chunks that were encoded by others than `codec`.
    write_through : `put` writes every tier, so that a killed process loses nothing of what `put` has returned for, as
        far as a tier that survives it took the chunk. Otherwise `put` writes the first tier that takes the chunk, and
        the others get it by demotion, on eviction and on `close`.
    policy : what goes when a tier is full: a name from `policy.POLICIES`, or what makes an `EvictionPolicy`. Each tier
        gets one of its own.
    timeout_s : longest time that a call waits for one operation of a tier that may stall (`MayStall`: disks, networks).
        Past it a chunk is a miss, and is not written; a tier that goes on like this is left alone for a while. Not of
        this constructor, nor of tiers in memory. None: as long as it takes.

    Raises
    ------
    ValueError : no tiers, or two of one name; no policy of that name; `timeout_s` is not above 0.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        codec: Codec | None = None,
        codecs: Sequence[Codec] = (),
        write_through: bool = True,
        policy: str | Callable[[], EvictionPolicy] = "default",
        timeout_s: float | None = 10.0,
    ) -> None:
        if not tiers or len({tier.name for tier in tiers}) < len(tiers):
            raise ValueError(f"tiers are {[tier.name for tier in tiers]}; expected at least one, with different names")
        if timeout_s is not None and not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is {timeout_s}; expected seconds above 0, or None")
        self._timeout_s = timeout_s
        self._codec: Codec = RawCodec() if codec is None else codec
        self._codecs: dict[str, Codec] = {known.name: known for known in (RawCodec(), *codecs, self._codec)}
        self._write_through = write_through
        self._stack = TierStack(tiers, policy_factory(policy), timeout_s=timeout_s)
        self._prefetches = PrefetchQueue(self._stack)
        self._lock = threading.Lock()  # of the counters below
        self._misses: Counter[str] = Counter()
        self._closed = False

    def put(self, key: ChunkKey, chunk: KVChunk, *, after: ChunkKey | None = None) -> None:
        """Encodes and stores a whole chunk; afterwards the caller may overwrite its tensors.

        A tier that cannot take the chunk is passed over and counted, as long as another takes it.

        Parameters
        ----------
        after : key of the chunk that this one continues (its predecessor among `prefix_keys`). A hint for eviction: a
            chunk is useless once its prefix is gone. It need not be stored.

        Raises
        ------
        ValueError : `key` was not made by `prefix_keys` or `content_key`.
        SpecMismatchError : `chunk` holds only some of its model's layers.
        CodecError : the codec cannot encode it.
        TierFullError, TierUnavailableError : no tier took it; why the last one did not.
        """
        self._expect_open()
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"key is {key!r}; expected {KEY_BYTES} bytes made by prefix_keys or content_key")
        if len(chunk.keys) != chunk.spec.num_layers:
            raise SpecMismatchError(f"chunk has {len(chunk.keys)} layers; expected all {chunk.spec.num_layers}")
        self._stack.put(key, self._codec.encode(chunk), ChunkInfo(after), everywhere=self._write_through)

    def get(self, key: ChunkKey, positions: Tensor | None = None, *, timeout_s: float | None = None) -> KVChunk | None:
        """The chunk, read-only, or None; a chunk found in a slower tier is promoted to the first.

        Parameters
        ----------
        positions : `[T]` int64, where to place the chunk; None where it was computed.
        timeout_s : how long this call waits for tiers in all, if less than the store's `timeout_s` for each.

        Raises
        ------
        ValueError : `timeout_s` is negative.
        """
        if timeout_s is not None:
            with self._stack.patience.within(timeout_s):
                return self.get(key, positions)
        found = self._lookup(key, whole(key), positions)
        if found is None:
            return None
        index, blob, chunk = found
        if index:
            self._stack.promote(key, blob)
        return chunk

    def get_layers(
        self, key: ChunkKey, start: int, stop: int, positions: Tensor | None = None, *, timeout_s: float | None = None
    ) -> KVChunk | None:
        """Layers `[start, stop)` of the chunk, read-only, or None; promotes nothing. `timeout_s` as for `get`.

        A chunk read layer by layer counts as used once, with its first layer.

        Raises
        ------
        ValueError : the range is empty, or the chunk has no such layers; `timeout_s` is negative.
        """
        if timeout_s is not None:
            with self._stack.patience.within(timeout_s):
                return self.get_layers(key, start, stop, positions)
        if not 0 <= start < stop:
            raise ValueError(f"layers are [{start}, {stop}); expected 0 <= start < stop")

        def fetch(tier: Tier) -> EncodedChunk | None:
            if isinstance(tier, ReadsLayers):
                blob = tier.get_layers(key, start, stop)
            else:
                blob = tier.get(key)
                blob = None if blob is None else blob.layers(start, stop)
            if blob is not None and any(len(blob.tensors[name]) != stop - start for name in blob.layered):
                raise ValueError(f"layers are [{start}, {stop}); chunk {key.hex()} has fewer")
            return blob

        found = self._lookup(key, fetch, positions, is_use=start == 0)
        return None if found is None else found[2]

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are stored. Reads nothing: a corrupt chunk shows itself only to `get`."""
        self._expect_open()
        return self._stack.match(keys)

    def __contains__(self, key: ChunkKey) -> bool:
        return self.locate(key) is not None

    def locate(self, key: ChunkKey) -> str | None:
        """Name of the fastest tier that holds the chunk."""
        self._expect_open()
        index = self._stack.locate(key)
        return None if index is None else self._stack.levels[index].tier.name

    def pinned(self, keys: Iterable[ChunkKey]) -> AbstractContextManager[None]:
        """Within, no tier evicts these chunks; `delete` and corruption still remove them. Pins are counted."""
        self._expect_open()
        return self._stack.pinned(keys)

    def prefetch(self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None) -> Prefetch:
        """Promotes chunks to the first tier in the background, in order; the result is how many of them are there then.

        Parameters
        ----------
        deadline_s : seconds from now after which no more are promoted, and no tier is waited for.

        Raises
        ------
        ValueError : `deadline_s` is negative.
        """
        self._expect_open()
        return self._prefetches.add(list(keys), deadline_s)

    def delete(self, key: ChunkKey) -> bool:
        """Removes the chunk from every tier, pinned or not; whether it was in any.

        Raises
        ------
        TierUnavailableError : a tier may still hold it.
        """
        self._expect_open()
        found, refusal = False, None
        for level in self._stack.levels:
            try:
                found |= self._stack.remove(level, key)
            except TierError as exc:
                refusal = exc
        if refusal is not None:
            raise refusal
        return found

    def stats(self) -> StoreStats:
        """Counts since the store was opened."""
        with self._lock:
            misses = dict(self._misses)
        return StoreStats(self._stack.stats(), misses, self._prefetches.failed, self._prefetches.refused)

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread uses the store."""
        self._expect_open()
        return self._stack.check()

    def close(self) -> None:
        """Cancels prefetches, demotes what only the first tier holds unless `write_through`, and closes the tiers.

        A tier that does not answer is waited for no longer than `timeout_s` at a time, and closed when it does answer.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._prefetches.close(self._timeout_s)
        if not self._write_through:
            for key in list(self._stack.levels[0].keys):
                self._stack.demote(0, key)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lookup(
        self, key: ChunkKey, fetch: Fetch, positions: Tensor | None, *, is_use: bool = True
    ) -> tuple[int, EncodedChunk, KVChunk] | None:
        """Index of the tier that had the chunk, what it held, and that decoded; None for a miss, which is counted."""
        self._expect_open()
        reason = "absent"
        for index, level in enumerate(self._stack.levels):
            blob, fault = self._stack.fetch(level, key, fetch, is_use=is_use)
            reason = fault or reason
            if blob is None:
                continue
            try:
                chunk = self._decode(blob, positions)
            except CodecError as exc:
                reason = "undecodable"
                self._stack.discard(level, key, exc)
                continue
            self._stack.count(level, hits=1, bytes_read=blob.nbytes)
            return index, blob, chunk
        with self._lock:
            self._misses[reason] += 1
        return None

    def _decode(self, blob: EncodedChunk, positions: Tensor | None) -> KVChunk:
        if blob.codec not in self._codecs:
            raise CodecError(f"codec {blob.codec!r} is not among {sorted(self._codecs)}; see KVStore(codecs=...)")
        return self._codecs[blob.codec].decode(blob, positions)

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError("the store is closed")
