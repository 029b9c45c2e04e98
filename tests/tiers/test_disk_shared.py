"""A directory of the disk tier that several processes share: real files, real locks, real kills."""

import fcntl
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo, ChunkKey, EncodedChunk, Entry
from kvloom.errors import TierFullError, TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.files import Files, OpenFile
from kvloom.kvstore.tiers.disk.tier import DiskTier, Durability
from kvloom.testing import keys_of, make_blob, make_chunk, make_key, same_blob

from ..support.damage import generation_of, index_of

KEYS = 64


def same(found: EncodedChunk | None, seed: int) -> bool:
    return found is not None and same_blob(found, blob_of(seed))


def blob_of(seed: int) -> EncodedChunk:
    """One to six pages; the number of the key is `seed % KEYS`."""
    return make_blob(seed, numbers=(10, 900, 2000, 5000)[seed % 4])


@pytest.fixture
def tiers(tmp_path: Path) -> Iterator[tuple[DiskTier, DiskTier]]:
    """Two that open the directory independently, as two processes do."""
    one, two = DiskTier(tmp_path), DiskTier(tmp_path)
    yield one, two
    one.close(), two.close()


def test_what_others_put_and_delete_is_seen(tiers: tuple[DiskTier, DiskTier]) -> None:
    one, two = tiers
    info = ChunkInfo(make_key(7), "tenant", None, 0.5)
    one.put(make_key(1), blob_of(1), info)
    assert make_key(1) in two and same(two.get(make_key(1)), 1)
    assert two.changes() == [Entry(make_key(1), one.used_bytes, info)] and two.changes() == [] == one.changes()
    assert two.used_bytes == one.used_bytes
    one.put(make_key(1), blob_of(65))
    assert same(two.get(make_key(1)), 65)
    two.delete(make_key(1))
    assert one.get(make_key(1)) is None and one.get_layers(make_key(1), 0, 1) is None
    assert one.changes() == [make_key(1)] and one.used_bytes == 0
    assert [entry for entry in two.changes() if isinstance(entry, bytes)] == []  # it did so itself
    assert one.check() == two.check() == []


def test_a_store_deletes_what_another_has_just_put(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)]) as one, KVStore([DiskTier(tmp_path)]) as two:
        one.put(make_key(1), make_chunk(1))
        assert two.delete(make_key(1)) and not two.delete(make_key(1))
        assert one.get(make_key(1)) is None and one.tiers[0].entries() == []


def test_changes_tell_the_last_state_in_order(tiers: tuple[DiskTier, DiskTier]) -> None:
    one, two = tiers
    for number in (1, 2, 3, 4):
        one.put(make_key(number), blob_of(number))
    one.delete(make_key(2))
    one.put(make_key(1), blob_of(65))
    two.put(make_key(4), blob_of(68))  # what it does itself is no news
    assert [entry if isinstance(entry, bytes) else entry.key for entry in two.changes()] == [
        make_key(3), make_key(2), make_key(1),
    ]  # fmt: skip
    assert keys_of(one) == keys_of(two) == [make_key(n) for n in (3, 1, 4)]


def test_capacity_is_that_of_all(tmp_path: Path) -> None:
    one, two = DiskTier(tmp_path, 3 * 4096), DiskTier(tmp_path, 3 * 4096)
    one.put(make_key(0), blob_of(0)), two.put(make_key(4), blob_of(4)), one.put(make_key(8), blob_of(8))
    for tier in (one, two):
        with pytest.raises(TierFullError, match="12288 of 12288 are used"):
            tier.put(make_key(12), blob_of(12))
        tier.put(make_key(8), blob_of(8))
    one.delete(make_key(0))
    two.put(make_key(12), blob_of(12))
    assert one.used_bytes <= 12288 and keys_of(one) == [make_key(n) for n in (4, 8, 12)]
    one.close(), two.close()


