"""Why a chunk was a hit or a miss, as the store tells it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from kvloom import DiskTier, HostTier, KVStore
from kvloom.compress.raw import RawCodec
from kvloom.errors import TierFullError
from kvloom.kvstore.history import Departure, Explanation, History, Lookup
from kvloom.testing import make_chunk, make_key

from ..support.damage import flip
from ..support.fakes import Clock

CHUNK_BYTES = RawCodec().encode(make_chunk(0)).nbytes
KEY = make_key(1)


def explained(store: KVStore) -> Explanation:
    (found,) = store.explain([KEY])
    assert found.key == KEY
    return found


def test_never_put() -> None:
    with KVStore([HostTier(None)]) as store:
        assert explained(store) == Explanation(KEY, (), None, None, None, None)
        assert "never put" in str(explained(store))
        store.get(KEY)
        lookup = explained(store).lookup
        assert lookup is not None and (lookup.tier, lookup.reason, lookup.nbytes) == (None, "absent", 0)
        assert store.stats().lookups == 1  # explaining is no lookup


def test_hit_and_what_it_cost(tmp_path: Path) -> None:
    with KVStore([HostTier(2 * CHUNK_BYTES), DiskTier(tmp_path)]) as store:
        store.put(KEY, make_chunk(1), recompute_s=0.25)
        for number in (2, 3):
            store.put(make_key(number), make_chunk(number))
        found = explained(store)
        assert found.tiers == ("disk",) and found.recompute_s == 0.25 and found.lookup is None and found.load_s is None
        assert found.departure is not None and (found.departure.tier, found.departure.why) == ("host", "evictions")
        assert store.get(KEY, layers=(0, 3)) is not None  # all of it, and it is not promoted
        found = explained(store)
        assert found.lookup is not None and found.lookup.tier == "disk" and found.lookup.nbytes == CHUNK_BYTES
        assert found.load_s is not None and 0 < found.lookup.load_s <= found.load_s  # a place on disk takes more bytes
        text = str(found)
        assert "in disk" in text and "evicted from host" in text and "hit in disk" in text and "250.00 ms" in text


def flipped(store: KVStore, tier: DiskTier, clock: Clock) -> None:
    flip(tier.path, KEY, -1)


def expired(store: KVStore, tier: DiskTier, clock: Clock) -> None:
    clock.now_s += 11


def deleted(store: KVStore, tier: DiskTier, clock: Clock) -> None:
    store.delete(KEY)


@pytest.mark.parametrize(
    ("what_happens", "reason", "why", "says"),
    [
        (flipped, "corrupt", "corruptions", "found corrupt in disk"),
        (expired, "expired", "expirations", "expired in disk"),
        (deleted, "absent", "deletions", "deleted from disk"),
    ],
)
def test_miss(
    tmp_path: Path, what_happens: Callable[[KVStore, DiskTier, Clock], None], reason: str, why: str, says: str
) -> None:
    clock, tier = Clock(), DiskTier(tmp_path)
    with KVStore([tier], clock=clock) as store:
        store.put(KEY, make_chunk(1), ttl_s=10)
        what_happens(store, tier, clock)
        assert store.get(KEY) is None
        found = explained(store)
        assert found.tiers == () and found.lookup is not None and found.lookup.reason == reason
        assert found.departure is not None and found.departure.why == why
        assert says in str(found) and f"miss ({reason})" in str(found) and "not stored" in str(found)


def test_rejected() -> None:
    with KVStore([HostTier(CHUNK_BYTES - 1)]) as store:
        with pytest.raises(TierFullError):
            store.put(KEY, make_chunk(1))
        assert "did not fit into host" in str(explained(store))
        assert explained(store).word == "removed"


def test_forgets_the_oldest() -> None:
    history = History(Clock(7.0), chunks=2)
    for number in range(3):
        history.hit(make_key(number), "host", 0.5, 10)
        history.departed(make_key(number), "host", "evictions")
    first, last = (history.explain(make_key(number), [("host", 20)], None) for number in (0, 2))
    assert first.lookup is None and first.departure is None
    assert last.lookup == Lookup("host", None, 0.5, 10, 7.0)
    assert last.departure == Departure("host", "evictions", 7.0)
    assert last.load_s == pytest.approx(1.0)  # 20 bytes at 10 in half a second
