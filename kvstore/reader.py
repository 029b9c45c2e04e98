"""Chunks found in some tier and decoded; hits and misses, counted."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import NamedTuple

from torch import Tensor

from ..core import ChunkKey, EncodedChunk, KVChunk
from ..errors import CodecError
from .encoding.tier_codecs import Forms
from .history import Lookup
from .placement.catalog import Books
from .placement.tier_io import Clerk, Fetch


class Found(NamedTuple):
    """What `Reader.find` found in the tier at this place; `chunk` is None if it was not to be decoded."""

    place: int
    tier: str
    blob: EncodedChunk
    chunk: KVChunk | None
    recompute_s: float | None
    load_s: float


class Reader:
    """Looks for a chunk from the fastest tier on. Every method may be called from any thread."""

    def __init__(self, books: Books, clerk: Clerk, forms: Forms) -> None:
        self._books = books
        self._clerk = clerk
        self._forms = forms
        self._lock = threading.Lock()  # of the counters
        self._lookups = 0
        self._misses: Counter[str] = Counter()

    def find(
        self, key: ChunkKey, fetch: Fetch, positions: Tensor | None, *, is_use: bool = True, decoded: bool = True
    ) -> Found | None:
        """The chunk as it lies in the fastest tier that can give it, and decoded; None for a miss.

        `is_use`: the policies of tiers are told. Unless `decoded`, the chunk is given back as it lies in the tier, by
        whatever codec, and no certificate is needed.
        """
        miss: str | None = "error"
        tier, nbytes, began_s = None, 0, time.perf_counter()
        try:
            found = self._search(key, fetch, positions, is_use=is_use, decoded=decoded)
            if isinstance(found, str):
                miss = found
                return None
            index, blob, chunk, recompute_s = found
            level, nbytes = self._books.levels[index], blob.nbytes
            self._books.count_hit(level, nbytes)
            miss, tier = None, level.tier.name
            return Found(index, tier, blob, chunk, recompute_s, time.perf_counter() - began_s)
        finally:
            load_s = time.perf_counter() - began_s
            with self._lock:
                self._lookups += 1
                if miss is not None:
                    self._misses[miss] += 1
            self._books.history.looked_up(key, Lookup(tier, miss, load_s, nbytes, time.time()))

    def counts(self) -> tuple[int, dict[str, int]]:
        """Lookups so far, and how many of them were misses, by reason."""
        with self._lock:
            return self._lookups, dict(self._misses)

    def _search(
        self, key: ChunkKey, fetch: Fetch, positions: Tensor | None, *, is_use: bool, decoded: bool
    ) -> tuple[int, EncodedChunk, KVChunk | None, float | None] | str:
        """Index of the tier, what it held, that decoded, and what computing it took; or why it is a miss."""
        reason = "absent"
        for index, level in enumerate(self._books.levels):
            blob, fault, recompute_s = self._clerk.fetch(level, key, fetch, is_use=is_use)
            reason = fault or reason
            if blob is None:
                continue
            if not decoded:
                return index, blob, None, recompute_s
            try:
                codec = self._forms.codec_of(blob)
                if not self._forms.permits.may_serve(codec, blob):  # left where it is: a certificate may come
                    reason = "uncertified"
                    continue
                chunk = self._forms.decode(codec, blob, positions)
            except CodecError as exc:
                reason = "undecodable"
                self._clerk.discard(level, key, exc)
                continue
            return index, blob, chunk, recompute_s
        return reason
