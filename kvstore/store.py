"""KVStore: chunks in, chunks out, at any position; the border where faults below become misses above."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Literal, NamedTuple, Self, TypeAlias, get_args

from torch import Tensor

from ..calibration.certificate import Certificate
from ..compress.raw import RawCodec
from ..core import NOTHING, ChunkInfo, ChunkKey, Codec, EncodedChunk, KVChunk, KVSpec, Tier
from ..errors import SpecMismatchError, TierError, TierUnavailableError
from .encoding.certification import Permits
from .encoding.tier_codecs import Forms
from .eviction.admission import AdmissionPolicy, admission_factory
from .eviction.policy import EvictionPolicy, policy_factory
from .history import Explanation
from .keys import check_key
from .placement.catalog import Books, PlacementChange
from .placement.prefetch import Prefetch, PrefetchQueue
from .placement.quota import Quota, check_namespace, check_quotas
from .placement.tier_io import Clerk, some_layers, whole
from .placement.tier_stack import TierStack
from .reader import Found, Reader
from .stats import StoreStats

Promotion: TypeAlias = Literal["always", "second-hit", "never"]

_NO_QUOTAS: Mapping[str, Quota] = MappingProxyType({})
_NO_CODECS: Mapping[str, Codec] = MappingProxyType({})


class Hit(NamedTuple):
    """A chunk that was found.

    Attributes
    ----------
    chunk : read-only; it may share memory with the store.
    tier : name of the tier that answered.
    recompute_s : seconds that computing the chunk took, if `put` was told.
    nbytes : bytes that were read: of the encoded chunk, or of the layers asked for.
    load_s : seconds from the call to the decoded chunk.
    """

    chunk: KVChunk
    tier: str
    recompute_s: float | None
    nbytes: int
    load_s: float


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
    tier_codecs : by name of the tier, where another codec than `codec` is to be used. An exact chunk takes the form of
        the tier that it goes into: `put` encodes it once for every form, demotion and promotion transcode it. A chunk
        that has lost something moves as it is, is never encoded again, and never counts as exact again until it is put.
    codecs : further codecs, for stored chunks that were encoded by others than these.
    certificates : what makes lossy codecs usable, see `kvloom certify`. Without one that covers codec, parameters and
        model, `put` raises, and a stored chunk is a miss (`uncertified`) that stays where it is.
    allow_uncertified : use lossy codecs without a certificate all the same; warns once, and counts.
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
    timeout_s : longest time that a call waits for one operation of a tier that may stall (`MayStall`: disks, networks).
        Past it a chunk is a miss, and is not written; a tier that goes on like this is left alone for a while, and what
        it holds is not found meanwhile. Not of this constructor, nor of tiers in memory. None: as long as it takes.

    Raises
    ------
    ValueError : no tiers, or two of one name; codecs for tiers that are not there; no policy, admission or promotion of
        that name; reserves above 1; `timeout_s` is not above 0.
    """

    def __init__(
        self,
        tiers: Sequence[Tier],
        *,
        codec: Codec | None = None,
        tier_codecs: Mapping[str, Codec] = _NO_CODECS,
        codecs: Sequence[Codec] = (),
        certificates: Sequence[Certificate] = (),
        allow_uncertified: bool = False,
        write_through: bool = True,
        policy: str | Callable[[], EvictionPolicy] = "default",
        admission: str | Callable[[], AdmissionPolicy] = "always",
        promote: Promotion = "always",
        quotas: Mapping[str, Quota] = _NO_QUOTAS,
        clock: Callable[[], float] = time.time,
        timeout_s: float | None = 10.0,
    ) -> None:
        if not tiers or len({tier.name for tier in tiers}) < len(tiers):
            raise ValueError(f"tiers are {[tier.name for tier in tiers]}; expected at least one, with different names")
        if promote not in get_args(Promotion):
            raise ValueError(f"promote is {promote!r}; expected one of {', '.join(get_args(Promotion))}")
        check_quotas(quotas)
        if unknown := tier_codecs.keys() - {tier.name for tier in tiers}:
            raise ValueError(f"tier_codecs are for {sorted(unknown)}; the tiers are {[tier.name for tier in tiers]}")
        if timeout_s is not None and not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ValueError(f"timeout_s is {timeout_s}; expected seconds above 0, or None")
        self._timeout_s = timeout_s
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
        self._clerk = Clerk(self._books, timeout_s=timeout_s)
        codec = RawCodec() if codec is None else codec
        self._forms = Forms(
            [tier_codecs.get(tier.name, codec) for tier in tiers],
            (RawCodec(), *codecs, codec),
            Permits(certificates, allow_uncertified=allow_uncertified),
        )
        self._reader = Reader(self._books, self._clerk, self._forms)
        self._stack = TierStack(self._books, self._clerk, self._forms)
        self._prefetches = PrefetchQueue(self._stack)
        self._lock = threading.Lock()  # of the counters below
        self._puts: Counter[str] = Counter()
        self._writes = 0
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
        CodecError : a codec cannot encode it.
        UncertifiedError : a tier's codec is lossy, and no certificate covers it for the model of the chunk.
        TierFullError, TierUnavailableError : no tier took it; why the last one did not.
        """
        self._expect_open()
        check_key(key, "key")
        if after is not None:
            check_key(after, "after")
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
            self._forms.expect_permits(chunk.spec)
            expires_at_s = None if ttl_s is None else self._clock() + ttl_s
            info = ChunkInfo(after, namespace, expires_at_s, recompute_s)
            writes = self._stack.put(key, self._forms.encoder(chunk), info, everywhere=self._write_through)
            outcome = "stored" if writes else "not_admitted"
        finally:
            self._count_put(outcome, writes)

    def put_encoded(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> bool:
        """Stores a chunk that is encoded already, by a codec that need not be known here; False if it is not admitted.

        A service passes chunks on in this way: nothing is decoded, and no certificate is needed until a client decodes
        the chunk. When this returns, the store may refer to the tensors, unless they are `leased`.

        Raises
        ------
        ValueError : `key` was not made by `prefix_keys` or `content_key`, or the namespace is longer than 255 bytes.
        TierFullError, TierUnavailableError : no tier took it; why the last one did not.
        """
        self._expect_open()
        check_key(key, "key")
        check_namespace(info.namespace)
        outcome, writes = "refused", 0
        try:
            writes = self._stack.put(key, lambda _: blob, info, everywhere=self._write_through)
            outcome = "stored" if writes else "not_admitted"
        finally:
            self._count_put(outcome, writes)
        return bool(writes)

    def get_encoded(self, key: ChunkKey) -> EncodedChunk | None:
        """The chunk as a tier holds it, read-only and not decoded, or None; otherwise as `get`."""
        self._expect_open()
        found = self._reader.find(key, whole(key), None, decoded=False)
        if found is None:
            return None
        self._promote_found(key, found)
        return found.blob

    def check_certificates(self, spec: KVSpec) -> None:
        """Refuse at once what `put` would refuse of every chunk of this model.

        Raises
        ------
        UncertifiedError : a tier's codec is lossy, and no certificate covers it.
        """
        self._forms.expect_permits(spec)

    def read(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Hit | None:
        """The chunk, where it came from and what it costs; None for a miss.

        A chunk that was found in a slower tier may be copied to the first (`promote`).

        Parameters
        ----------
        positions : `[T]` int64, where to place the chunk; None where it was computed.
        layers : (start, stop) to read these layers alone, which promotes nothing. A chunk that is read layer by layer
            counts as used once, with its first layer. None for the whole chunk.
        timeout_s : how long this call waits for tiers in all, if less than the store's `timeout_s` for each.

        Raises
        ------
        ValueError : `layers` are no range, or the chunk has no such layers; `timeout_s` is negative.
        """
        if timeout_s is not None:
            with self._clerk.patience.within(timeout_s):
                return self.read(key, positions, layers=layers)
        self._expect_open()
        if layers is None:
            found = self._reader.find(key, whole(key), positions)
        else:
            start, stop = layers
            found = self._reader.find(key, some_layers(key, start, stop), positions, is_use=start == 0)
        if found is None or found.chunk is None:
            return None
        if layers is None:
            self._promote_found(key, found)
        return Hit(found.chunk, found.tier, found.recompute_s, found.blob.nbytes, found.load_s)

    def get(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> KVChunk | None:
        """The chunk alone, read-only, or None; otherwise as `read`."""
        hit = self.read(key, positions, layers=layers, timeout_s=timeout_s)
        return None if hit is None else hit.chunk

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are stored, unexpired, in tiers that answer.

        Reads no chunk: one that is corrupt, or lossy without a certificate, shows itself only to `get`.
        """
        self._expect_open()
        return self._stack.match(keys)

    def __contains__(self, key: ChunkKey) -> bool:
        return self.locate(key) is not None

    def locate(self, key: ChunkKey) -> str | None:
        """Name of the fastest tier that answers and holds the chunk, unexpired."""
        self._expect_open()
        index = self._stack.locate(key)
        return None if index is None else self._books.levels[index].tier.name

    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]:
        """For each leading key that is stored, unexpired, the fastest tier that answers and holds it; as `match`."""
        self._expect_open()
        return self._stack.locate_prefix(keys)

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
        for level in self._books.levels:
            try:
                found |= self._clerk.remove(level, key, "deletions") is not None
            except TierError as exc:
                refusal = exc
        if refusal is not None:
            raise refusal
        return found

    def stats(self) -> StoreStats:
        """Counts since the store was opened."""
        pinned, overdue_pins = self._books.pin_counts()
        lookups, misses = self._reader.counts()
        with self._lock:
            return StoreStats(
                self._books.stats(),
                lookups=lookups,
                misses=misses,
                puts=dict(self._puts),
                writes=self._writes,
                pinned=pinned,
                overdue_pins=overdue_pins,
                background_errors=self._prefetches.failed,
                refused_prefetches=self._prefetches.refused,
                uncertified_uses=self._forms.permits.uncertified_uses,
            )

    def explain(self, keys: Iterable[ChunkKey]) -> list[Explanation]:
        """For each chunk: where it is, what its last lookup gave and cost, why it is not where it was, and what
        computing it took. `str` of each says it in a line. Asks no tier and counts as no lookup; what lies further back
        than some 65,000 chunks is forgotten.
        """
        self._expect_open()
        return [self._books.explain(key) for key in keys]

    def take_placement_changes(self) -> list[PlacementChange]:
        """Chunks that entered or left a tier since the last call, in order, by any process that is followed.

        The first call gives nothing: changes are noted from then on. Whoever makes it goes on calling; what is noted is
        kept until then.
        """
        self._expect_open()
        return self._books.take_placement_changes()

    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread uses the store."""
        self._expect_open()
        return self._clerk.check()

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
            for key in list(self._books.levels[0].keys):
                self._stack.demote(0, key)
        self._clerk.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _count_put(self, outcome: str, writes: int) -> None:
        with self._lock:
            self._puts[outcome] += 1
            self._writes += writes

    def _promote_found(self, key: ChunkKey, found: Found) -> None:
        if not found.place or self._promote == "never":
            return
        if self._promote == "always" or self._stack.reads(self._books.levels[found.place], key) > 1:
            self._stack.promote(key, found.blob)

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError("the store is closed")
