"""Pages of SGLang in a `KVStore`, by their hashes. Imports no engine; never raises what a store may raise."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from itertools import repeat
from typing import NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from ...core import ChunkKey, KVChunk, KVSpec
from ...kvstore.keys import page_keys
from ...kvstore.store import KVStore
from ..identity.requests import chunk_salt
from ..serving.engine_calls import EngineCalls
from ..serving.head_splits import HeadSplit
from ..serving.messages import OtherKeys
from ..serving.worker.arrivals import UNKNOWN, fits
from ..serving.worker.head_reader import HeadReader
from ..serving.worker.offers import OFFER_S
from ..serving.worker.threads import compute_alone
from .load_choice import LoadChoice

Page: TypeAlias = "tuple[Tensor, Tensor]"
"""Keys `[L, H, T, D]` and values `[L, H, T, Dv]` in host memory of the engine."""

T = TypeVar("T")
F = TypeVar("F")

_LOG = logging.getLogger("kvloom")
_KEPT_TRANSFERS = 1000


class Transfer(NamedTuple):
    """A batch that was loaded or saved: its pages, and their speed in GB/s."""

    pages: int
    gb_s: float


class PageStore(EngineCalls):
    """What a rank's engine stores and finds, a page at a time. Every method may be called from any thread.

    A fault is logged, counted and a miss: SGLang's threads call this, and must not end with us.

    Parameters
    ----------
    store : owned, closed by `close`.
    spec : of the pages.
    page_tokens : tokens of a page.
    salt : the tenant's secret.
    load_timeout_s : longest time that a batch of pages may take; later ones are misses.
    splits : where else the rank's heads may be stored, see `WorkerInfo`.
    choice : decides how many of the pages found are loaded; None for all.
    is_lossy : some tier's codec loses something. Such codecs undo the rotation of keys, so that pages whose position
        SGLang does not tell are not stored.
    """

    def __init__(
        self,
        store: KVStore,
        spec: KVSpec,
        *,
        page_tokens: int,
        salt: str,
        load_timeout_s: float,
        is_lossy: bool,
        splits: Sequence[HeadSplit] = (),
        choice: LoadChoice | None = None,
    ) -> None:
        super().__init__("SGLang")
        self.choice = choice
        self.store = store
        self.spec = spec
        self._splits = tuple(splits)
        self._reader = HeadReader(store, spec, splits, count=self.count)
        self._page_tokens = page_tokens
        self._tenant = salt.encode()
        self._epoch = b""
        self._load_timeout_s = load_timeout_s
        self._is_lossy = is_lossy
        # By the last key of what they pin, oldest first, with when they were made.
        self._pins: dict[ChunkKey, tuple[float, AbstractContextManager[None]]] = {}
        self._lock = threading.Lock()  # of pins
        self._thread = threading.local()
        self._loads: deque[Transfer] = deque(maxlen=_KEPT_TRANSFERS)
        self._saves: deque[Transfer] = deque(maxlen=_KEPT_TRANSFERS)

    def renew(self) -> None:
        """From now on nothing is found that was stored before, and no other process finds what this one stores."""
        self._epoch = secrets.token_bytes(16)
        self.count({"renewals": 1})

    def keys(self, hashes: Sequence[str]) -> list[ChunkKey]:
        """Keys of pages, by SGLang's hashes of them (64 hexadecimal digits)."""
        return self._keys_of(self.spec, hashes)

    def others(self, hashes: Sequence[str]) -> list[OtherKeys]:
        """Their keys in other tensor-parallel sizes; empty if these are not looked for."""
        rows = [[self._keys_of(part.spec, hashes) for part in split] for split in self._splits]
        return [tuple(tuple(keys[page] for keys in row) for row in rows) for page in range(len(hashes))] if rows else []

    def _keys_of(self, spec: KVSpec, hashes: Sequence[str]) -> list[ChunkKey]:
        salt = chunk_salt(tenant=self._tenant, epoch=self._epoch)
        return page_keys(spec, list(map(bytes.fromhex, hashes)), chunk_tokens=self._page_tokens, salt=salt)

    def find(self, hashes: Sequence[str], before: Sequence[str] | None = None, *, decides: bool = True) -> int:
        """How many leading pages are stored, and to be loaded. They stay pinned until they are read, but not for long.

        Parameters
        ----------
        before : as for `write`. None counts as none: SGLang passes that on where there are none, too.
        decides : whether `choice` is asked; otherwise all that is stored is to be loaded.
        """

        def look_up() -> int:
            keys, others = self.keys(hashes), self.others(hashes)
            tiers = self._reader.locate_prefix(keys, others) if others else self.store.locate_prefix(keys)
            found = len(tiers)
            if found < len(others):
                self._reader.explain_partly_stored(keys[found], others[found])
            self.count({"lookups": 1, "lookup_pages": len(keys), "hit_pages": found})
            if found and self.choice is not None and decides:
                decision = self.choice.decide(tiers, len(before or ()), len(keys))
                self.count({f"decisions.{decision.reason}": 1, "left_pages": found - decision.chunks})
                if decision.chunks < found:
                    page = decision.chunks
                    self._probe(self.choice, tiers[page], keys[page], others[page] if others else ())
                found = decision.chunks
            if found:
                pin = self._reader.pinned(keys[:found], others[:found], deadline_s=OFFER_S)
                pin.__enter__()
                self._pin_instead(keys[found - 1], pin)
            return found

        return self.guarded("a look-up", look_up, 0)

    def _probe(self, choice: LoadChoice, tier: str, key: ChunkKey, other: OtherKeys) -> None:
        """Read a page of a tier that is left alone, if that was not done for long: it may have become faster."""
        if choice.is_probe_due(tier):
            begun_s = time.monotonic()
            hit = self._reader.read(key, other, timeout_s=self._load_timeout_s)
            name = tier if hit is None else hit.tier
            choice.observe_pages({name: 1}, {name: time.monotonic() - begun_s})

    def read(self, hashes: Sequence[str], pages: Sequence[Page]) -> int:
        """Copy stored pages into host memory, up to the first that is lost; how many."""
        done = 0

        def load() -> int:
            nonlocal done
            begun_s = lap_s = time.monotonic()
            tiers, read_s = Counter[str](), dict[str, float]()
            keys = self.keys(hashes)
            others: Iterable[OtherKeys] = self.others(hashes) or repeat((), len(keys))
            for key, other, (into_keys, into_values) in zip(keys, others, pages, strict=True):
                remaining_s = begun_s + self._load_timeout_s - time.monotonic()
                hit = self._reader.read(key, other, timeout_s=remaining_s) if remaining_s > 0 else None
                if hit is None or not fits(hit.chunk, self.spec, self._page_tokens):
                    break
                into_keys.copy_(hit.chunk.keys)
                into_values.copy_(hit.chunk.values)
                tiers[hit.tier] += 1
                now_s = time.monotonic()
                read_s[hit.tier] = read_s.get(hit.tier, 0.0) + now_s - lap_s
                lap_s = now_s
                done += 1
            self._release(keys)
            self.count({f"loaded_pages.{tier}": count for tier, count in tiers.items()})
            if self.choice is not None:
                self.choice.observe_pages(tiers, read_s)
            spent_s = time.monotonic() - begun_s
            self._loads.append(self._transfer(done, spent_s))
            self.count({"loads": 1, "load_seconds": spent_s, "lost_pages": len(keys) - done})
            return done

        self.guarded("a load", load, 0)
        return done

    def write(self, hashes: Sequence[str], pages: Sequence[Page], before: Sequence[str] | None) -> bool:
        """Store pages; whether all of them are stored then.

        Parameters
        ----------
        before : hashes of the pages in front of these from the beginning of the request; None if SGLang does not say.
        """
        if before is None and self._is_lossy:
            self.count({"failed_saves": 1})
            self._warn_once(
                "a lossy codec must know where a page stands: nothing is stored; give SGLang interface_v1: 1 and "
                "hicache_storage_pass_prefix_keys: true in its extra config"
            )
            return False

        def save() -> bool:
            begun_s, written = time.monotonic(), 0
            keys = self.keys(hashes)
            parent = self.keys(before[-1:])[0] if before else None
            start = None if before is None else len(before) * self._page_tokens
            for i, (key, (keys_of_page, values)) in enumerate(zip(keys, pages, strict=True)):
                if key not in self.store:
                    positions = torch.full((self._page_tokens,), UNKNOWN)
                    if start is not None:
                        first = start + i * self._page_tokens
                        positions = torch.arange(first, first + self._page_tokens)
                    token_ids = torch.full((self._page_tokens,), UNKNOWN)
                    self.store.put(key, KVChunk(self.spec, token_ids, positions, keys_of_page, values), after=parent)
                    self.count({"saved_pages": 1})
                    written += 1
                parent = key
            self._saves.append(self._transfer(written, time.monotonic() - begun_s))
            return True

        is_saved = self.guarded("a save", save, False)
        self.count({} if is_saved else {"failed_saves": 1})
        return is_saved

    def take_transfers(self) -> tuple[list[Transfer], list[Transfer]]:
        """Loads and saves that moved pages since the last call, the last thousand of each."""
        loads, saves = ([queue.popleft() for _ in range(len(queue))] for queue in (self._loads, self._saves))
        return [each for each in loads if each.pages], [each for each in saves if each.pages]

    def guarded(self, what: str, work: Callable[[], T], failed: F) -> T | F:
        """As `EngineCalls.guarded`; our computing in the engine's threads takes no other processor."""
        if not hasattr(self._thread, "is_alone"):
            self._thread.is_alone = True
            compute_alone()
        return super().guarded(what, work, failed)

    def close(self) -> None:
        """End all pins and close the store."""
        self._release(list(self._pins))
        self.store.close()

    def _transfer(self, pages: int, spent_s: float) -> Transfer:
        return Transfer(pages, pages * self._page_tokens * self.spec.token_bytes / max(spent_s, 1e-9) / 1e9)

    def _warn_once(self, text: str) -> None:
        if not self.counts().get("warnings"):
            self.count({"warnings": 1})
            _LOG.warning(text)

    def _pin_instead(self, last: ChunkKey, pin: AbstractContextManager[None]) -> None:
        """Hold a pin, and forget those that have ended by themselves, as nothing was read."""
        now_s = time.monotonic()
        overdue = [key for key, (made_s, _) in list(self._pins.items()) if made_s < now_s - OFFER_S]
        self._release([*overdue, last])
        with self._lock:
            self._pins[last] = now_s, pin

    def _release(self, keys: Sequence[ChunkKey]) -> None:
        """End the pins that end with one of these keys."""
        with self._lock:
            ended = [self._pins.pop(key) for key in keys if key in self._pins]
        for _, pin in ended:
            pin.__exit__(None, None, None)
