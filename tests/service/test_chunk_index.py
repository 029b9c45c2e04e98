"""What the service lists, whoever has written it and however threads interleave."""

from collections.abc import Iterator

import pytest

from kvloom.core import ChunkInfo
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.chunk_index import ChunkIndex, listed_bytes
from kvloom.service.served_store import ServedStore
from kvloom.testing.chunks import make_blob, make_key

KEY, INFO = make_key(1), ChunkInfo(namespace="pool/ours")


@pytest.fixture
def store() -> Iterator[ServedStore]:
    store = ServedStore([HostTier(2 * make_blob(0).nbytes)], quotas={}, timeout_s=5.0)
    yield store
    store.close()


def put(store: ServedStore, number: int) -> None:
    with store.use() as kvstore:
        kvstore.put_encoded(make_key(number), make_blob(number), INFO)


def test_what_the_service_itself_writes_is_listed_at_once(store: ServedStore) -> None:
    index = ChunkIndex(store)
    told: list[tuple[bytes, str, bool]] = []
    index.follow(lambda chunk, tier, _, *, is_there: told.append((chunk.key, tier, is_there)))
    for number in (1, 2):  # the second in the same moment, too
        put(store, number)
        found = {chunk.key: chunk for chunk in index.chunks("pool")}
        assert set(found) == {make_key(each) for each in range(1, number + 1)}
        assert found[make_key(number)].tiers == {"host"} and found[make_key(number)].info == INFO
        assert found[make_key(number)].nbytes == listed_bytes(make_blob(number).nbytes)
    changes = index.changes("pool", 0)
    assert changes is not None and [change.key for change in changes[0]] == [make_key(1), make_key(2)]
    put(store, 3)
    assert make_key(3) in {chunk.key for chunk in index.chunks("pool")} and len(index) == 2, "one was evicted"
    assert told[:3] == [(make_key(1), "host", True), (make_key(2), "host", True), told[2]] and not told[2][2]


def test_a_put_is_listed_though_another_thread_noted_its_move(store: ServedStore) -> None:
    index = ChunkIndex(store)
    index.expect(KEY, INFO, [1, 2])
    put(store, 1)
    index.catch_up()  # another thread's, before `written`
    assert index.chunks("pool") == [] and index.get(KEY) is None
    index.expect(KEY, INFO, [1, 2])  # a second client's put of the same chunk
    index.written(KEY, 4096, INFO, "etag")
    (chunk,) = index.chunks("pool")
    assert chunk.tiers == {"host"} and chunk.etag == "etag" and chunk.sequence == 1
    index.written(KEY, 4096, INFO, "etag2")
    (chunk,) = index.chunks("pool")
    assert chunk.tiers == {"host"} and chunk.etag == "etag2"


def test_a_put_that_failed_after_a_tier_took_it_is_listed(store: ServedStore) -> None:
    index = ChunkIndex(store)
    index.expect(KEY, INFO, [1, 2])
    put(store, 1)
    index.not_written(KEY)
    (chunk,) = index.chunks("pool")
    assert chunk.tiers == {"host"} and chunk.info == INFO and chunk.sequence == 1
    assert chunk.nbytes == listed_bytes(make_blob(1).nbytes)
    index.expect(make_key(2), INFO, [1, 2])
    index.not_written(make_key(2))
    assert [each.key for each in index.chunks("pool")] == [KEY]
