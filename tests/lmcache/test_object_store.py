"""What is kept for LMCache by its names: bytes, layouts, locks, faults, evictions."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from kvloom.connectors.lmcache.keys import object_key
from kvloom.connectors.lmcache.object_store import Buffer, ObjectStore, bytes_of
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import leaves_no_threads

SIZE = 4096
LAYOUT = "bfloat16 [2, 4, 16, 16]"


@dataclass(frozen=True)
class Name:
    chunk_hash: bytes
    model_name: str = "org/model"
    kv_rank: int = 0x01000100
    object_group_id: int = 0
    cache_salt: str = ""


NAMES = [Name(bytes([i]) * 32) for i in range(6)]


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def buffers(count: int = len(NAMES), *, seed: int | None = 0, layout: str = LAYOUT) -> list[Buffer]:
    """Random bytes, or zeros for a seed of None."""
    if seed is None:
        return [Buffer(torch.zeros(SIZE, dtype=torch.uint8), layout) for _ in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return [
        Buffer(torch.randint(0, 256, (SIZE,), dtype=torch.uint8, generator=generator), layout) for _ in range(count)
    ]


def on_disk(folder: Path, **settings: str) -> ObjectStore:
    return ObjectStore(KVStore([DiskTier(folder)]), **settings)


def test_what_is_stored_is_found_after_a_restart(tmp_path: Path) -> None:
    objects, given = on_disk(tmp_path), buffers()
    assert objects.find_and_lock(NAMES) == [False] * 6
    saved = objects.save(NAMES[:3], given[:3])
    assert saved == (True, 3 * SIZE, ((0, SIZE), (1, SIZE), (2, SIZE)))
    assert objects.save(NAMES[2:4], given[2:4]) == (True, SIZE, ((1, SIZE),)), "nothing is written twice"
    objects.close()

    objects, taken = on_disk(tmp_path), buffers(seed=None)
    found = [True] * 4 + [False] * 2
    assert objects.find_and_lock(NAMES) == found and objects.load(NAMES, taken) == found
    for one, other in zip(given[:4], taken[:4], strict=True):
        assert torch.equal(one.data, other.data)
    assert not any(each.data.any() for each in taken[4:]), "memory of what is missing is left alone"
    counts = objects.counts()
    assert (counts["hit_objects"], counts["loaded_objects"], counts["lost_objects"]) == (4, 4, 2)
    objects.close()


def test_the_caller_may_overwrite_its_memory_at_once() -> None:
    objects, given = ObjectStore(KVStore([HostTier(1 << 20)])), buffers(1)
    kept = given[0].data.clone()
    objects.save(NAMES[:1], given)
    given[0].data.zero_()
    taken = buffers(1, seed=None)
    assert objects.load(NAMES[:1], taken) == [True] and torch.equal(taken[0].data, kept)
    objects.close()


@pytest.mark.parametrize(
    "other",
    [
        {"chunk_hash": b"\xff" * 32},
        {"model_name": "org/other"},
        {"kv_rank": 0x02000200},
        {"object_group_id": 1},
        {"cache_salt": "tenant"},
    ],
)
def test_every_part_of_a_name_counts(other: dict[str, object]) -> None:
    one = object_key(NAMES[0], model_id="", salt="")
    assert object_key(replace(NAMES[0], **other), model_id="", salt="") != one  # type: ignore[arg-type]


def test_keys_stay_as_they_are() -> None:
    """They are part of what lies on disk."""
    assert object_key(NAMES[1], model_id="m", salt="s").hex() == KEY
    assert len({object_key(NAMES[0], model_id=a, salt=b) for a, b in [("", ""), ("a", ""), ("", "a")]}) == 3


KEY = "6f9d6a32acace3b02b8c54de7f097615e0c953f6ab29ecfeb4f604226dfe86ce"


def test_settings_keep_weights_and_tenants_apart(tmp_path: Path) -> None:
    with_salt = on_disk(tmp_path, salt="one")
    with_salt.save(NAMES, buffers())
    with_salt.close()
    for settings in ({"salt": "two"}, {"salt": "one", "model_id": "other"}):
        other = on_disk(tmp_path, **settings)
        assert not any(other.find_and_lock(NAMES))
        other.close()


def test_another_precision_is_a_miss_and_makes_room() -> None:
    objects, other = ObjectStore(KVStore([HostTier(1 << 20)])), "float16 [2, 4, 16, 16]"
    objects.save(NAMES, buffers())
    taken = buffers(seed=None, layout=other)
    assert objects.load(NAMES, taken) == [False] * 6 and not any(each.data.any() for each in taken)
    assert objects.counts()["other_layouts"] == 6 and len(objects.take_removed()) == 6
    given = buffers(seed=1, layout=other)
    assert objects.save(NAMES, given).nbytes == 6 * SIZE
    assert objects.load(NAMES, taken) == [True] * 6 and torch.equal(taken[0].data, given[0].data)
    objects.close()


def test_damaged_bytes_are_misses(tmp_path: Path) -> None:
    objects, given = on_disk(tmp_path), buffers()
    objects.save(NAMES, given)
    objects.close()
    damaged = 0
    for file in tmp_path.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        at = content.find(given[2].data.numpy().tobytes())
        if at >= 0:
            with file.open("r+b") as stream:
                stream.seek(at + 100)
                stream.write(bytes([content[at + 100] ^ 1]))
            damaged += 1
    assert damaged == 1
    objects, taken = on_disk(tmp_path), buffers(seed=None)
    assert objects.load(NAMES, taken) == [True, True, False, True, True, True]
    assert sum(objects.store.stats().misses.values()) == 1 and not taken[2].data.any()
    assert objects.save(NAMES[2:3], given[2:3]).nbytes == SIZE, "it is stored again"
    assert objects.load(NAMES, taken) == [True] * 6 and torch.equal(taken[2].data, given[2].data)
    objects.close()


def test_locks_are_counted_and_keep_objects() -> None:
    objects = ObjectStore(KVStore([HostTier(4 * (SIZE + 512))]))
    objects.save(NAMES[:3], buffers(3))
    assert objects.find_and_lock(NAMES[:2]) == [True, True] and objects.find_and_lock(NAMES[:1]) == [True]
    assert objects.store.stats().pinned == 2
    objects.save(NAMES[3:], buffers(3, seed=1))
    assert objects.find_and_lock(NAMES[:3]) == [True, True, False], "what is locked stays, what is not goes"
    for _ in range(3):
        objects.unlock(NAMES[:2])
    objects.unlock(NAMES)  # more often than they were locked
    assert objects.store.stats().pinned == 0
    removed = {name for name, _ in objects.take_removed()}
    assert NAMES[2] in removed and not removed & set(NAMES[:2]) and objects.take_removed() == []
    assert removed == {name for name in NAMES if not objects.find_and_lock([name])[0]}
    objects.close()


def test_locks_that_are_forgotten_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.connectors.lmcache.object_store._LOCK_S", 0.01)
    objects = ObjectStore(KVStore([HostTier(1 << 20)]))
    objects.save(NAMES, buffers())
    objects.find_and_lock(NAMES)
    import time

    time.sleep(0.05)
    objects.find_and_lock([])
    assert objects.counts()["overdue_locks"] == 6 and objects.store.stats().pinned == 0
    objects.close()


def test_faults_are_misses(caplog: pytest.LogCaptureFixture) -> None:
    objects = ObjectStore(KVStore([HostTier(1 << 20)]))
    objects.save(NAMES[:1], buffers(1))
    objects.store.close()
    with caplog.at_level("CRITICAL"):
        assert objects.find_and_lock(NAMES) == [False] * 6 and objects.load(NAMES, buffers()) == [False] * 6
        assert objects.save(NAMES, buffers()) == (False, 0, ())
        objects.delete(NAMES)
        assert objects.take_removed() == []
    assert objects.counts()["errors"] >= 18 and objects.counts()["failed_saves"] == 6
    objects.close()


def test_what_does_not_fit_fails_alone() -> None:
    objects = ObjectStore(KVStore([HostTier(2 * SIZE)]))
    large = Buffer(torch.ones(1 << 16, dtype=torch.uint8), LAYOUT)
    saved = objects.save(NAMES[:2], [large, *buffers(1)])
    assert saved == (False, SIZE, ((1, SIZE),)) and objects.find_and_lock(NAMES[:2]) == [False, True]
    objects.close()


def test_late_objects_are_misses() -> None:
    objects = ObjectStore(KVStore([HostTier(1 << 20)]), load_timeout_s=1e-9)
    objects.save(NAMES, buffers())
    assert objects.load(NAMES, buffers(seed=None)) == [False] * 6 and objects.counts()["late_objects"] == 6
    objects.close()


def test_deleted_objects_are_told_once() -> None:
    objects = ObjectStore(KVStore([HostTier(1 << 20)]))
    objects.save(NAMES, buffers())
    objects.delete(NAMES[:2])
    assert objects.take_removed() == [(name, SIZE) for name in NAMES[:2]]
    objects.delete(NAMES[:2])
    assert objects.take_removed() == [] and objects.find_and_lock(NAMES) == [False, False, *[True] * 4]
    objects.close()


def test_memory_is_shared_unless_it_is_read_only() -> None:
    memory = bytearray(b"abc")
    bytes_of(memoryview(memory))[0] = ord("x")
    assert memory == b"xbc" and bytes_of(b"abc").tolist() == [97, 98, 99] and not len(bytes_of(b""))
