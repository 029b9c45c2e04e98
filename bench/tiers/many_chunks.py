"""Very many chunks: finding a prompt's among them, and opening a directory of them again."""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from rich.progress import Progress

from ...core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, Entry
from ...errors import TierUnavailableError
from ...evaluation.intervals import spread
from ...evaluation.report import Metric
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import interleave, timed
from ..harness.samples import sample_key

MATCH, REOPEN = "match", "reopen"
PLAIN_LOOKUP, STORE_MATCH = "lookups in a dict", "KVStore.match"
COLD_OPEN, WARM_OPEN = "KVStore on DiskTier, cold", "KVStore on DiskTier, page cache"
COLD_LIST = "SQLite list of keys and sizes, cold"
_TINY_BYTES = 64


class ListedTier:
    """Lists keys as if it held their chunks: a store over it has its books full, and nothing had to be stored."""

    name = "listed"
    capacity_bytes = None

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self.used_bytes = sum(entry.nbytes for entry in entries)

    def entries(self) -> list[Entry]:
        entries, self._entries = self._entries, []  # asked for once; the store keeps what it needs
        return entries

    def get(self, key: ChunkKey) -> EncodedChunk | None:
        raise TierUnavailableError(f"tier {self.name!r} lists chunk {key.hex()} and does not hold it")

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> None:
        raise TierUnavailableError(f"tier {self.name!r} holds nothing, chunk {key.hex()} neither")

    def delete(self, key: ChunkKey) -> bool:
        raise TierUnavailableError(f"tier {self.name!r} holds nothing to delete, chunk {key.hex()} neither")

    def __contains__(self, key: object) -> bool:
        return False

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True, slots=True)
class MatchTimes:
    """How long `match` takes for a prompt that is stored whole, the longest way that there is.

    Attributes
    ----------
    stored, prompt : how many chunks.
    rounds : seconds of single calls, way by way, round by round: `[rounds][calls]`.
    open_s : seconds until the store had taken in all its keys.
    """

    stored: int
    prompt: int
    rounds: dict[str, list[list[float]]]
    open_s: float

    def quantile(self, way: str, share: float) -> Metric:
        """A quantile of all calls, between the 10th and the 90th percentile of the same within each round."""
        _, low, high = spread([float(np.quantile(calls, share)) for calls in self.rounds[way]])
        return Metric(float(np.quantile(np.concatenate(self.rounds[way]), share)), low, high, "s")

    def rows(self) -> list[dict[str, object]]:
        """One plain row for each way."""
        return [
            {
                "what": MATCH,
                "stored_chunks": self.stored,
                "prompt_chunks": self.prompt,
                "alternative": way,
                "call_s_p50": self.quantile(way, 0.5).value,
                "call_s_p99": self.quantile(way, 0.99).value,
                "calls": sum(map(len, rounds)),
                "open_s": self.open_s,
            }
            for way, rounds in self.rounds.items()
        ]


