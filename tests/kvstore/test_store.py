"""KVStore: never a wrong chunk, whatever happens below it."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvloom.compress.raw import RawCodec
from kvloom.core import NOTHING, ChunkInfo, ChunkKey, EncodedChunk, KVChunk
from kvloom.errors import CodecError, SpecMismatchError, TierFullError, TierUnavailableError
from kvloom.kvstore.format import to_bytes
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.index import taken_bytes
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import SPEC, make_chunk, make_key, same_chunk

from ..support.damage import flip, overwrite, stored_at, stored_bytes
from ..support.fakes import assert_adds_up, filled, tiers_of

BLOB = RawCodec().encode(make_chunk(0))
CHUNK_BYTES = BLOB.nbytes
CONTAINER_BYTES = len(to_bytes(make_key(0), BLOB))
FILE_BYTES = taken_bytes(CONTAINER_BYTES)


class FailingTier(HostTier):
    """A tier that can be switched off, like a node behind a network."""

    failing = False

    def _expect_open(self) -> None:
        if self.failing:
            raise TierUnavailableError(f"tier {self.name!r} does not answer")
        super()._expect_open()


class WatchedTier(HostTier):
    """Runs a function at the start of the next `put`."""

    on_put: Callable[[], object] | None = None

    def put(self, key: ChunkKey, blob: EncodedChunk, info: ChunkInfo = NOTHING) -> None:
        if self.on_put is not None:
            on_put, self.on_put = self.on_put, None
            on_put()
        super().put(key, blob, info)


class RenamedCodec(RawCodec):
    name = "renamed"


def holds(chunk: KVChunk | None, number: int) -> bool:
    return chunk is not None and same_chunk(chunk, make_chunk(number))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[KVStore]:
    """Three chunks fit into the host, five onto the disk."""
    with KVStore([HostTier(3 * CHUNK_BYTES), DiskTier(tmp_path / "kv", 5 * FILE_BYTES)]) as store:
        yield store
        assert store.check() == []


def test_put_get(store: KVStore) -> None:
    assert store.get(make_key(1)) is None and make_key(1) not in store and store.locate(make_key(1)) is None
    store.put(make_key(1), make_chunk(1))
    assert holds(store.get(make_key(1)), 1) and make_key(1) in store and store.locate(make_key(1)) == "host"
    host, disk = store.stats().tiers
    assert (host.puts, host.hits, host.bytes_read, host.bytes_written) == (1, 1, CHUNK_BYTES, CHUNK_BYTES)
    assert (disk.puts, disk.hits, disk.used_bytes, disk.chunks) == (1, 0, FILE_BYTES, 1)
    assert store.stats().misses == {"absent": 1} and store.stats().lookups == 2


def test_put_does_not_alias_and_host_hits_copy_nothing(store: KVStore) -> None:
    chunk = make_chunk(1)
    store.put(make_key(1), chunk)
    chunk.keys.zero_()
    first, second = store.get(make_key(1)), store.get(make_key(1))
    assert holds(first, 1) and first.keys.data_ptr() == second.keys.data_ptr()


def test_get_at_other_positions(store: KVStore) -> None:
    store.put(make_key(1), make_chunk(1))
    positions = torch.arange(100, 105)
    moved = store.get(make_key(1), positions)
    assert torch.equal(moved.positions, positions)
    assert torch.equal(moved.keys, SPEC.rope.shift(make_chunk(1).keys, 100))
    part = store.get(make_key(1), positions, layers=(1, 3))
    assert part.first_layer == 1 and torch.equal(part.keys, moved.keys[1:])
    assert holds(store.get(make_key(1)), 1)


def test_match_counts_leading_keys(store: KVStore) -> None:
    for number in (0, 1, 3):
        store.put(make_key(number), make_chunk(number))
    assert store.match([make_key(n) for n in range(5)]) == 2
    assert store.match([make_key(2)]) == 0 and store.match([]) == 0 and store.match([make_key(3)]) == 1
    assert store.stats().lookups == 0


def test_read_says_where_a_chunk_came_from_and_what_it_costs(store: KVStore) -> None:
    for number in range(4):
        store.put(make_key(number), make_chunk(number), recompute_s=0.5 + number)
    store.put(make_key(4), make_chunk(4))
    positions = torch.arange(100, 105)
    hit = store.read(make_key(1), positions)
    assert hit is not None and (hit.tier, hit.recompute_s, hit.nbytes) == ("disk", 1.5, CHUNK_BYTES)
    assert torch.equal(hit.chunk.positions, positions) and 0 < hit.load_s < 60
    (known,) = store.explain([make_key(1)])
    assert known.lookup is not None and known.lookup.tier == "disk" and known.lookup.load_s >= hit.load_s
    hit = store.read(make_key(1))  # it was promoted
    assert hit is not None and (hit.tier, hit.recompute_s) == ("host", 1.5) and holds(hit.chunk, 1)
    hit = store.read(make_key(4), layers=(1, 3))
    assert hit is not None and (hit.tier, hit.recompute_s) == ("host", None)
    assert (hit.chunk.first_layer, hit.chunk.keys.shape[0]) == (1, 2) and 0 < hit.nbytes < CHUNK_BYTES
    assert store.read(make_key(9)) is None and store.read(make_key(9), timeout_s=0) is None


def test_the_tier_of_a_hit_is_the_one_that_answered(tmp_path: Path) -> None:
    """Not the one that was to have it when it was asked."""
    host = HostTier(None)
    with KVStore([host, DiskTier(tmp_path / "kv")]) as store:
        store.put(make_key(1), make_chunk(1), recompute_s=0.25)
        host.delete(make_key(1))
        assert store.locate(make_key(1)) == "host"
        hit = store.read(make_key(1))
        assert hit is not None and (hit.tier, hit.recompute_s) == ("disk", 0.25)
        assert store.check() == []


def test_locate_prefix_names_the_tiers_of_leading_chunks(store: KVStore) -> None:
    for number in (0, 1, 2, 3, 5):
        store.put(make_key(number), make_chunk(number))
    keys = [make_key(number) for number in range(6)]
    assert store.locate_prefix(keys) == ("disk", "disk", "host", "host") == tuple(map(store.locate, keys[:4]))
    assert store.match(keys) == 4 and store.stats().lookups == 0
    assert store.locate_prefix([]) == () == store.locate_prefix([make_key(4), make_key(5)])
    each = [make_key(4), *keys[:2], make_key(6), keys[3]]
    assert store.locate_each(each) == (None, *store.locate_prefix(keys[:2]), None, store.locate(keys[3]))
    assert store.locate_each([]) == ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.get("a" * 32), "key is 'aaa"),
        (lambda s: s.get(b"short"), "key is b'short'"),
        (lambda s: s.get(None), "key is None"),
        (lambda s: s.delete(b"short"), "key is b'short'"),
        (lambda s: s.put(b"short", make_chunk(1)), "key is b'short'"),
        (lambda s: s.put(make_key(1), None), "chunk is NoneType; expected a KVChunk"),
        (lambda s: s.put(make_key(1), make_chunk(1), ttl_s=0), "ttl_s is 0; expected a finite number above 0"),
        (lambda s: s.put(make_key(1), make_chunk(1), ttl_s="1"), "ttl_s is '1'; expected a finite number above 0"),
        (lambda s: s.put(make_key(1), make_chunk(1), recompute_s=-1), "recompute_s is -1; expected a finite number"),
        (lambda s: s.match(make_key(1)), "keys is b"),
        (lambda s: s.locate_prefix("abc"), "keys is 'abc'; expected a list of keys"),
        (lambda s: s.prefetch(make_key(1)), "keys is b"),
        (lambda s: s.pinned(make_key(1)), "keys is b"),
        (lambda s: s.pinned(None), "keys is None"),
        (lambda s: s.explain(make_key(1)), "keys is b"),
        (lambda s: s.pinned([], deadline_s=0), "deadline_s is 0; expected a finite number above 0"),
        (lambda s: s.read(make_key(1), layers=(2, 1)), r"layers are \(2, 1\); expected \(start, stop\)"),
        (lambda s: s.read(make_key(1), layers=3), "layers are 3; expected"),
        (lambda s: s.read(make_key(1), layers=("a", "b")), "layers are"),
        (lambda s: s.read(make_key(1), [1, 2]), r"positions are \[1, 2\]; expected a tensor"),
        (lambda s: s.read(make_key(1), torch.zeros(5)), r"positions are torch.float32 \[5\]; expected a tensor"),
        (lambda s: s.read(make_key(1), timeout_s="1"), "timeout_s is '1'; expected seconds"),
        (lambda s: s.prefetch([], deadline_s="1"), "deadline_s is '1'; expected seconds"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    store: KVStore, call: Callable[[KVStore], object], message: str
) -> None:
    store.put(make_key(1), make_chunk(1))
    with pytest.raises(ValueError, match=message) as refused:
        call(store)
    assert "\n" not in str(refused.value)
    assert holds(store.get(make_key(1)), 1) and store.stats().pinned == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout_s": 0}, "timeout_s is 0; expected seconds above 0"),
        ({"timeout_s": "1"}, "timeout_s is '1'; expected seconds above 0"),
        ({"policy": "fifo"}, "policy is 'fifo'; expected one of default, lru, prefix-lru"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVStore([HostTier(None)], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tiers is one tier, 'host'; expected a list"):
        KVStore(HostTier(None))  # type: ignore[arg-type]


def test_eviction_takes_the_least_recently_used(store: KVStore) -> None:
    for number in range(3):
        store.put(make_key(number), make_chunk(number))
    store.get(make_key(0))
    store.put(make_key(3), make_chunk(3))
    assert [store.locate(make_key(n)) for n in range(4)] == ["host", "disk", "host", "host"]
    for number in range(4, 7):
        store.put(make_key(number), make_chunk(number))
    # the disk has seen them in the order of writing; the read of chunk 0 was the host's
    assert [store.locate(make_key(n)) for n in range(7)] == [None, None, "disk", "disk", "host", "host", "host"]
    host, disk = store.stats().tiers
    assert (host.evictions, host.demotions, disk.evictions) == (4, 0, 2)


def test_hit_below_is_promoted(store: KVStore) -> None:
    for number in range(5):
        store.put(make_key(number), make_chunk(number))
    assert store.locate(make_key(0)) == "disk"
    part = store.get(make_key(0), layers=(1, 2))
    assert torch.equal(part.keys, make_chunk(0).keys[1:2]) and store.locate(make_key(0)) == "disk"
    assert holds(store.get(make_key(0)), 0) and store.locate(make_key(0)) == "host"
    host, disk = store.stats().tiers
    assert host.promotions == 1 and disk.hits == 2 and holds(store.get(make_key(0)), 0)
    assert disk.bytes_read == CHUNK_BYTES + part.keys.nbytes + part.values.nbytes + 80


def test_victims_that_no_slower_tier_has_are_demoted(tmp_path: Path) -> None:
    tiers = [filled(HostTier(3 * CHUNK_BYTES), 0, 1, 2), DiskTier(tmp_path / "kv", 4 * FILE_BYTES)]
    with KVStore(tiers) as store:
        for number in range(3, 7):
            store.put(make_key(number), make_chunk(number))
        assert [tiers_of(store, make_key(n)) for n in range(4)] == [(), (), ("disk",), ("disk",)]
        assert [tiers_of(store, make_key(n)) for n in range(4, 7)] == [("host",), ("host", "disk"), ("host", "disk")]
        host, disk = store.stats().tiers  # the disk had evicted 3 when the host did
        assert (host.demotions, host.evictions, disk.evictions) == (4, 4, 4) and store.check() == []
        assert holds(store.get(make_key(3)), 3)
    with KVStore([DiskTier(tmp_path / "kv")]) as store:
        assert [n for n in range(7) if holds(store.get(make_key(n)), n)] == [3, 4, 5, 6]


def test_pinned_chunks_stay(store: KVStore) -> None:
    keys = [make_key(n) for n in range(3)]
    for number in range(3):
        store.put(keys[number], make_chunk(number))
    with store.pinned(keys), store.pinned(keys[:1]):
        for number in range(3, 12):
            store.put(make_key(number), make_chunk(number))
        assert [store.locate(key) for key in keys] == ["host"] * 3 and store.match(keys) == 3
        assert store.stats().tiers[0].rejections == 9
    with store.pinned(keys[1:]), pytest.raises(RuntimeError), store.pinned(keys):
        raise RuntimeError
    store.put(make_key(12), make_chunk(12))  # all pins are gone: the first is the least recently used in both tiers
    assert store.match(keys) == 0 and store.match(keys[1:]) == 2 and store.locate(make_key(12)) == "host"


def test_full_of_pins(store: KVStore) -> None:
    keys = [make_key(n) for n in range(5)]
    for number in range(5):
        store.put(keys[number], make_chunk(number))
    with store.pinned(keys):
        store.get(keys[0]), store.get(keys[1])
        with pytest.raises(TierFullError):
            store.put(make_key(9), make_chunk(9)), store.put(make_key(10), make_chunk(10))
        assert store.match(keys) == 5


def test_pin_during_eviction() -> None:
    """A chunk that is pinned while it is being demoted stays where it was."""
    below = WatchedTier(None, name="below")
    with KVStore([filled(HostTier(CHUNK_BYTES), 0), below]) as store:
        pin = store.pinned([make_key(0)])
        below.on_put = pin.__enter__
        store.put(make_key(1), make_chunk(1))
        assert store.locate(make_key(0)) == "host" and store.locate(make_key(1)) == "below"
        assert store.stats().tiers[0].evictions == 0 and store.check() == []
        pin.__exit__(None, None, None)


def test_chunk_larger_than_a_tier_goes_below(store: KVStore) -> None:
    store.put(make_key(0), make_chunk(0))
    large = make_chunk(1, tokens=16)
    store.put(make_key(1), large)
    assert store.locate(make_key(1)) == "disk" and store.locate(make_key(0)) == "host"
    assert same_chunk(store.get(make_key(1)), large) and store.locate(make_key(1)) == "disk"
    with pytest.raises(TierFullError):
        store.put(make_key(2), make_chunk(2, tokens=999))
    assert make_key(2) not in store and holds(store.get(make_key(0)), 0)


def test_prefetch_promotes(store: KVStore) -> None:
    for number in range(5):
        store.put(make_key(number), make_chunk(number))
    assert store.prefetch([make_key(0), make_key(1), make_key(77)]).result(10) == 2
    assert store.locate(make_key(0)) == store.locate(make_key(1)) == "host"
    assert store.stats().lookups == 0 and store.stats().tiers[0].promotions == 2


def test_prefetch_error_is_heard(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        store.put(make_key(number), make_chunk(number))
    monkeypatch.setattr(DiskTier, "get", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.prefetch([make_key(0)]).result(10)
    assert store.stats().background_errors == 1


def test_delete_everywhere(store: KVStore) -> None:
    store.put(make_key(1), make_chunk(1))
    assert store.delete(make_key(1)) and not store.delete(make_key(1))
    assert store.get(make_key(1)) is None and all(tier.used_bytes == tier.chunks == 0 for tier in store.stats().tiers)


def test_restart(tmp_path: Path) -> None:
    for first_time in (True, False):
        with KVStore([HostTier(None), DiskTier(tmp_path / "kv")]) as store:
            if first_time:
                for number in range(4):
                    store.put(make_key(number), make_chunk(number))
            assert store.match([make_key(n) for n in range(9)]) == 4
            assert store.locate(make_key(0)) == ("host" if first_time else "disk")
            assert all(holds(store.get(make_key(n)), n) for n in range(4)) and store.check() == []


def test_any_flipped_bit_is_a_counted_miss(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path / "kv")]) as store:
        store.put(make_key(1), make_chunk(1))
        data = CONTAINER_BYTES - CHUNK_BYTES
        for count, offset in enumerate((0, 8, 12, 16, 48, 56, 64, 72, 300, data, data + 50, -1), 1):
            flip(tmp_path / "kv", make_key(1), offset, 1 << count % 8)
            assert store.get(make_key(1)) is None and make_key(1) not in store and store.check() == []
            assert store.stats().tiers[0].corruptions == count and store.stats().misses == {"corrupt": count}
            store.put(make_key(1), make_chunk(1))
        assert holds(store.get(make_key(1)), 1)


def test_corrupt_chunk_is_found_in_the_tier_below(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path / "kv", name="near"), DiskTier(tmp_path / "far", name="far")]) as store:
        store.put(make_key(1), make_chunk(1))
        path, offset, nbytes = stored_at(tmp_path / "kv", make_key(1))
        os.truncate(path, offset + nbytes - 1)
        assert holds(store.get(make_key(1)), 1)
        near, far = store.stats().tiers
        assert (near.corruptions, near.hits, near.promotions, far.hits) == (1, 0, 1, 1)
        assert store.stats().misses == {} and store.locate(make_key(1)) == "near" and store.check() == []


def test_swapped_chunks_are_misses(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path / "kv")]) as store:
        for number in (1, 2):
            store.put(make_key(number), make_chunk(number))
        one, two = (stored_bytes(tmp_path / "kv", make_key(number)) for number in (1, 2))
        overwrite(tmp_path / "kv", make_key(1), two), overwrite(tmp_path / "kv", make_key(2), one)
        assert store.get(make_key(1)) is None and store.get(make_key(2)) is None
        assert store.stats().tiers[0].corruptions == 2 and store.check() == []


def test_failing_tier_is_a_miss(caplog: pytest.LogCaptureFixture) -> None:
    host, node = HostTier(CHUNK_BYTES), FailingTier(None, name="node")
    with KVStore([host, node]) as store, caplog.at_level(logging.WARNING):
        for number in (1, 2):
            store.put(make_key(number), make_chunk(number))
        node.failing = True
        for _ in range(3):
            assert store.get(make_key(1)) is None
        store.put(make_key(3), make_chunk(3))  # the host takes it
        assert holds(store.get(make_key(3)), 3)
        assert store.stats().misses == {"unavailable": 3} and store.stats().tiers[1].errors == 4
        assert [record.message.split(":")[0] for record in caplog.records] == ["tier 'node'"]
        with pytest.raises(TierUnavailableError, match="does not answer"):
            store.delete(make_key(1))
        node.failing = False
        assert holds(store.get(make_key(1)), 1) and store.check() == []


def test_no_tier_takes_it() -> None:
    node = FailingTier(None, name="node")
    with KVStore([node]) as store:
        node.failing = True
        with pytest.raises(TierUnavailableError, match="does not answer"):
            store.put(make_key(1), make_chunk(1))
        assert make_key(1) not in store


def test_codecs_by_name(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)], codec=RenamedCodec()) as store:
        for number in (1, 2):
            store.put(make_key(number), make_chunk(number))
    with KVStore([DiskTier(tmp_path)], codecs=[RenamedCodec()]) as store:
        assert holds(store.get(make_key(1)), 1)
    with KVStore([DiskTier(tmp_path)]) as store:  # not known here: a miss that makes room for a chunk that is
        assert store.get(make_key(1)) is None and make_key(1) not in store and make_key(2) in store
        stats = store.stats()
        assert stats.misses == {"undecodable": 1}
        assert (stats.tiers[0].undecodable, stats.tiers[0].corruptions, stats.tiers[0].errors) == (1, 0, 0)


def test_wrong_arguments(store: KVStore) -> None:
    chunk = make_chunk(1)
    with pytest.raises(ValueError, match="expected 32 bytes"):
        store.put(ChunkKey(b"short"), chunk)
    part = KVChunk(SPEC, chunk.token_ids, chunk.positions, chunk.keys[:1], chunk.values[:1])
    with pytest.raises(SpecMismatchError, match="1 layers; expected all 3"):
        store.put(make_key(1), part)
    store.put(make_key(1), chunk)
    with pytest.raises(SpecMismatchError, match="positions"):
        store.get(make_key(1), torch.arange(4))
    for start, stop in ((2, 2), (-1, 1), (1, 4), (7, 9)):
        with pytest.raises(ValueError, match="layers are"):
            store.get(make_key(1), layers=(start, stop))
    for tiers in ([], [HostTier(None), HostTier(None)]):
        with pytest.raises(ValueError, match="at least one, with different names"):
            KVStore(tiers)


def test_failing_codec_stores_nothing(store: KVStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> EncodedChunk:
        raise CodecError("no")

    monkeypatch.setattr(RawCodec, "encode", refuse)
    with pytest.raises(CodecError):
        store.put(make_key(1), make_chunk(1))
    assert make_key(1) not in store


def test_closed_store(tmp_path: Path) -> None:
    store = KVStore([DiskTier(tmp_path)])
    store.close()
    store.close()
    for call in (
        lambda: store.get(make_key(1)),
        lambda: store.put(make_key(1), make_chunk(1)),
        lambda: store.match([]),
    ):
        with pytest.raises(TierUnavailableError, match="the store is closed"):
            call()
    DiskTier(tmp_path).close()


@pytest.mark.parametrize(("host_chunks", "disk_chunks"), [(4, 8), (8, 4)])
def test_threads(tmp_path: Path, host_chunks: int, disk_chunks: int) -> None:
    tiers = [HostTier(host_chunks * CHUNK_BYTES), DiskTier(tmp_path / "kv", disk_chunks * FILE_BYTES)]
    with KVStore(tiers) as store:
        for number in range(2):
            store.put(make_key(number), make_chunk(number))

        def work(seed: int) -> int:
            dice, hits = random.Random(seed), 0
            for _ in range(120):
                number = dice.randrange(16)
                key, action = make_key(number), dice.random()
                if action < 0.35:
                    store.put(key, make_chunk(number))
                elif action < 0.4 and number > 1:
                    store.delete(key)
                elif action < 0.5:
                    store.prefetch([key])
                elif action < 0.6:
                    part = store.get(key, layers=(1, 3))
                    assert part is None or torch.equal(part.keys, make_chunk(number).keys[1:])
                else:
                    found = store.get(key)
                    assert found is None or same_chunk(found, make_chunk(number))
                    hits += found is not None
                assert store.match(pinned) == 2
            return hits

        pinned = [make_key(0), make_key(1)]
        with store.pinned(pinned), ThreadPoolExecutor(6) as pool:
            assert sum(pool.map(work, range(6))) > 100
        assert store.prefetch([]).result(30) == 0  # the last in the queue
        assert store.check() == [] and store.stats().background_errors == 0
        stats = store.stats()
        assert all(tier.errors == tier.corruptions == 0 for tier in stats.tiers) and stats.tiers[0].evictions > 0
        assert_adds_up(stats)
    assert threading.active_count() < 20


KILLED = """
import sys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.testing import make_chunk, make_key
store = KVStore([DiskTier({path!r})])
for number in range(100_000):
    store.put(make_key(number), make_chunk(number, tokens=300))
    print(number, flush=True)
