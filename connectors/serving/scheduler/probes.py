"""Which chunks are read beside requests, to learn what tiers cost that no request loads from. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence

from ..controller.controller import Controller
from ..groups import GroupShape
from ..keys import PrefixKeys
from ..messages import Load, Loaded, both

_UNKNOWN_CHUNKS = 3  # of a tier whose cost is not known: as many as make it known


class Probes:
    """Chunks to be read, one at a time, while no load waits.

    A tier that is left alone would be left alone for ever, as nothing is learned of it: a chunk that a request has
    found there, and does not load, is read when the tier is due. A tier that was never observed is due at once: the
    first request loads from it, as long as computing would take at most, and others learn from chunks beside that.

    Parameters
    ----------
    controller : says what is due, and is told what was learned.
    chunk_tokens : of the settings.
    token_bytes : as for the controller's loads.
    ranks : that each read their part of a chunk; the slowest one counts.
    shapes : of the engine's groups; empty for a single one of full attention.
    """

    def __init__(
        self,
        controller: Controller,
        *,
        chunk_tokens: int,
        token_bytes: int,
        ranks: int = 1,
        shapes: Sequence[GroupShape] = (),
    ) -> None:
        self._controller = controller
        self._chunk_tokens, self._chunk_bytes = chunk_tokens, chunk_tokens * token_bytes
        self._ranks, self._shapes = ranks, shapes
        self._next: list[tuple[str, Load]] = []  # with the tier in which each chunk was found
        self._under_way: str | None = None
        self._outcome: Loaded | None = None  # on the ranks that have reported it

    @property
    def has_next(self) -> bool:
        """Whether `take` has something to look at."""
        return bool(self._next) and self._under_way is None

    def consider(self, tiers: Sequence[str], loaded: int, keys: PrefixKeys, first: int) -> None:
        """A request has found chunks in these tiers, from number `first` on, and loads so many leading ones."""
        for tier in dict.fromkeys(tiers):
            is_known = self._controller.load_s(tier, self._chunk_bytes) is not None
            if (is_known and tier in tiers[:loaded]) or not self._controller.is_probe_due(tier, self._chunk_bytes):
                continue
            numbers = [index for index, each in enumerate(tiers) if each == tier]
            count = 1 if is_known else _UNKNOWN_CHUNKS
            self._next = [(tier, self._load_of(keys, first + index)) for index in numbers[-count:]]
            return

    def take(self) -> Load | None:
        """A chunk to be read now, if one is due."""
        while self.has_next:
            tier, load = self._next.pop()
            if self._controller.is_probe_due(tier, self._chunk_bytes):
                self._controller.begin_probe(tier)
                self._under_way = tier
                return load
        return None

    def end(self, loaded: Loaded) -> None:
        """The outcome on some ranks."""
        self._outcome = loaded if self._outcome is None else both(self._outcome, loaded)
        if self._outcome.ranks < self._ranks:
            return
        loaded, tier = self._outcome, self._under_way
        self._outcome = self._under_way = None
        for name, seconds in loaded.read_s.items():
            if name in loaded.tokens:
                self._controller.observe_load(name, self._chunk_bytes, seconds)
        if loaded.failed and tier is not None:  # a chunk that did not come takes at least that long
            expected_s, seconds = self._controller.load_s(tier, self._chunk_bytes), loaded.read_s.get("", 0.0)
            if expected_s is not None and seconds > expected_s:
                self._controller.observe_load(tier, self._chunk_bytes, seconds)

    def forget(self) -> None:
        """The chunks found are not found any more."""
        self._next = []

    def _load_of(self, keys: PrefixKeys, chunk: int) -> Load:
        """A load of one chunk that is written nowhere; of all pieces that a request needs to go on behind it."""
        size = self._chunk_tokens
        start, stop = chunk * size, (chunk + 1) * size
        if not self._shapes:
            others = keys.others_between(chunk, chunk + 1)
            return Load("", keys.between(chunk, chunk + 1), start, start, stop, (), others=others)
        firsts = [chunk if shape.is_full else shape.first_chunk(chunk, size) for shape in self._shapes]
        rows = [keys.between(first, chunk + 1, group) for group, first in enumerate(firsts)]
        further = tuple(Load("", row, start, start, stop, ()) for row in rows[1:])
        return Load("", rows[0], start, start, stop, (), further=further)
