"""Reads a rank's chunks from the store: its own, or joined of what engines of other sizes have stored. No engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ....core import ChunkKey, KVChunk, KVSpec
from ....kvstore.store import Hit, KVStore
from ..head_splits import HeadSplit
from ..messages import FoundTiers, OtherKeys
from .arrivals import UNKNOWN

_LOG = logging.getLogger("kvloom")
_LOG_INTERVAL_S = 60.0


class HeadReader:
    """What a rank reads of a store. Every method may be called from any thread.

    A rank's own chunk comes first. Where it is not stored, the chunks of another size are read that hold its heads; all
    of them, or it is a miss. A size whose chunks this store cannot decode, or for whose loss it has no certificate, is
    left alone from then on, and the log says why: chunks of others are never removed for that.

    Parameters
    ----------
    store : not owned.
    spec : of the rank.
    splits : other sizes, in the order of preference; empty to read the rank's own chunks only, at no further cost.
    count : adds to the worker's counts: `joined_chunks`.
    clock : monotonic seconds.
    """

    def __init__(
        self,
        store: KVStore,
        spec: KVSpec,
        splits: Sequence[HeadSplit] = (),
        *,
        count: Callable[[Mapping[str, float]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._spec = spec
        self._splits = tuple(splits)
        self._count = count
        self._clock = clock
        self._slowness = {tier.name: index for index, tier in enumerate(store.tiers)}
        self._refused: set[int] = set()  # numbers of splits that cannot be read here
        self._logged_s = -_LOG_INTERVAL_S

    def locate_prefix(self, keys: Sequence[ChunkKey], others: Sequence[OtherKeys] = ()) -> FoundTiers:
        """Tiers of the leading chunks that can be read; of a joined one, the slowest tier among its parts.

        Parameters
        ----------
        others : keys of each chunk in other sizes; empty to look for none.
        """
        tiers = self._store.locate_prefix(keys)
        while others and len(tiers) < len(keys):
            found = self._locate_joined(others[len(tiers) :])
            if not found:
                break
            tiers += found
            tiers += self._store.locate_prefix(keys[len(tiers) :])
        return tiers

    def _locate_joined(self, others: Sequence[OtherKeys]) -> FoundTiers:
        """As `locate_prefix`, from the one size that has most of these chunks."""
        best: FoundTiers = ()
        for number, split in self._usable():
            found: FoundTiers | None = None
            for part in range(len(split)):
                wanted = others if found is None else others[: len(found)]
                tiers = self._store.locate_prefix([each[number][part] for each in wanted])
                pairs = zip(tiers if found is None else found, tiers, strict=False)
                found = tuple(max(pair, key=self._slowness.__getitem__) for pair in pairs)
                if not found:
                    break
            best = max(best, found or (), key=len)
        return best

    def read(
        self,
        key: ChunkKey,
        other: OtherKeys = (),
        positions: Tensor | None = None,
        *,
        layers: tuple[int, int] | None = None,
        timeout_s: float | None = None,
    ) -> Hit | None:
        """As `KVStore.read`, of the rank's own chunk or of a joined one; `other`: its keys in other sizes.

        Of a joined chunk, `tier` is the slowest of its parts, `recompute_s` the longest, `nbytes` the sum: a part
        is read whole, also where the rank needs few of its heads.
        """
        if not other:
            return self._store.read(key, positions, layers=layers, timeout_s=timeout_s)
        until_s = None if timeout_s is None else self._clock() + timeout_s
        is_asked = key in self._store
        hit = self._store.read(key, positions, layers=layers, timeout_s=timeout_s) if is_asked else None
        for number, split in self._usable():
            if hit is None and self._has_all(other[number]):
                hit = self._join(number, split, other[number], positions, layers, until_s)
        if hit is None and not is_asked:
            return self._store.read(key, positions, layers=layers, timeout_s=self._left_s(until_s))  # counts the miss
        return hit

    def _join(
        self,
        number: int,
        split: HeadSplit,
        keys: Sequence[ChunkKey],
        positions: Tensor | None,
        layers: tuple[int, int] | None,
        until_s: float | None,
    ) -> Hit | None:
        """A chunk of another size's parts; None unless every part is there."""
        hits = []
        for key in keys:
            left_s = self._left_s(until_s)
            hit = self._store.read(key, positions, layers=layers, timeout_s=left_s, keeps_undecodable=True)
            if hit is None:
                self._refuse_unreadable(number, key)
                return None
            hits.append(hit)
        chunk = joined(self._spec, split, [hit.chunk for hit in hits])
        if chunk is None:
            return None
        if layers is None or layers[0] == 0:
            self._count({"joined_chunks": 1})
        costs = [hit.recompute_s for hit in hits if hit.recompute_s is not None]
        return Hit(
            chunk,
            max((hit.tier for hit in hits), key=self._slowness.__getitem__),
            max(costs) if len(costs) == len(hits) else None,
            sum(hit.nbytes for hit in hits),
            sum(hit.load_s for hit in hits),
        )

    def pinned(
        self, keys: Sequence[ChunkKey], others: Sequence[OtherKeys] = (), *, deadline_s: float
    ) -> AbstractContextManager[None]:
        """As `KVStore.pinned`, of these chunks in every size."""
        parts = [key for chunk in others for split in chunk for key in split]
        return self._store.pinned([*keys, *parts], deadline_s=deadline_s)

    def prefetch(self, keys: Sequence[ChunkKey], others: Sequence[OtherKeys] = ()) -> None:
        """Promote these chunks, or the parts that stand for them, in the background."""
        if others:
            keys = [stored for pair in zip(keys, others, strict=True) for stored in self._stored(*pair)]
        self._store.prefetch(keys)

    def _stored(self, key: ChunkKey, other: OtherKeys) -> Sequence[ChunkKey]:
        """The keys that `read` would read."""
        if key in self._store:
            return [key]
        return next((other[number] for number, _ in self._usable() if self._has_all(other[number])), ())

    def explain(self, key: ChunkKey, other: OtherKeys = ()) -> list[str]:
        """Why a chunk can be read, or not: a line for the rank's own, and one for each part of another size."""
        lines = [f"this rank's own {self._store.explain([key])[0]}"]
        for number, (split, keys) in enumerate(zip(self._splits, other, strict=True)):
            for part, explanation in zip(split, self._store.explain(keys), strict=True):
                rank, size = part.spec.shard
                heads = f"heads {part.start} to {part.stop - 1} of its {part.spec.num_kv_heads}"
                refused = "not used, see the warning before; " if number in self._refused else ""
                lines.append(f"tensor-parallel size {size}, rank {rank}, {heads}: {refused}{explanation}")
        return lines

    def explain_partly_stored(self, key: ChunkKey, other: OtherKeys) -> None:
        """Log, at most once a minute, why a chunk of which another size has a part cannot be read."""
        if self._clock() - self._logged_s < _LOG_INTERVAL_S:
            return
        if any(each.tiers for keys in other for each in self._store.explain(keys)):
            self._logged_s = self._clock()
            _LOG.info(
                "a chunk of another tensor-parallel size is not complete: %s", " | ".join(self.explain(key, other))
            )

    def _usable(self) -> Iterator[tuple[int, HeadSplit]]:
        return ((number, split) for number, split in enumerate(self._splits) if number not in self._refused)

    def _has_all(self, keys: Sequence[ChunkKey]) -> bool:
        return all(key in self._store for key in keys)

    def _refuse_unreadable(self, number: int, key: ChunkKey) -> None:
        """Leave a size alone whose chunks this store has, and can make nothing of."""
        (explanation,) = self._store.explain([key])
        reason = None if explanation.lookup is None else explanation.lookup.reason
        if reason not in ("undecodable", "uncertified") or number in self._refused:
            return
        self._refused.add(number)
        size = self._splits[number][0].spec.shard[1]
        what = "their codec is not known here" if reason == "undecodable" else "no certificate here covers their codec"
        _LOG.warning(
            "chunks of tensor-parallel size %d are not used: %s; give all engines one codec, and certificates for each "
            "size (%s)",
            size,
            what,
            explanation,
        )

    def _left_s(self, until_s: float | None) -> float | None:
        return None if until_s is None else max(until_s - self._clock(), 0.0)


