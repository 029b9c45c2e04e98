"""KVStore: chunks in, chunks out, at any position; the border where faults below become misses above.

The way of a chunk: `put` encodes it and gives it to `Placement`, which makes space in each tier and has its `TierIO`
write it. `read` asks the `TierIO` of each tier, fastest first, decodes what comes, and has `Placement` promote it. A
`TierIO` calls its tier, through a `GuardedTier` if that may stall, and keeps the `Catalog` in step.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from types import MappingProxyType
from typing import Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import torch
from torch import Tensor

from ..calibration.certificate import Certificate
from ..calibration.certificate_gate import CertificateGate
from ..compress.raw import RawCodec
from ..core import NOTHING, ChunkInfo, ChunkKey, Codec, EncodedChunk, KVChunk, KVSpec, Tier
from ..errors import CodecError, SpecMismatchError, TierError, TierUnavailableError
from .capabilities import MayStall
from .encoding.tier_codecs import TierCodecs
from .eviction.policy import EvictionPolicy, policy_factory
from .guard.deadline import Deadline, check_timeout
from .guard.guarded_tier import GuardedTier
from .history import Explanation
from .keys import check_key
from .placement.catalog import Catalog, PlacementChange
from .placement.placement import Placement
from .placement.prefetch import Prefetch, PrefetchQueue
from .placement.quota import Quota, check_namespace, check_quotas
from .placement.tier_io import TierIO
from .stats import StoreStats

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

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


def _recovering(method: Callable[Concatenate[KVStore, P], R]) -> Callable[Concatenate[KVStore, P], R]:
    """Makes a public method of `KVStore` one that may be interrupted: an exception may come at any bytecode."""

    @wraps(method)
    def call(store: KVStore, /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(store, *args, **kwargs)
        except BaseException:
            store._recover()  # noqa: SLF001
            raise

    return call


class KVStore:
    """Keeps chunks in tiers and finds them again.

    `put` writes every tier, so that a killed process loses nothing of what `put` has returned for, as far as a tier
    that survives it took the chunk. A chunk found in a slower tier is promoted to the first. A tier that is full gives
    up expired chunks first, then the chunk that its policy names among those that are not pinned and not another
    namespace's reserve; the victim is demoted to the next tier that takes it, unless a slower one has it. Corrupt
    chunks and failing tiers are misses, counted by `stats` and logged. A tier that other processes write to, too, is
    followed: what they put is found.

    Every method may be called from any thread; encoding, decoding and I/O run outside the locks of the store. An
    exception that interrupts a call (Ctrl-C) leaves the store usable: what the call was writing or removing is gone or
    is removed by the next call, no pin and no lock stays behind, and an interrupted `close` is repeated by another.

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
    policy : what goes when a tier is full: a name from `policy.POLICIES`, or what makes an `EvictionPolicy`. Each tier
        gets one of its own, and one more for every namespace with a quota.
    quotas : by namespace. Namespaces without one share what is left, as one.
    timeout_s : longest time that a call waits for one operation of a tier that may stall (`MayStall`: disks, networks).
        Past it a chunk is a miss, and is not written; a tier that goes on like this is left alone for a while, and what
        it holds is not found meanwhile. Not of this constructor, nor of tiers in memory. None: as long as it takes.
    clock : Unix time in seconds; what expiry and the deadlines of pins go by.
    monotonic : seconds; what timeouts and pauses go by.

    Attributes
    ----------
    tiers : fastest first; one that may stall within its `GuardedTier`.

    Raises
    ------
    ValueError : no tiers, or two of one name; codecs for tiers that are not there; no policy of that name; reserves
        above 1; `timeout_s` is not above 0.
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
        policy: str | Callable[[], EvictionPolicy] = "default",
        quotas: Mapping[str, Quota] = _NO_QUOTAS,
        timeout_s: float | None = 10.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if isinstance(tiers, Tier):
            raise ValueError(f"tiers is one tier, {tiers.name!r}; expected a list of tiers")
        names = [tier.name for tier in tiers]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"tiers are {names}; expected at least one, with different names")
        check_quotas(quotas)
        if unknown := tier_codecs.keys() - set(names):
            raise ValueError(f"tier_codecs are for {sorted(unknown)}; the tiers are {names}")
        if timeout_s is not None and not (
            isinstance(timeout_s, (int, float)) and 0 < timeout_s < threading.TIMEOUT_MAX
        ):
            raise ValueError(f"timeout_s is {timeout_s!r}; expected seconds above 0, or None")
        self._timeout_s = timeout_s
        self._clock = clock
        deadline = Deadline(monotonic)
        self.tiers = tuple(
            GuardedTier(tier, timeout_s, deadline=deadline, clock=monotonic)
            if timeout_s is not None and isinstance(tier, MayStall) and tier.may_stall
            else tier
            for tier in tiers
        )
        self._catalog = Catalog(self.tiers, make_policy=policy_factory(policy), quotas=quotas, clock=clock)
        self._tier_ios = [
            TierIO(index, tier, self._catalog, deadline, monotonic) for index, tier in enumerate(self.tiers)
        ]
        codec = RawCodec() if codec is None else codec
        self._codecs = TierCodecs(
            [tier_codecs.get(name, codec) for name in names],
            (RawCodec(), *codecs, codec),
            CertificateGate(certificates, allow_uncertified=allow_uncertified),
        )
        self._placement = Placement(self._catalog, self._tier_ios, self._codecs, deadline)
        self._finds = any(tier.finder is not None for tier in self._tier_ios)
        self._prefetches = PrefetchQueue(self._placement, clock=monotonic)
        self._closed = False
        self._closed_tiers: set[str] = set()

    @_recovering
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

        A tier that cannot take the chunk is passed over and counted, as long as another takes it. A chunk put again
        belongs to the namespace, and expires at the time, of the last put.

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
        _check_seconds(ttl_s, "ttl_s", least_s=None)
        _check_seconds(recompute_s, "recompute_s", least_s=0.0)
        if not isinstance(chunk, KVChunk):
            raise ValueError(f"chunk is {type(chunk).__name__}; expected a KVChunk")
        if len(chunk.keys) != chunk.spec.num_layers:
            raise SpecMismatchError(f"chunk has {len(chunk.keys)} layers; expected all {chunk.spec.num_layers}")
        expires_at_s = None if ttl_s is None else self._clock() + ttl_s
        info = ChunkInfo(after, namespace, expires_at_s, recompute_s)

        def encode() -> Sequence[EncodedChunk]:
            self._codecs.check_certificates(chunk.spec)
            return self._codecs.encode(chunk)

        self._put(key, encode, info)

    @_recovering
    def put_encoded(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> None:
        """Store a chunk that is encoded already, by a codec that need not be known here.

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
        self._put(key, lambda: [self._placement.transcode(tier, blob) for tier in self._tier_ios], info)

    def _put(self, key: ChunkKey, encode: Callable[[], Sequence[EncodedChunk]], info: ChunkInfo) -> None:
        try:
            writes = self._placement.put(key, encode(), info)
        except BaseException:
            self._catalog.record_put("refused", 0)
            raise
        self._catalog.record_put("stored", writes)

    def check_certificates(self, spec: KVSpec) -> None:
        """Refuse at once what `put` would refuse of every chunk of this model.

        Raises
        ------
        UncertifiedError : a tier's codec is lossy, and no certificate covers it.
        """
        self._codecs.check_certificates(spec)

    @_recovering
    def read(
        self,
        key: ChunkKey,
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
        keeps_undecodable: bool = False,
    ) -> Hit | None:
        """The chunk, where it came from and what it costs; None for a miss.

        A chunk that was found in a slower tier is copied to the first.

        Parameters
        ----------
        positions : `[T]` int64, where to place the chunk; None where it was computed.
        layers : (start, stop) to read these layers alone, which promotes nothing. A chunk that is read layer by layer
            counts as used once, with its first layer. None for the whole chunk.
        timeout_s : how long this call waits for tiers in all, if less than the store's `timeout_s` for each.
        keeps_undecodable : a chunk of which this store's codecs make nothing stays where it is: it is another's, who
            has its codec. Damaged bytes are removed all the same.

        Raises
        ------
        ValueError : `key` is no key, `layers` are no range, the chunk has no such layers, `positions` are no row of
            int64, or `timeout_s` is negative.
        """
        self._expect_open()
        if not isinstance(key, bytes):
            check_key(key, "key")
        if layers is not None:
            _check_layers(layers)
        if positions is not None:
            _check_positions(positions)

        def decode(blob: EncodedChunk) -> KVChunk | None:
            return self._codecs.decode(blob, positions)

        if timeout_s is None:
            found = self._find(key, layers, decode, keeps_undecodable)
        else:
            check_timeout(timeout_s)
            with self._placement.deadline.within(timeout_s):
                found = self._find(key, layers, decode, keeps_undecodable)
        return None if found is None else Hit(*found)

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

    @_recovering
    def get_encoded(self, key: ChunkKey) -> EncodedChunk | None:
        """The chunk as a tier holds it, read-only and not decoded, or None; otherwise as `get`."""
        self._expect_open()
        found = self._find(key, None, lambda blob: blob)
        return None if found is None else found[0]

    @_recovering
    def get_at_hand(self, key: ChunkKey) -> EncodedChunk | None:
        """As `get_encoded`, for a chunk that lies in a first tier that cannot stall; None for others, and no miss.

        For a caller that must not wait for a disk or a network, such as an event loop.
        """
        self._expect_open()
        first = self._tier_ios[0]
        if isinstance(first.tier, GuardedTier) or self._catalog.locate([key]) != [first.state]:
            return None
        return self.get_encoded(key)

    def match(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading keys are stored, unexpired, in tiers that answer.

        Reads no chunk: one that is corrupt, or lossy without a certificate, shows itself only to `read`.
        """
        try:  # as `_recovering` does, without another call: a look-up takes few microseconds
            if self._closed:
                self._expect_open()
            if isinstance(keys, (bytes, str)) or keys is None:
                _check_keys(keys)
            for tier in self._tier_ios:
                if tier.may_have_changes:
                    tier.follow_changes()
            count = self._catalog.match(keys)
            if self._finds and count < len(keys):
                self._placement.look_for_prefix(keys, count)
                count = self._catalog.match(keys)
            return count
        except BaseException:
            self._recover()
            raise

    @_recovering
    def locate_prefix(self, keys: Sequence[ChunkKey]) -> tuple[str, ...]:
        """For each leading key that is stored, unexpired, the fastest tier that answers and holds it; as `match`."""
        self._expect_open()
        _check_keys(keys)
        self._placement.follow_changes()
        if self._finds:
            self._placement.look_for_prefix(keys, self._catalog.match(keys))
        return tuple(state.tier.name for state in self._catalog.locate(keys))

    @_recovering
    def locate_each(self, keys: Sequence[ChunkKey]) -> tuple[str | None, ...]:
        """For every key, as `locate_prefix` for one; None for a key that is not stored."""
        self._expect_open()
        _check_keys(keys)
        self._placement.follow_changes()
        if self._finds:
            self._placement.look_for_prefix(keys, self._catalog.match(keys))
        found: list[str | None] = []
        while len(found) < len(keys):
            tiers = self._catalog.locate(keys[len(found) :])
            found += [state.tier.name for state in tiers]
            if len(found) < len(keys):
                found.append(None)
        return tuple(found)

    @_recovering
    def locate_at_hand(self, keys: Sequence[ChunkKey]) -> tuple[str, ...] | None:
        """As `locate_prefix`; None if what other processes have done would have to be read before."""
        self._expect_open()
        _check_keys(keys)
        if any(tier.has_changes() for tier in self._tier_ios):
            return None
        return tuple(state.tier.name for state in self._catalog.locate(keys))

    def locate(self, key: ChunkKey) -> str | None:
        """Name of the fastest tier that answers and holds the chunk, unexpired."""
        return next(iter(self.locate_prefix([key])), None)

    def __contains__(self, key: ChunkKey) -> bool:
        return bool(self.locate_prefix([key]))

    @_recovering
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
        _check_keys(keys)
        _check_seconds(deadline_s, "deadline_s", least_s=None)
        return self._catalog.pinned(keys, deadline_s)

    @_recovering
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
        _check_keys(keys)
        return self._prefetches.add(list(keys), deadline_s)

    @_recovering
    def delete(self, key: ChunkKey) -> bool:
        """Removes the chunk from every tier, pinned or not; whether it was in any.

        Raises
        ------
        ValueError : `key` is no key.
        TierUnavailableError : a tier may still hold it.
        """
        self._expect_open()
        check_key(key, "key")
        self._placement.follow_changes()  # another process may have put it
        if self._finds and not self._catalog.locate([key]):
            self._placement.look_for([key])
        found, refusal = False, None
        for tier in self._tier_ios:
            try:
                found |= tier.remove(key, "deletions") is not None
            except TierError as exc:
                refusal = exc
        if refusal is not None:
            raise refusal
        return found

    @_recovering
    def stats(self) -> StoreStats:
        """Counts since the store was opened."""
        pinned, overdue_pins = self._catalog.pin_counts()
        tiers, misses, puts, writes = self._catalog.stats()
        return StoreStats(
            tiers,
            lookups=sum(tier.hits for tier in tiers) + sum(misses.values()),
            misses=misses,
            puts=puts,
            writes=writes,
            pinned=pinned,
            overdue_pins=overdue_pins,
            background_errors=self._prefetches.failed,
            refused_prefetches=self._prefetches.refused,
            uncertified_uses=self._codecs.gate.uncertified_uses,
        )

    @_recovering
    def explain(self, keys: Iterable[ChunkKey]) -> list[Explanation]:
        """For each chunk: where it is, what its last lookup gave and cost, why it is not where it was, and what
        computing it took. `str` of each says it in a line. Asks no tier and counts as no lookup; what lies further back
        than some 65,000 chunks is forgotten.
        """
        self._expect_open()
        _check_keys(keys)
        return [self._catalog.explain(key) for key in keys]

    @_recovering
    def take_placement_changes(self) -> list[PlacementChange]:
        """Chunks that entered or left a tier since the last call, in order, by any process that is followed.

        The first call gives nothing: changes are noted from then on, and kept until the next call.
        """
        self._expect_open()
        return self._catalog.take_changes()

    @_recovering
    def check(self) -> list[str]:
        """What is inconsistent, in words; empty if all is well. For a moment when no other thread uses the store."""
        self._expect_open()
        return [problem for tier in self._tier_ios for problem in tier.check()] + self._catalog.check()

    @_recovering
    def close(self) -> None:
        """Cancel prefetches and close the tiers. Repeat it if it was interrupted.

        A tier that does not answer is waited for no longer than `timeout_s` at a time, and closed when it does answer.
        """
        self._closed = True
        self._prefetches.close(self._timeout_s)
        error: Exception | None = None
        for tier in reversed(self._tier_ios):
            if tier.tier.name not in self._closed_tiers:
                try:
                    tier.close()
                except Exception as exc:  # noqa: BLE001  raised when the others are closed
                    error = exc
                self._closed_tiers.add(tier.tier.name)
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _find(
        self,
        key: ChunkKey,
        layers: tuple[int, int] | None,
        decode: Callable[[EncodedChunk], T | None],
        keeps_undecodable: bool = False,
    ) -> tuple[T, str, float | None, int, float] | None:
        """What `decode` makes of the chunk in the fastest tier that can give it, and the other fields of a `Hit`.

        Counts a hit or a miss, and promotes a whole chunk.
        """
        began_s = time.perf_counter()
        try:
            found = self._search(key, layers, decode, keeps_undecodable)
        except BaseException:
            self._catalog.record_miss(key, "error", time.perf_counter() - began_s)
            raise
        load_s = time.perf_counter() - began_s
        if isinstance(found, str):
            check_key(key, "key")  # a key of another length; what is found needs no check
            self._catalog.record_miss(key, found, load_s)
            return None
        tier, blob, decoded, recompute_s = found
        nbytes = blob.nbytes
        self._catalog.record_hit(tier.state, key, nbytes, load_s)
        if tier.index and layers is None:
            self._placement.promote(key, blob)
        return decoded, tier.tier.name, recompute_s, nbytes, load_s

    def _search(
        self,
        key: ChunkKey,
        layers: tuple[int, int] | None,
        decode: Callable[[EncodedChunk], T | None],
        keeps_undecodable: bool,
    ) -> tuple[TierIO, EncodedChunk, T, float | None] | str:
        """The tier, what it holds, that decoded, and what computing it took; or why it is a miss."""
        reason = "absent"
        is_use = layers is None or layers[0] == 0
        for tier in self._tier_ios:
            blob, fault, recompute_s = tier.read(key, layers, is_use=is_use)
            reason = fault or reason
            if blob is None:
                continue
            try:
                decoded = decode(blob)
            except CodecError as exc:
                reason = "undecodable"
                if keeps_undecodable:
                    tier.warn(exc)
                else:
                    tier.discard(key, exc)
                continue
            if decoded is not None:
                return tier, blob, decoded, recompute_s
            reason = "uncertified"  # it is left where it is: a certificate may come
        return reason

    def _recover(self) -> None:
        """The calling thread leaves by an exception: what it held or had begun is set right."""
        self._placement.recover()
        self._prefetches.recover()

    def _expect_open(self) -> None:
        if self._closed:
            raise TierUnavailableError("the store is closed")


def _check_keys(keys: object) -> None:
    if isinstance(keys, (bytes, str)) or keys is None:
        raise ValueError(f"keys is {keys!r:.80}; expected a list of keys made by prefix_keys or content_key")


def _check_layers(layers: object) -> None:
    is_pair = isinstance(layers, tuple) and len(layers) == 2 and all(isinstance(layer, int) for layer in layers)
    if not is_pair or not 0 <= layers[0] < layers[1]:  # type: ignore[index]
        raise ValueError(f"layers are {layers!r}; expected (start, stop) with 0 <= start < stop")


def _check_positions(positions: object) -> None:
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64 or positions.ndim != 1:
        kind = f"{positions.dtype} {list(positions.shape)}" if isinstance(positions, Tensor) else repr(positions)[:80]
        raise ValueError(f"positions are {kind}; expected a tensor [T] of int64")


def _check_seconds(value: object, name: str, *, least_s: float | None) -> None:
    """`least_s`: the least allowed value; None for anything above 0."""
    if value is None:
        return
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    if not is_number or not (value > 0 if least_s is None else value >= least_s):  # type: ignore[operator]
        expected = "above 0" if least_s is None else f"from {least_s:g}"
        raise ValueError(f"{name} is {value!r}; expected a finite number {expected}, or None")
