"""KVStore: chunks in, chunks out, at any position; the border where faults below become misses above."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Literal, Self, TypeAlias, get_args

from torch import Tensor

from ..compress.raw import RawCodec
from ..core import ChunkInfo, ChunkKey, Codec, EncodedChunk, KVChunk, ReadsLayers, Tier
from ..errors import CodecError, SpecMismatchError, TierError, TierUnavailableError
from .admission import AdmissionPolicy, admission_factory
from .books import Books
from .keys import KEY_BYTES
from .policy import EvictionPolicy, policy_factory
from .quota import Quota, check_namespace, check_quotas
from .stack import Fetch, TierStack, whole
from .stats import StoreStats

Promotion: TypeAlias = Literal["always", "second-hit", "never"]

_NO_QUOTAS: Mapping[str, Quota] = MappingProxyType({})


class KVStore:
    """Keeps chunks in tiers and finds them again.

    A chunk found in a slower tier is promoted to the first. A tier that is full gives up expired chunks first, then the
    chunk that its policy names among those that are not pinned and not another namespace's reserve; the victim is
    demoted to the next tier that takes it. Corrupt chunks and failing tiers are misses, counted by `stats` and logged.
    A tier that other processes write to, too, is followed: what they put is found. Every method may be called from any
    thread; encoding, decoding and I/O run outside the locks of the store.

    Parameters
    ----------
    tiers : fastest first; the store owns them and closes them.
    codec : what chunks are encoded with; None for `RawCodec()`.
    codecs : further codecs, for stored chunks that were encoded by others than `codec`.
    write_through : `put` writes every tier, so that a killed process loses nothing of what `put` has returned for, as
        far as a tier that survives it took the chunk. Otherwise `put` writes the first tier that takes the chunk, and
        the others get it by demotion, on eviction and on `close`.
    policy : what goes when a tier is full: a name from `policy.POLICIES`, or what makes an `EvictionPolicy`. Each tier
        gets one of its own, and one more for every namespace with a quota.
    admission : which new chunks may evict others: a name from `admission.ADMISSIONS`, or what makes an
        `AdmissionPolicy`. Each tier gets one of its own.
    promote : whether `get` copies a chunk found in a slower tier to the first: `always`, from the `second-hit` in that
        tier on, or `never`. `prefetch` always does.
    quotas : by namespace. Namespaces without one share what is left, as one.
    clock : Unix time in seconds; what expiry and the deadlines of pins go by.

    Raises
    ------
    ValueError : no tiers, or two of one name; no policy, admission or promotion of that name; reserves above 1.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        codec: Codec | None = None,
        codecs: Sequence[Codec] = (),
        write_through: bool = True,
        policy: str | Callable[[], EvictionPolicy] = "default",
        admission: str | Callable[[], AdmissionPolicy] = "always",
        promote: Promotion = "always",
        quotas: Mapping[str, Quota] = _NO_QUOTAS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if not tiers or len({tier.name for tier in tiers}) < len(tiers):
            raise ValueError(f"tiers are {[tier.name for tier in tiers]}; expected at least one, with different names")
        if promote not in get_args(Promotion):
            raise ValueError(f"promote is {promote!r}; expected one of {', '.join(get_args(Promotion))}")
        check_quotas(quotas)
        self._codec: Codec = RawCodec() if codec is None else codec
        self._codecs: dict[str, Codec] = {known.name: known for known in (RawCodec(), *codecs, self._codec)}
        self._write_through = write_through
        self._promote = promote
        self._clock = clock
        self._books = Books(
            tiers,
            policy=policy_factory(policy),
            admission=admission_factory(admission),
            quotas=quotas,
            clock=clock,
        )
        self._stack = TierStack(self._books)
        self._lock = threading.Lock()  # of the counters below
        self._lookups = self._writes = 0
        self._misses: Counter[str] = Counter()
        self._puts: Counter[str] = Counter()
        self._background_errors = 0
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kvloom-prefetch")
        self._closed = False

    def put(
        self,
        key: ChunkKey,
        chunk: KVChunk,
        *,
        after: ChunkKey | None = None,
        namespace: str = "",
        ttl_s: float | None = None,
        recompute_s: float | None = None,
    ) -> None:
        """Encodes and stores a whole chunk; afterwards the caller may overwrite its tensors.

        A tier that cannot take the chunk is passed over and counted, as long as another takes it. A chunk that the
        admission policies turn away is not stored and counted, which is no error. A chunk put again belongs to the
        namespace, and expires at the time, of the last put.

        Parameters
        ----------
        after : key of the chunk that this one continues (its predecessor among `prefix_keys`). A hint for eviction: a
            chunk is useless once its prefix is gone. It need not be stored.
        namespace : whose quota it counts for; at most 255 bytes of UTF-8. It does not keep tenants apart: keys do, by
            their salt.
        ttl_s : seconds from now after which the chunk is a miss; None for never.
        recompute_s : seconds that computing the chunk took, for eviction policies that weigh cost.

        Raises
        ------
        ValueError : `key` was not made by `prefix_keys` or `content_key`; another argument is not as described.
        SpecMismatchError : `chunk` holds only some of its model's layers.
        CodecError : the codec cannot encode it.
        TierFullError, TierUnavailableError : no tier took it; why the last one did not.
        """
        self._expect_open()
        _check_key(key, "key")
        if after is not None:
            _check_key(after, "after")
        check_namespace(namespace)
        for name, value, is_good, expected in (
            ("ttl_s", ttl_s, ttl_s is None or 0 < ttl_s < math.inf, "a finite number above 0"),
            ("recompute_s", recompute_s, recompute_s is None or 0 <= recompute_s < math.inf, "a finite number from 0"),
        ):
            if not is_good:
                raise ValueError(f"{name} is {value!r}; expected {expected}, or None")
        if len(chunk.keys) != chunk.spec.num_layers:
            raise SpecMismatchError(f"chunk has {len(chunk.keys)} layers; expected all {chunk.spec.num_layers}")
        outcome, writes = "refused", 0
        try:
            blob = self._codec.encode(chunk)
            expires_at_s = None if ttl_s is None else self._clock() + ttl_s
            info = ChunkInfo(after, namespace, expires_at_s, recompute_s)
            writes = self._stack.put(key, blob, info, everywhere=self._write_through)
            outcome = "stored" if writes else "not_admitted"
        finally:
            with self._lock:
                self._puts[outcome] += 1
                self._writes += writes

    def get(self, key: ChunkKey, positions: Tensor | None = None) -> KVChunk | None:
        """The chunk, read-only, or None; a chunk found in a slower tier may be promoted to the first (`promote`).

        Parameters
        ----------
        positions : `[T]` int64, where to place the chunk; None where it was computed.
        """
        found = self._lookup(key, whole(key), positions)
        if found is None:
            return None
        index, blob, chunk = found
        if index and self._is_to_be_promoted(index, key):
            self._stack.promote(key, blob)
        return chunk

    def get_layers(self, key: ChunkKey, start: int, stop: int, positions: Tensor | None = None) -> KVChunk | None:
        """Layers `[start, stop)` of the chunk, read-only, or None; promotes nothing.

        A chunk read layer by layer counts as used once, with its first layer.

        Raises
        ------
        ValueError : the range is empty, or the chunk has no such layers.
        """
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
        """How many leading keys are stored, unexpired. Reads nothing: a corrupt chunk shows itself only to `get`."""
        self._expect_open()
        return self._stack.match(keys)

    def __contains__(self, key: ChunkKey) -> bool:
        return self.locate(key) is not None

    def locate(self, key: ChunkKey) -> str | None:
        """Name of the fastest tier that holds the chunk, unexpired."""
        self._expect_open()
        index = self._stack.locate(key)
        return None if index is None else self._stack.levels[index].tier.name

    def pinned(self, keys: Iterable[ChunkKey], *, deadline_s: float | None = None) -> AbstractContextManager[None]:
        """Within, no tier evicts these chunks; `delete`, expiry and corruption still remove them. Pins are counted.

        Parameters
        ----------
        deadline_s : seconds after which the pins end by themselves, so that a holder that is stuck cannot fill the
            store; None for never.

        Raises
        ------
        ValueError : `deadline_s` is not a finite number above 0.
        """
        self._expect_open()
        if deadline_s is not None and not 0 < deadline_s < math.inf:
            raise ValueError(f"deadline_s is {deadline_s!r}; expected a finite number above 0, or None")
        return self._stack.pinned(keys, deadline_s)

    def prefetch(self, keys: Iterable[ChunkKey]) -> Future[int]:
        """Promotes chunks to the first tier in the background; the result is how many of them are there then."""
        self._expect_open()
        return self._background.submit(self._prefetch, list(keys))

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
                found |= self._stack.remove(level, key, "deletions")
            except TierError as exc:
                refusal = exc
        if refusal is not None:
            raise refusal
        return found

    def stats(self) -> StoreStats:
        """Counts since the store was opened."""
        pinned, overdue_pins = self._books.pin_counts()
        with self._lock:
            return StoreStats(
                self._stack.stats(),
                lookups=self._lookups,
                misses=dict(self._misses),
                puts=dict(self._puts),
                writes=self._writes,
                pinned=pinned,
                overdue_pins=overdue_pins,
                background_errors=self._background_errors,
            )

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread uses the store."""
        self._expect_open()
        return self._stack.check()

    def close(self) -> None:
        """Cancels prefetches, demotes what only the first tier holds unless `write_through`, and closes the tiers."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._background.shutdown(wait=True, cancel_futures=True)
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
        miss: str | None = "error"
        try:
            found = self._find(key, fetch, positions, is_use=is_use)
            miss = found if isinstance(found, str) else None
        finally:
            with self._lock:
                self._lookups += 1
                self._misses.update([] if miss is None else [miss])
        return None if isinstance(found, str) else found

    def _find(
        self, key: ChunkKey, fetch: Fetch, positions: Tensor | None, *, is_use: bool
    ) -> tuple[int, EncodedChunk, KVChunk] | str:
        """As `_lookup`, or why it is a miss."""
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
        return reason

    def _decode(self, blob: EncodedChunk, positions: Tensor | None) -> KVChunk:
        if blob.codec not in self._codecs:
            raise CodecError(f"codec {blob.codec!r} is not among {sorted(self._codecs)}; see KVStore(codecs=...)")
        return self._codecs[blob.codec].decode(blob, positions)

    def _is_to_be_promoted(self, index: int, key: ChunkKey) -> bool:
        if self._promote == "second-hit":
            return self._stack.reads(self._stack.levels[index], key) > 1
        return self._promote == "always"

    def _prefetch(self, keys: list[ChunkKey]) -> int:
        try:
            for key in keys:
                found_at = self._stack.locate(key)
                for level in self._stack.levels[1:] if found_at else ():
                    blob, _ = self._stack.fetch(level, key, whole(key))
                    if blob is not None:
                        self._stack.promote(key, blob)
                        break
        except BaseException:
            with self._lock:
                self._background_errors += 1
            raise
        return sum(self._stack.locate(key) == 0 for key in keys)

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError("the store is closed")


def _check_key(key: object, name: str) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"{name} is {key!r}; expected {KEY_BYTES} bytes made by prefix_keys or content_key")
