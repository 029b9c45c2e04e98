"""Which documents are stored, and where in a prompt they stand: found by what they say, at any offset.

A polynomial hash is rolled over the tokens of a prompt (Karp and Rabin 1987), over all windows at once: with prefix
sums of `token * base ** i` modulo 2**64, a window is a difference times a power of the base's inverse. The first
`window_tokens` of every known document are looked for so; where they stand, the hash of the whole document is compared,
by the same sums, and at last its key, which is a cryptographic hash. So a collision costs time and is never believed.
(Numbers modulo 2**61 - 1, as usual, would need products of 128 bits, which numpy does not have; tokens are scrambled
first, since a power of two alone as modulus is weak for regular texts.)

What is known is written to a journal, one record of 64 bytes for each document, so that other processes and later ones
know it, too. Records carry checksums; a torn one at the end is cut off by the next writer.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ....core import ChunkKey

_LOG = logging.getLogger("kvloom")

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse
_MASK = (1 << 64) - 1
_INVERSE = pow(_BASE, -1, 1 << 64)
_FILTER_BITS = 20  # one bit of 2**20 for each document: of windows that begin none, nearly all end here
_LOCK_ATTEMPTS = 100  # a millisecond each
_RECORD = np.dtype([("window", "<u8"), ("whole", "<u8"), ("tokens", "<u8"), ("key", "<u8", 4), ("check", "<u8")])


class KnownDocuments:
    """Not for several threads at once.

    Parameters
    ----------
    window_tokens : of the beginning of a document, by which it is found. Shorter documents are not known.
    journal : a file, made when there is something to write; every process that names it knows the same. None for none.
        Where it cannot be read or written, that is logged once and this process knows what it was told itself.
    """

    def __init__(self, window_tokens: int, journal: Path | None = None) -> None:
        self.window_tokens = window_tokens
        self._journal = journal
        self._read_bytes = 0
        self._keys: set[bytes] = set()
        self._records = np.empty(0, _RECORD)  # sorted by window
        self._news: list[NDArray[np.void]] = []
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._powers = np.ones(1, np.uint64)
        self._inverses = np.ones(1, np.uint64)

    def __len__(self) -> int:
        self._follow()
        return len(self._keys)

    def add(self, token_ids: NDArray[np.int64], key: ChunkKey) -> None:
        """A document is stored, or about to be, under its content key; nothing if it is too short or known."""
        if len(token_ids) < self.window_tokens:
            return
        self._follow()
        if key in self._keys:
            return
        sums = self._sums(token_ids)
        record = np.zeros(1, _RECORD)
        record["window"], record["whole"] = sums[self.window_tokens], sums[-1]
        record["tokens"], record["key"] = len(token_ids), np.frombuffer(key, "<u8")
        record["check"] = _checks(record)
        self._learn(record)
        self._write(record)

    def find(
        self,
        token_ids: NDArray[np.int64],
        keys_of: Callable[[int, int], Collection[ChunkKey]],
        is_stored: Callable[[int, int], bool] = lambda _start, _stop: True,
    ) -> list[tuple[int, int]]:
        """Where documents stand, `[start, stop)`, ascending and without overlap: leftmost first, then longest.

        Parameters
        ----------
        keys_of : content keys of the tokens `[start, stop)`, for whoever asks: documents of other tenants have others.
        is_stored : whether the document at `[start, stop)` is of use.
        """
        self._follow()
        self._settle()
        count = len(token_ids) - self.window_tokens + 1
        if count < 1 or not len(self._records):
            return []
        sums = self._sums(token_ids)
        windows = (sums[self.window_tokens :] - sums[:count]) * self._inverses[:count]
        places = np.flatnonzero(self._filter[windows >> np.uint64(64 - _FILTER_BITS)])
        known = self._records["window"]
        first = np.searchsorted(known, windows[places], "left")
        matches = np.searchsorted(known, windows[places], "right") - first
        # every place with every document that begins like it
        starts = np.repeat(places, matches)
        rank = np.arange(len(starts)) - np.repeat(np.cumsum(matches) - matches, matches)
        records = self._records[np.repeat(first, matches) + rank]
        stops = starts + records["tokens"].astype(np.int64)
        fits = stops <= len(token_ids)
        starts, stops, records = starts[fits], stops[fits], records[fits]
        same = (sums[stops] - sums[starts]) * self._inverses[starts] == records["whole"]
        found, end = [], 0
        starts, stops, records = starts[same], stops[same], records[same]
        for index in np.lexsort((-stops, starts)):
            start, stop = int(starts[index]), int(stops[index])
            key = records["key"][index].tobytes()
            if start >= end and key in keys_of(start, stop) and is_stored(start, stop):
                found.append((start, stop))
                end = stop
        return found

    # ------------------------------------------------------------------------------------------------- hashing

    def _sums(self, token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Hashes of the first 0, 1, ... tokens, modulo 2**64."""
        count = len(token_ids)
        if len(self._powers) <= count:
            size = 1 << count.bit_length()
            self._powers, self._inverses = _powers(_BASE, size), _powers(_INVERSE, size)
        terms = _scrambled(token_ids.astype(np.uint64) + np.uint64(1)) * self._powers[:count]
        return np.concatenate((np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)))

    def _learn(self, records: NDArray[np.void]) -> None:
        for record in records:
            key = record["key"].tobytes()
            if key not in self._keys:
                self._keys.add(key)
                self._news.append(record[None])
                self._filter[int(record["window"]) >> (64 - _FILTER_BITS)] = True

    def _settle(self) -> None:
        if self._news:
            records = np.concatenate((self._records, *self._news))
            self._records, self._news = records[np.argsort(records["window"], kind="stable")], []

    # ------------------------------------------------------------------------------------------------- journal

    def _follow(self) -> None:
        """What was written since the last look, by this process or another. A record is there whole, or not yet."""
        if self._journal is None:
            return
        try:
            size = self._journal.stat().st_size // _RECORD.itemsize * _RECORD.itemsize
            if size <= self._read_bytes:
                return
            with self._journal.open("rb") as file:
                file.seek(self._read_bytes)
                payload = file.read(size - self._read_bytes)
        except FileNotFoundError:
            return
        except OSError as exc:
            self._give_up(exc)
            return
        records = np.frombuffer(payload[: len(payload) // _RECORD.itemsize * _RECORD.itemsize], _RECORD)
        self._learn(records[records["check"] == _checks(records)])
        self._read_bytes += len(records) * _RECORD.itemsize

    def _write(self, record: NDArray[np.void]) -> None:
        if self._journal is None:
            return
        try:
            with self._journal.open("ab") as file:
                _lock(file.fileno())
                size = os.fstat(file.fileno()).st_size
                if size % _RECORD.itemsize:  # of a process that was killed while it wrote
                    os.ftruncate(file.fileno(), size // _RECORD.itemsize * _RECORD.itemsize)
                file.write(record.tobytes())
        except OSError as exc:
            self._give_up(exc)

    def _give_up(self, exc: OSError) -> None:
        _LOG.warning("%s cannot be used: %s; documents are recognised by this process alone", self._journal, exc)
        self._journal = None


def _lock(fd: int) -> None:
    """Until it is closed. Holders need microseconds; one that is stopped just then is not waited for."""
    for _ in range(_LOCK_ATTEMPTS - 1):
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(0.001)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _powers(base: int, size: int) -> NDArray[np.uint64]:
    """`base ** 0, 1, ...` modulo 2**64."""
    factors = np.full(size, base & _MASK, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)


def _scrambled(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Of neighbours, unlike numbers: the finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = numbers ^ (numbers >> np.uint64(31))
    return mixed


def _checks(records: NDArray[np.void]) -> NDArray[np.uint64]:
    """Against torn and overwritten records, not against whoever writes them on purpose: keys guard what is served."""
    parts = (records["window"], records["whole"], records["tokens"], *records["key"].T)
    check = np.full(len(records), _BASE, np.uint64)
    for part in parts:
        check = _scrambled(check ^ part) + np.uint64(1)
    return check