def test_filled_by_another_while_writing(tmp_path: Path) -> None:
    """The space that was there when a put began is gone when it ends: it is refused, and its bytes are given back."""
    files = Files()
    one, two = DiskTier(tmp_path, 4096, files=files), DiskTier(tmp_path, 4096)

    def write(file: OpenFile, buffers: list[memoryview], offset: int) -> int:
        del files.pwritev
        two.put(make_key(2), blob_of(4))
        return files.pwritev(file, buffers, offset)

    files.pwritev = write  # type: ignore[method-assign]
    with pytest.raises(TierFullError):
        one.put(make_key(1), blob_of(4))
    assert keys_of(one) == [make_key(2)] and one.used_bytes == 4096 and one.check() == []
    assert sum(file.stat().st_blocks * 512 for file in (tmp_path / "segments").iterdir()) <= 8192
    one.close(), two.close()


def test_segments_of_living_writers_are_left_alone(tmp_path: Path) -> None:
    one = DiskTier(tmp_path)
    one.put(make_key(1), blob_of(1))
    one.delete(make_key(1))
    (segment,) = (tmp_path / "segments").iterdir()
    two = DiskTier(tmp_path)
    assert segment.exists()
    one.put(make_key(2), blob_of(2))
    assert same(two.get(make_key(2)), 2)
    two.delete(make_key(2))
    assert segment.exists()
    one.close(), two.close()
    DiskTier(tmp_path).close()
    assert not segment.exists()


def test_a_stopped_process_is_not_waited_for_without_end(tmp_path: Path) -> None:
    files = Files()
    files.lock_timeout_s = 0.05
    one, two = DiskTier(tmp_path), DiskTier(tmp_path, files=files)
    one.put(make_key(1), blob_of(1))
    with (tmp_path / "kvloom.json").open() as marker:
        fcntl.flock(marker, fcntl.LOCK_EX)
        for call in (lambda: two.put(make_key(2), blob_of(2)), lambda: two.delete(make_key(1))):
            with pytest.raises(TierUnavailableError, match="is locked by another process"):
                call()
        assert same(two.get(make_key(1)), 1)  # reading needs no lock
    two.put(make_key(2), blob_of(2))
    one.close(), two.close()


def test_journal_is_rewritten_while_others_read(tmp_path: Path) -> None:
    files = Files()
    files.slack_records = 3
    tiers = [DiskTier(tmp_path, files=files) for _ in range(3)]
    dice, model = random.Random(1), {}
    seen: list[dict[ChunkKey, int]] = [{}, {}, {}]
    generations = set()
    for step in range(300):
        tier = tiers[dice.randrange(3)]
        key, seed = make_key(number := dice.randrange(10)), number + KEYS * step
        if dice.random() < 0.6:
            tier.put(key, blob_of(seed))
            model[key] = seed
        else:
            assert tier.delete(key) == (model.pop(key, None) is not None)
        generations.add(generation_of(tmp_path))
        reader = dice.randrange(3)
        for entry in tiers[reader].changes() if dice.random() < 0.3 else ():
            key = entry if isinstance(entry, bytes) else entry.key
            assert (key in model) == (not isinstance(entry, bytes))
            seen[reader][key] = step
        found = tiers[reader].get(key)
        assert same(found, model[key]) if key in model else found is None
    assert len(generations) > 10
    for tier in tiers:
        assert set(keys_of(tier)) == model.keys() and tier.check() == []
        tier.close()
    assert all(seen)


# ----------------------------------------------------------------------------------------------------------- hammers


def hammer(path: str, seed: int, duration_s: float, threads: int, durability: Durability, results: Queue) -> None:
    """Puts, gets and deletes from several threads; reports what went wrong, in words."""
    tier = DiskTier(path, 100 * 4096, durability=durability, segment_bytes=20 * 4096, sync_interval_s=0.1)
    stop_at_s = time.monotonic() + duration_s
    problems: list[str] = []
    counts = {"puts": 0, "hits": 0, "full": 0}

    def work(number: int) -> None:
        dice = random.Random(seed * 100 + number)
        try:
            while time.monotonic() < stop_at_s and not problems:
                number = dice.randrange(KEYS)
                key, action = make_key(number), dice.random()
                if action < 0.35:
                    try:
                        tier.put(key, blob_of(number + KEYS * dice.randrange(50)))
                        counts["puts"] += 1
                    except TierFullError:
                        counts["full"] += 1
                        tier.delete(make_key(dice.randrange(KEYS)))
                elif action < 0.45:
                    tier.delete(key)
                elif action < 0.5:
                    tier.changes()
                elif action < 0.6:
                    part = tier.get_layers(key, 1, 3)
                    if part is not None and not same_blob(part, blob_of(int(part.meta["seed"])).layers(1, 3)):
                        problems.append("wrong layers")
                else:
                    found = tier.get(key)
                    counts["hits"] += found is not None
                    if found is not None and (
                        int(found.meta["seed"]) % KEYS != number or not same(found, int(found.meta["seed"]))
                    ):
                        problems.append("wrong bytes")
                if tier.used_bytes > 100 * 4096:
                    problems.append(f"{tier.used_bytes} bytes are used")
        except BaseException as exc:
            problems.append(repr(exc))
            raise

    workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    tier.close()
    results.put((problems, counts))


