"""Chunks on their way between a worker's store and the engine's paged cache. Imports no engine."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from itertools import repeat
from typing import Any

import torch

from ....blend.correction import Correction
from ....core import ChunkKey, KVChunk, KVSpec
from ....errors import KVLoomError
from ....kvstore.placement.catalog import PlacementChange
from ....kvstore.store import Hit, KVStore
from ..controller.decisions import Missing
from ..head_splits import HeadSplit
from ..messages import LOADERS, FoundTiers, Fusion, Load, Loaded, LookUp, OtherKeys, Save
from .arrivals import Arrival, Fetched, RecomputeCost, fits
from .head_reader import HeadReader
from .offers import Offers
from .pending_writes import PagedCache, PendingWrites
from .pieces import CacheGroup, PieceReader, all_keys, find_pieces
from .prober import Prober
from .reading_times import ReadingTimes
from .threads import compute_alone

_WRITERS = 2  # a chunk is written in less time than its neighbours take on another core

_LOG = logging.getLogger("kvloom")


class Transfers:
    """Moves chunks in the background, so that neither direction stalls the engine.

    A load writes into blocks that the scheduler holds for it until it is over, so it needs no copy. A save does not
    hold blocks: the KV is copied out of them within the step that computed it, and stored later. The bytes that wait
    to be stored are limited; chunks beyond that are dropped and counted, as a later request can compute them again.

    Parameters
    ----------
    store : owned, closed by `close`.
    cache : the engine's.
    spec : of this worker.
    rank : its number among those of the engine, in all stages.
    splits : where else its heads may be stored, see `WorkerInfo`.
    chunk_tokens, load_timeout_s, save_pending_bytes : see `ServingSettings`.
    reports_placement : whether `take_placement_changes` is called, for KV events.
    groups : of an engine that has several, or windows; `cache` and `spec` are those of the first.
    saves : whether this worker stores; not if another one has the same and stores it where this one finds it.
    is_foreign : the store held chunks when it was opened, and none of this model.
    correction : of documents that are fused behind others; None for none.
    """

    def __init__(
        self,
        store: KVStore,
        cache: PagedCache,
        spec: KVSpec,
        rank: int,
        *,
        chunk_tokens: int,
        load_timeout_s: float,
        save_pending_bytes: int,
        reports_placement: bool = False,
        splits: Sequence[HeadSplit] = (),
        groups: Sequence[CacheGroup] = (),
        saves: bool = True,
        is_foreign: bool = False,
        correction: Correction | None = None,
    ) -> None:
        self.store = store
        self.reader = HeadReader(store, spec, splits, count=self.count)
        self.offers = Offers(self.reader)
        self._cache = cache
        self._spec = spec
        self.rank = rank
        self._groups = tuple(groups)
        self._saves_here = saves
        self._is_foreign = is_foreign  # and this engine has stored nothing yet
        self._correction = correction
        self._chunk_tokens = chunk_tokens
        self._load_timeout_s = load_timeout_s
        self._save_pending_bytes = save_pending_bytes
        self._loader = ThreadPoolExecutor(LOADERS, "kvloom-load", compute_alone)
        self._writer = ThreadPoolExecutor(_WRITERS, "kvloom-write", compute_alone)
        self._saver = ThreadPoolExecutor(1, "kvloom-save", compute_alone)
        self._times = ReadingTimes()
        self.prober = Prober(self._read, self._times, rank, self.count)
        self._loads: dict[str, tuple[Load, Future[Arrival]]] = {}
        self._fetches: list[Future[Fetched]] = []
        self._cancelled: set[str] = set()  # written by the engine's thread, read by the loaders
        self._given_back: set[str] = set()  # of them, or late: to be computed, and no failure
        self._saves: dict[ChunkKey, tuple[int, Future[None]]] = {}  # with their bytes
        self._lock = threading.Lock()  # of the counts and of the keys below
        self._counts: Counter[str] = Counter()
        self.reports_placement = reports_placement
        self._touched: set[ChunkKey] = set()  # chunks whose placement is reported even if it did not change
        if reports_placement:
            store.take_placement_changes()  # which begins to note them

    def look_up(self, lookup: LookUp) -> FoundTiers:
        """Tiers of the leading chunks that are stored; they are an offer, see `LookUp`."""
        keys, others = lookup.keys[self.rank], lookup.others_of(self.rank)
        found: FoundTiers = ()
        try:
            self.offers.release(lookup.replaces)
            if lookup.is_each:
                each = zip(keys, others or repeat(()), strict=False)
                tiers = (self.reader.locate_prefix([key], [other] if other else []) for key, other in each)
                return tuple(tier[0] if tier else "" for tier in tiers)
            if self._groups:
                found = self.offers.make(
                    lookup.number,
                    all_keys(lookup, self.rank),
                    find=lambda: find_pieces(self.store, lookup, self.rank, self._groups, self._chunk_tokens),
                )
            else:
                found = self.offers.make(lookup.number, keys, others)
                if len(found) < len(others):
                    self.reader.explain_partly_stored(keys[len(found)], others[len(found)])
        except Exception:  # noqa: BLE001 - the engine asks within its own step, which must not end with us
            _LOG.exception("looking up KV of request %s failed; it is computed", lookup.request_id)
            self.count({"errors": 1})
        self.count({"lookups": 1, "lookup_chunks": len(keys), "hit_chunks": len(found)})
        return found

    def why_missing(self, lookup: LookUp) -> Missing | None:
        """Why the first chunk of a look-up is not found; None if that is not known."""
        try:
            (known,) = self.store.explain(lookup.keys[self.rank][:1])
            if known.word == "never stored" and self._is_foreign:
                return "other model"
            return "unavailable" if known.word == "stored" else known.word
        except Exception:  # noqa: BLE001 - as in `look_up`
            _LOG.exception("a look-up of request %s cannot be explained", lookup.request_id)
            return None

    # ------------------------------------------------------------------------------------------------- loading

    @property
    def is_loading(self) -> bool:
        """Whether a load has begun that `arrivals` has not given yet."""
        return bool(self._loads)

    def is_loading_for(self, request_id: str) -> bool:
        """Whether a load of this request has begun that `arrivals` has not given yet."""
        return request_id in self._loads

    def load(self, load: Load) -> None:
        """Begin a load; `arrivals` gives its outcome."""
        begun_s = time.monotonic()
        keys, others = all_keys(load, self.rank), load.others_of(self.rank)
        if not self.offers.take(load.lookup, keys, self._load_timeout_s, others):
            self.count({"errors": 1})
        fetch = self._fetch_pieces if self._groups else self._fetch
        self._loads[load.request_id] = (load, self._loader.submit(fetch, load, begun_s))

    def cancel(self, request_id: str) -> None:
        """End a load at its next chunk; one that has not begun does not begin. `arrivals` gives it all the same."""
        if request_id in self._loads:
            self._cancelled.add(request_id)
            self._loads[request_id][1].cancel()

    def give_back(self, request_id: str) -> None:
        """End a load, as the engine computes faster by now."""
        if request_id in self._loads:
            self._given_back.add(request_id)
            self.cancel(request_id)

    def wait(self, timeout_s: float) -> None:
        """Wait until a load or a fetch is over, at most `timeout_s`.

        For steps in which the engine computes nothing. It would go on to the next step at once and, as Python passes
        its lock on every five milliseconds only, let a thread that loads have one operation in each step: loads of
        milliseconds took seconds.
        """
        self._fetches = [future for future in self._fetches if not future.done()]
        futures: set[Future[Any]] = {*self._fetches, *(future for _, future in self._loads.values())}
        if futures:
            wait(futures, timeout_s, return_when=FIRST_COMPLETED)

    def arrivals(self) -> list[Arrival]:
        """Loads that are over, each once."""
        over = []
        for request_id, (load, future) in list(self._loads.items()):
            if not future.done():
                continue
            del self._loads[request_id]
            self.offers.release(load.lookup)
            error = None if future.cancelled() else future.exception()
            if future.cancelled():
                over.append(self._arrival(load, {}, load.start, 0.0, RecomputeCost(), {}))
            elif error is None:
                over.append(future.result())
            else:
                _LOG.error("loading KV of request %s failed; it is computed", request_id, exc_info=error)
                self.count({"errors": 1, "failed_loads": 1})
                over.append(
                    Arrival(request_id, Loaded({}, True, 0.0), load.blocks_from(load.start, self._cache.block_tokens))
                )
            self._cancelled.discard(request_id)
            self._given_back.discard(request_id)
        return over

    def _fetch(self, load: Load, begun_s: float) -> Arrival:
        """Load all chunks in order, up to the first that is lost."""
        tokens: Counter[str] = Counter()
        cost, done = RecomputeCost(), load.start
        with self._times.watch() as watch:
            with PendingWrites(self._cache, self._writer) as writes:
                for index, (key, other) in enumerate(load.chunks_of(self.rank)):
                    first = load.first + index * self._chunk_tokens
                    start, stop = max(first, load.start), min(first + self._chunk_tokens, load.stop)
                    hit = self._read(load, key, other, begun_s)
                    if hit is None or not fits(hit.chunk, self._spec, self._chunk_tokens, first):
                        watch.lap("" if load.request_id not in self._cancelled else None)
                        break
                    here = slice(start - first, stop - first)
                    writes.add(load.blocks, start, hit.chunk.keys[:, :, here], hit.chunk.values[:, :, here])
                    watch.lap(hit.tier)
                    tokens[hit.tier] += stop - start
                    cost.add(stop - start, len(hit.chunk), hit.recompute_s)
                    done = stop
            watch.lap(watch.last)
        spent_s = time.monotonic() - begun_s
        nbytes = (done - load.start) * self._spec.token_bytes
        self.count({"loads": 1, "load_seconds": spent_s, "loaded_bytes": nbytes})
        self.count({f"loaded_tokens.{name}": n for name, n in tokens.items()})
        return self._arrival(load, dict(tokens), done, spent_s, cost, watch.seconds)

    def _arrival(
        self,
        load: Load,
        tokens: Mapping[str, int],
        done: int,
        spent_s: float,
        cost: RecomputeCost,
        read_s: Mapping[str, float],
    ) -> Arrival:
        """The outcome of a load; `done`: tokens before this one are there."""
        is_lost, request_id = done < load.stop, load.request_id
        if is_lost and request_id not in self._cancelled and request_id not in self._given_back:
            self.count({"failed_loads": 1})
        is_given_back = is_lost and request_id in self._given_back
        if is_given_back:
            self.count({"given_back_loads": 1})
        loaded = Loaded(
            tokens,
            is_lost,
            spent_s,
            0,
            cost.recompute_s,
            cost.unpriced_tokens,
            read_s=read_s,
            given_back=is_given_back,
        )
        bad = frozenset[int]()
        if is_lost and not self._groups:
            bad = load.blocks_from(done, self._cache.block_tokens)
        return Arrival(request_id, loaded, bad)

    def _fetch_pieces(self, load: Load, begun_s: float) -> Arrival:
        """Load the pieces of all groups. Where one is lost, nothing counts as loaded: the request begins anew."""
        tokens: Counter[str] = Counter()
        cost = RecomputeCost(unpriced_tokens=load.skipped)
        nbytes, is_lost = 0, len(load.further) + 1 < len(self._groups)
        with self._times.watch() as watch:
            with ExitStack() as stack:
                for group, part in zip(self._groups, (load, *load.further), strict=False):
                    reader = PieceReader(part, group, self.rank, self._chunk_tokens)
                    writes = stack.enter_context(PendingWrites(group.cache, self._writer))
                    for hit, start, here in reader.hits(lambda key: self._read(load, key, (), begun_s)):
                        keys, values = hit.chunk.keys[:, :, here], hit.chunk.values[:, :, here]
                        writes.add(part.blocks, start, keys, values)
                        watch.lap(hit.tier)
                        nbytes += keys.nbytes + values.nbytes
                        if part is load:
                            tokens[hit.tier] += keys.shape[2]
                            cost.add(keys.shape[2], len(hit.chunk), hit.recompute_s)
                    if reader.done < part.stop:
                        is_lost = True
                        break
            watch.lap(watch.last)
        spent_s = time.monotonic() - begun_s
        self.count({"loads": 1, "load_seconds": spent_s, "loaded_bytes": nbytes})
        if is_lost:
            tokens.clear()
            return self._arrival(load, {}, load.start, spent_s, RecomputeCost(), {})
        self.count({f"loaded_tokens.{name}": n for name, n in tokens.items()})
        return self._arrival(load, dict(tokens), load.stop, spent_s, cost, watch.seconds)

    def _read(self, load: Load, key: ChunkKey, other: OtherKeys, begun_s: float) -> Hit | None:
        """A chunk of a load; None if it is lost, too late, or not wanted any more."""
        hit = None
        until_s = begun_s + self._load_timeout_s
        if load.limit_s is not None:
            until_s = min(until_s, begun_s + load.limit_s)
        if load.request_id not in self._cancelled and (left_s := until_s - time.monotonic()) > 0:
            hit = self.reader.read(key, other, timeout_s=left_s)
        if hit is None and load.limit_s is not None and time.monotonic() >= begun_s + load.limit_s:
            self._given_back.add(load.request_id)
        self._report_placement(key)
        return hit

    # -------------------------------------------------------------------------------------------------- fusing

    def fetch(self, fusion: Fusion) -> Future[Fetched]:
        """Begin to write the stored documents of a fusion into the request's blocks, moved to where they stand now."""
        future = self._loader.submit(self._fetch_documents, fusion, time.monotonic())
        self._fetches.append(future)
        return future

    def _fetch_documents(self, fusion: Fusion, begun_s: float) -> Fetched:
        tokens: Counter[str] = Counter()
        documents: Counter[str] = Counter()
        cost = RecomputeCost()
        found = []
        with self._times.watch() as watch, PendingWrites(self._cache, self._writer) as writes:
            for document in fusion.documents:
                start, stop = max(document.start, fusion.start), min(document.stop, fusion.stop)
                remaining_s = begun_s + self._load_timeout_s - time.monotonic()
                hit = None
                if remaining_s > 0 and start < stop:
                    positions = torch.arange(document.start, document.stop)
                    key, other = document.keys[self.rank], document.others_of(self.rank)
                    hit = self.reader.read(key, other, positions, timeout_s=remaining_s)
                count = document.stop - document.start
                if hit is None or not fits(hit.chunk, self._spec, count, document.start):
                    watch.lap(None)
                    found.append(False)
                    continue
                found.append(True)
                keys, values = hit.chunk.keys, hit.chunk.values
                if self._correction is not None and document.start >= fusion.inexact:
                    keys, values = self._correction.apply(keys, values, positions, torch.arange(count))
                here = slice(start - document.start, stop - document.start)
                writes.add(fusion.blocks, start, keys[:, :, here], values[:, :, here])
                watch.lap(hit.tier)
                tokens[hit.tier] += stop - start
                documents[hit.tier] += 1
                cost.add(stop - start, len(hit.chunk), hit.recompute_s)
        return Fetched(tuple(found), dict(tokens), cost, dict(documents), watch.seconds)

    # -------------------------------------------------------------------------------------------------- saving

    @torch.inference_mode(False)  # the saver's thread has modes of its own
    @torch.no_grad()
    def save(self, save: Save) -> None:
        """Copy the KV out of its blocks now and store it later; nothing if it is stored or about to be."""
        if not self._saves_here:
            return
        self._forget_done_saves()
        key = save.keys[self.rank]
        try:
            is_stored = key in self._saves or key in self.store
        except Exception:  # noqa: BLE001 - as in `look_up`
            _LOG.exception("a chunk of %d tokens is not stored", len(save.token_ids))
            self.count({"errors": 1, "failed_saves": 1})
            return
        if is_stored:
            if key not in self._saves:
                self._report_placement(key)
            return
        count = len(save.token_ids)
        cache, spec = self._cache, self._spec
        if save.group:
            cache, spec = self._groups[save.group].cache, self._groups[save.group].spec
        nbytes = count * spec.token_bytes
        if sum(pending for pending, _ in self._saves.values()) + nbytes > self._save_pending_bytes:
            self.count({"dropped_saves": 1})
            self._report_placement(key)
            return
        offset = save.start % cache.block_tokens
        keys, values = cache.read(save.blocks, offset, offset + count)
        ready = None
        if keys.is_cuda:  # the copy is queued behind the step that computes the KV; not run with CUDA yet
            ready = torch.cuda.Event()
            ready.record()
        positions = torch.arange(save.start, save.start + count)
        chunk = KVChunk(spec, torch.from_numpy(save.token_ids), positions, keys, values)
        after = None if save.after is None else save.after[self.rank]
        put = self._saver.submit(self._put, key, chunk, after, save.recompute_s, ready)
        self._saves[key] = (nbytes, put)

    def drop_pending_saves(self) -> None:
        """Store nothing of what waits to be stored, but for a chunk that is being stored now."""
        dropped = sum(future.cancel() for _, future in self._saves.values())
        if dropped:
            self.count({"dropped_saves": dropped})

    def _put(
        self,
        key: ChunkKey,
        chunk: KVChunk,
        after: ChunkKey | None,
        recompute_s: float | None,
        ready: torch.cuda.Event | None,
    ) -> None:
        if ready is not None:
            ready.synchronize()
        try:
            self.store.put(key, chunk, after=after, recompute_s=recompute_s)
        except KVLoomError as error:
            _LOG.warning("a chunk of %d tokens is not stored: %s", len(chunk), error)
            self.count({"failed_saves": 1})
        else:
            self._is_foreign = False
            if chunk.spec is self._spec:  # and no piece of a chunk beside it
                self.count({"saved_chunks": 1, "saved_tokens": len(chunk)})
        self._report_placement(key)

    def _forget_done_saves(self) -> None:
        for key, (_, future) in list(self._saves.items()):
            if not future.done():
                break  # one thread stores them in this order
            del self._saves[key]
            if not future.cancelled() and (error := future.exception()) is not None:
                _LOG.error("storing a chunk failed", exc_info=error)
                self.count({"errors": 1})

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing waits to be stored; whether that was so in time."""
        return not wait([future for _, future in list(self._saves.values())], timeout_s).not_done

    # ------------------------------------------------------------------------------------------------ counting

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        if not self._counts:  # as in nearly every step
            return {}
        with self._lock:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def take_placement_changes(self) -> list[PlacementChange]:
        """Chunks that entered or left a tier since the last call, and the tiers of chunks that a request used."""
        if not self.reports_placement:
            return []
        with self._lock:
            keys, self._touched = self._touched, set()
        changes = [change._replace(entry=None) for change in self.store.take_placement_changes()]  # unused: sent small
        tiers = ((key, self.store.locate(key)) for key in keys)  # read now: a later change is reported next time
        return changes + [PlacementChange(key, tier or "", is_there=tier is not None) for key, tier in tiers]

    def _report_placement(self, key: ChunkKey) -> None:
        """Report where a chunk is: it may have been stored before changes were noted, or not be stored at all."""
        if self.reports_placement:
            with self._lock:
                self._touched.add(key)

    def count(self, counts: Mapping[str, float]) -> None:
        """Add to what `take_counts` gives. May be called from any thread."""
        with self._lock:
            self._counts.update(counts)

    def drain(self, timeout_s: float) -> bool:
        """Wait until no load or fetch touches the cache; whether that was so in time."""
        futures: list[Future[Any]] = [*self._fetches, *(future for _, future in self._loads.values())]
        return not wait(futures, timeout_s).not_done

    def close(self) -> None:
        """End loads, store what waits to be stored, and close the store."""
        self._cancelled.update(self._loads)
        self._loader.shutdown(wait=True, cancel_futures=True)
        self.prober.close()
        self._writer.shutdown(wait=True)
        self._saver.shutdown(wait=True)
        self._forget_done_saves()
        self.offers.close()
        self.store.close()