def joined(spec: KVSpec, split: HeadSplit, chunks: Sequence[KVChunk]) -> KVChunk | None:
    """The chunk of a rank, made of the chunks of another size, one for each part; None if they do not belong together.

    A view where one chunk holds all heads; otherwise a copy. Extras are left out: they are made of other heads.
    """
    first = chunks[0]
    for part, chunk in zip(split, chunks, strict=True):
        if chunk.spec != part.spec or chunk.first_layer != first.first_layer or len(chunk.keys) != len(first.keys):
            return None
    token_ids = _agreed([chunk.token_ids for chunk in chunks])
    positions = _agreed([chunk.positions for chunk in chunks])
    if token_ids is None or positions is None:
        return None
    pairs = list(zip(split, chunks, strict=True))
    keys = _side_by_side([chunk.keys[:, part.start : part.stop] for part, chunk in pairs])
    values = _side_by_side([chunk.values[:, part.start : part.stop] for part, chunk in pairs])
    return KVChunk(spec, token_ids, positions, keys, values, first.first_layer)


def _agreed(rows: Sequence[Tensor]) -> Tensor | None:
    """The row that all give which do not give `UNKNOWN`; None if they differ."""
    known = [row for row in rows if not bool((row == UNKNOWN).any())] or list(rows[:1])
    is_same = len({len(row) for row in rows}) == 1 and all(torch.equal(row, known[0]) for row in known)
    return known[0] if is_same else None


def _side_by_side(heads: Sequence[Tensor]) -> Tensor:
    return heads[0] if len(heads) == 1 else torch.cat(list(heads), dim=1)