def run_hammers(path: Path, duration_s: float) -> None:
    context = multiprocessing.get_context("fork")
    results: Queue = context.Queue()
    durabilities = ("cache", "cache", "batch", "sync")
    children = [
        context.Process(target=hammer, args=(str(path), seed, duration_s, 8, durability, results))
        for seed, durability in enumerate(durabilities)
    ]
    for child in children:
        child.start()
    reports = [results.get(timeout=duration_s + 60) for _ in children]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert [problems for problems, _ in reports] == [[]] * 4
    assert all(counts["puts"] > 5 and counts["hits"] > 5 for _, counts in reports), reports
    tier = DiskTier(path)
    assert tier.check() == [] and list((path / "quarantine").iterdir()) == []
    live = set(index_of(path).live_bytes)
    assert sorted(int(file.stem) for file in (path / "segments").iterdir()) == sorted(live)
    assert all(same(tier.get(key), int(tier.get(key).meta["seed"])) for key in keys_of(tier))
    taken = sum(file.stat().st_blocks * 512 for file in (path / "segments").iterdir())
    assert taken <= tier.used_bytes + 65536 * len(live)
    tier.close()


@pytest.mark.slow
def test_threads_of_processes(tmp_path: Path) -> None:
    run_hammers(tmp_path, 2.0)


@pytest.mark.torture
@pytest.mark.timeout(600)
def test_threads_of_processes_for_a_minute(tmp_path: Path) -> None:
    run_hammers(tmp_path, 60.0)


# ------------------------------------------------------------------------------------------------------------- kills


def put_until_killed(path: Path, first: int, report: int) -> None:
    """In a child: acknowledges each put and delete as a line."""
    files = Files()
    files.slack_records = 16
    tier = DiskTier(path, segment_bytes=16 * 4096, durability=("cache", "batch", "sync")[first % 3], files=files)
    dice = random.Random(first)
    for count in range(first * 100_000, first * 100_000 + 100_000):
        number = dice.randrange(KEYS)
        seed = number + KEYS * count
        if dice.random() < 0.7:
            os.write(report, b"begin %d %d\n" % (number, seed))
            tier.put(make_key(number), blob_of(seed))
            os.write(report, b"end %d %d\n" % (number, seed))
        else:
            os.write(report, b"begin %d -1\n" % number)
            tier.delete(make_key(number))
            os.write(report, b"end %d -1\n" % number)


def kill_rounds(path: Path, rounds: int) -> None:
    """A child writes and is killed at some moment; what it was told is done must be there, round after round."""
    dice = random.Random(rounds)
    may: dict[int, set[int]] = {number: {-1} for number in range(KEYS)}
    for round_ in range(rounds):
        readable, writable = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                put_until_killed(path, round_, writable)
            finally:
                os._exit(1)
        os.close(writable)
        with os.fdopen(readable, "rb") as lines:
            first = lines.readline()
            killer = threading.Timer(dice.random() * 0.05, os.kill, (pid, signal.SIGKILL))
            killer.start()
            text = first + lines.read()
        killer.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        for line in text.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            what, number, seed = line.split()
            may[int(number)] = {int(seed)} if what == b"end" else may[int(number)] | {int(seed)}
        tier = DiskTier(path)
        for number, seeds in may.items():
            found = tier.get(make_key(number))
            seed = -1 if found is None else int(found.meta["seed"])
            assert seed in seeds and (found is None or same(found, seed)), (round_, number)
            may[number] = {seed}
        assert tier.check() == []
        tier.close()


def test_killed_at_random(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 6)


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_killed_at_random_a_thousand_times(tmp_path: Path) -> None:
    kill_rounds(tmp_path, 1000)