"""


@pytest.mark.slow
@pytest.mark.slow
def test_kill_in_the_middle_of_puts(tmp_path: Path) -> None:
    script = KILLED.format(path=str(tmp_path))
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 20:
            break
    child.send_signal(signal.SIGKILL)
    acknowledged = [int(line), *(int(rest) for rest in child.stdout.read().splitlines()[:-1])]
    child.wait()
    child.stdout.close()
    with KVStore([DiskTier(tmp_path)]) as store:
        assert store.check() == []
        stored = store.match([make_key(n) for n in range(100_000)])
        assert stored > max(acknowledged) >= 20 and store.stats().tiers[0].chunks == stored
        for number in range(stored):
            assert same_chunk(store.get(make_key(number)), make_chunk(number, tokens=300))


class StoreMachine(RuleBasedStateMachine):
    """The store against a dictionary: it may forget, but only what is not pinned, and what it returns is right."""

    numbers = st.integers(0, 7)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.model: dict[ChunkKey, KVChunk] = {}
        self.pins: list[tuple[list[ChunkKey], AbstractContextManager[None]]] = []
        self.kept: set[ChunkKey] = set()  # pinned and stored after the last step

    @initialize(sizes=st.sampled_from([(3, 5), (5, 3)]))
    def begin(self, sizes: tuple[int, int]) -> None:
        """Chunks that fit into the host and onto the disk."""
        self.sizes = sizes
        self.open()

    def open(self) -> None:
        host_chunks, disk_chunks = self.sizes
        self.store = KVStore(
            [HostTier(host_chunks * CHUNK_BYTES), DiskTier(self.folder / "kv", disk_chunks * FILE_BYTES)]
        )

    def teardown(self) -> None:
        while self.pins:
            self.unpin()
        self.store.close()
        shutil.rmtree(self.folder)

    @rule(number=numbers)
    def put(self, number: int) -> None:
        key, chunk = make_key(number), make_chunk(number, tokens=(1, 5, 11)[number % 3])
        try:
            self.store.put(key, chunk)
        except TierFullError:
            assert self.pins  # without pins there is always room
        else:
            self.model[key] = chunk
            assert key in self.store

    @rule(number=numbers)
    def get(self, number: int) -> None:
        key = make_key(number)
        stored, found = key in self.store, self.store.get(key)
        assert same_chunk(found, self.model[key]) if stored else found is None

    @rule(number=numbers, layer=st.integers(0, 2))
    def get_layers(self, number: int, layer: int) -> None:
        key = make_key(number)
        stored, found = key in self.store, self.store.get(key, layers=(layer, layer + 1))
        assert torch.equal(found.values[0], self.model[key].values[layer]) if stored else found is None

    @rule(number=numbers)
    def prefetch(self, number: int) -> None:
        in_first = self.store.prefetch([make_key(number)]).result(10)
        assert in_first == (self.store.locate(make_key(number)) == "host")

    @rule(number=numbers)
    def delete(self, number: int) -> None:
        key = make_key(number)
        stored = key in self.store
        assert self.store.delete(key) == stored and key not in self.store
        self.model.pop(key, None)
        self.kept.discard(key)

    @rule(number=numbers)
    def corrupt(self, number: int) -> None:
        key = make_key(number)
        if self.store.locate(key) != "disk":
            return
        flip(self.folder / "kv", key, stored_at(self.folder / "kv", key)[2] // 2, 4)
        corruptions = self.store.stats().tiers[1].corruptions
        assert self.store.get(key) is None and self.store.stats().tiers[1].corruptions == corruptions + 1
        self.kept.discard(key)

    @precondition(lambda self: len(self.pins) < 3)
    @rule(chosen=st.lists(numbers, max_size=3))
    def pin(self, chosen: list[int]) -> None:
        keys = [make_key(number) for number in chosen]
        context = self.store.pinned(keys)
        context.__enter__()
        self.pins.append((keys, context))

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self) -> None:
        self.pins.pop(0)[1].__exit__(None, None, None)

    @precondition(lambda self: not self.pins)
    @rule()
    def reopen(self) -> None:
        on_disk = {key for key in self.stored if "disk" in tiers_of(self.store, key)}
        self.store.close()
        self.open()
        assert on_disk == self.stored

    @property
    def stored(self) -> set[ChunkKey]:
        return {key for key in map(make_key, range(8)) if key in self.store}

    @invariant()
    def all_is_in_order(self) -> None:
        assert self.store.check() == []
        stats = self.store.stats()
        assert_adds_up(stats)
        assert all(tier.used_bytes <= tier.capacity_bytes for tier in stats.tiers)
        assert self.stored <= self.model.keys() and self.kept <= self.stored
        self.kept = self.stored & {key for keys, _ in self.pins for key in keys}


TestStoreMachine = pytest.mark.slow(StoreMachine.TestCase)
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize(("host_chunks", "disk_chunks"), [(3, 5), (5, 3)])
def test_changes_add_up_to_what_is_where(tmp_path: Path, host_chunks: int, disk_chunks: int) -> None:
    """Puts, evictions, demotions, promotions and deletions, noted from the first call on."""
    with KVStore([HostTier(host_chunks * CHUNK_BYTES), DiskTier(tmp_path / "kv", disk_chunks * FILE_BYTES)]) as store:
        store.put(make_key(0), make_chunk(0))
        assert store.take_placement_changes() == []
        where: dict[str, set[ChunkKey]] = {"host": {make_key(0)}, "disk": {make_key(0)}}
        rng = random.Random(3)
        for _ in range(60):
            number = rng.randrange(9)
            action = rng.choice(("put", "put", "get", "delete"))
            if action == "put":
                store.put(make_key(number), make_chunk(number))
            elif action == "get":
                store.get(make_key(number))
            else:
                store.delete(make_key(number))
            for key, tier, is_there, entry in store.take_placement_changes():
                assert (key in where[tier]) is not is_there, "each is told once"
                assert (entry is not None) is is_there and (entry is None or (entry.key == key and entry.nbytes > 0))
                (where[tier].add if is_there else where[tier].discard)(key)
            for tier in ("host", "disk"):
                assert where[tier] == {key for key in map(make_key, range(9)) if tier in tiers_of(store, key)}
        assert where["host"] and where["disk"]
        assert store.take_placement_changes() == []