def match_times(stored: int, prompt: int, calls: int, rounds: int, bar: Progress) -> MatchTimes:
    """Time `KVStore.match` for prompts of `prompt` chunks in a store of `stored`, beside bare lookups in a dict.

    Every call gets new key objects, like a caller that has just hashed a prompt: Python keeps the hash of a key that
    it has looked up before.
    """
    prompts = max(1, stored // prompt)
    task = bar.add_task(f"{MATCH}, {stored:,} keys", total=rounds + 2)
    keys = [sample_key(p, i) for p in range(prompts) for i in range(prompt)]
    parents = (None if i % prompt == 0 else keys[i - 1] for i in range(len(keys)))
    entries = [Entry(key, 1, ChunkInfo(after)) for key, after in zip(keys, parents, strict=True)]
    bar.advance(task)
    start = time.perf_counter()
    store = KVStore([ListedTier(entries)])
    open_s = time.perf_counter() - start
    del entries
    plain = dict.fromkeys(keys)
    bar.advance(task)

    def lookups(asked: Sequence[ChunkKey]) -> int:
        for count, key in enumerate(asked):
            if key not in plain:
                return count
        return len(asked)

    ways: dict[str, Callable[[Sequence[ChunkKey]], int]] = {PLAIN_LOOKUP: lookups, STORE_MATCH: store.match}
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    draw = random.Random(0)
    with store:
        for _ in range(rounds):
            for way, match in ways.items():
                found[way].append([])
                for _ in range(calls):
                    begin = draw.randrange(prompts) * prompt
                    asked = [ChunkKey(bytes(bytearray(key))) for key in keys[begin : begin + prompt]]
                    start = time.perf_counter()
                    matched = match(asked)
                    found[way][-1].append(time.perf_counter() - start)
                    if matched != prompt:
                        raise RuntimeError(f"{way} found {matched} of {prompt} chunks that are stored")
            bar.advance(task)
    bar.remove_task(task)
    return MatchTimes(len(keys), prompt, found, open_s)


@dataclass(frozen=True, slots=True)
class ReopenTimes:
    """Seconds until a store on a directory of `stored` chunks can be asked, way by way, round by round."""

    stored: int
    seconds: dict[str, list[float]]

    def metric(self, way: str) -> Metric:
        return Metric.of_samples(self.seconds[way], unit="s")

    def rows(self) -> list[dict[str, object]]:
        """One plain row for each way."""
        found: list[dict[str, object]] = []
        for way in self.seconds:
            m = self.metric(way)
            times = {"open_s": m.value, "open_s_p10": m.low, "open_s_p90": m.high, "rounds": len(self.seconds[way])}
            found.append({"what": REOPEN, "stored_chunks": self.stored, "alternative": way} | times)
        return found


def reopen_times(folder: Path, stored: int, rounds: int, bar: Progress) -> ReopenTimes:
    """Fill a directory with `stored` tiny chunks and time opening it, cold as after a restart of the machine, and warm.

    Beside it: reading the same keys and sizes, and nothing more, out of a database.
    """
    with TemporaryDirectory(dir=folder, prefix="kvloom-bench-") as place:
        tier_path, list_path = Path(place) / "tier", Path(place) / "list"
        task = bar.add_task(f"fill, {stored:,} chunks", total=stored)
        blob = EncodedChunk("raw", {"tiny": torch.zeros(_TINY_BYTES, dtype=torch.uint8)}, {})
        with closing(DiskTier(tier_path)) as tier:
            after = None
            for i in range(stored):
                key = sample_key("reopen", i)
                tier.put(key, blob, ChunkInfo(after))
                after = key
                bar.advance(task)
            _write_list(list_path, ((entry.key, entry.nbytes) for entry in tier.entries()))
        bar.remove_task(task)

        def reopen() -> float:
            start = time.perf_counter()
            store = KVStore([DiskTier(tier_path)])
            spent = time.perf_counter() - start
            with store:
                chunks = store.stats().tiers[0].chunks
            if chunks != stored:
                raise RuntimeError(f"{chunks} of {stored} chunks are there after opening the directory again")
            return spent

        def cold(path: Path, work: Callable[[], float]) -> float:
            drop_page_cache(path)
            return work()

        ways: dict[str, Callable[[], float]] = {
            COLD_OPEN: lambda: cold(tier_path, reopen),
            WARM_OPEN: reopen,
            COLD_LIST: lambda: cold(list_path, lambda: timed(lambda: _read_list(list_path))),
        }
        return ReopenTimes(stored, interleave(ways, rounds, bar, f"{REOPEN}, {stored:,} chunks"))


def _write_list(folder: Path, chunks: Iterator[tuple[ChunkKey, int]]) -> None:
    folder.mkdir()
    with closing(sqlite3.connect(folder / "list.sqlite")) as database, database:
        database.execute("CREATE TABLE chunks (key BLOB PRIMARY KEY, nbytes INTEGER) WITHOUT ROWID")
        database.executemany("INSERT INTO chunks VALUES (?, ?)", chunks)


def _read_list(folder: Path) -> list[tuple[bytes, int]]:
    with closing(sqlite3.connect(folder / "list.sqlite")) as database:
        return database.execute("SELECT key, nbytes FROM chunks").fetchall()
