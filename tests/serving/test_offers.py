"""Chunks that were offered stay until they are loaded, or the offer is over."""

from collections.abc import Iterator

import pytest
import torch

from kvloom.connectors.serving.messages import Load, LookUp
from kvloom.connectors.serving.worker.head_reader import HeadReader
from kvloom.connectors.serving.worker.offers import Offers
from kvloom.core import ChunkKey, KVChunk, KVSpec
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.fakes import Clock
from ..support.faulty import FaultyTier, eventually, leaves_no_threads
from .test_transfers import CHUNK, make

SPEC = KVSpec("model", 2, 2, 4, torch.float32, None)
BYTES = CHUNK * SPEC.token_bytes
KEYS = prefix_keys(SPEC, range(CHUNK * 8), chunk_tokens=CHUNK)


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def put(store: KVStore, key: ChunkKey) -> None:
    first = KEYS.index(key) * CHUNK
    tokens = torch.arange(first, first + CHUNK)
    store.put(key, KVChunk(SPEC, tokens, tokens, torch.randn(2, 2, CHUNK, 4), torch.randn(2, 2, CHUNK, 4)))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[KVStore]:
    """Room for three chunks and a bit; two are there."""
    with KVStore([HostTier(int(3.9 * BYTES))], policy="lru", clock=clock) as opened:
        for key in KEYS[:2]:
            put(opened, key)
        yield opened


def crowd(store: KVStore) -> None:
    """More than fits."""
    for key in KEYS[3:]:
        put(store, key)


def test_what_is_offered_stays(store: KVStore) -> None:
    offers = Offers(HeadReader(store, SPEC))
    assert offers.make(1, KEYS[:3]) == ("host", "host")
    crowd(store)
    assert store.match(KEYS[:2]) == 2
    assert store.stats().pinned == 2, "what was not found is not pinned"
    offers.release(1)
    assert store.stats().pinned == 0
    crowd(store)
    assert store.match(KEYS[:2]) == 0


def test_an_offer_ends_by_itself(store: KVStore, clock: Clock) -> None:
    offers = Offers(HeadReader(store, SPEC), offer_s=5.0)
    offers.make(1, KEYS[:2])
    clock.now_s += 6.0
    crowd(store)
    assert store.match(KEYS[:2]) == 0
    offers.close()
    assert store.stats().pinned == 0


def test_a_load_takes_it_over(store: KVStore, clock: Clock) -> None:
    offers = Offers(HeadReader(store, SPEC), offer_s=5.0)
    offers.make(1, KEYS[:2])
    assert offers.take(1, KEYS[1:2], 60.0)
    clock.now_s += 30.0
    crowd(store)
    assert KEYS[1] in store
    assert KEYS[0] not in store, "it was not needed"
    offers.release(1)
    assert len(offers) == store.stats().pinned == 0


def test_without_a_number_nothing_is_pinned(store: KVStore) -> None:
    offers = Offers(HeadReader(store, SPEC))
    assert offers.make(0, KEYS[:2]) == ("host", "host")
    assert offers.take(0, KEYS[:2], 1.0)
    assert len(offers) == store.stats().pinned == 0
    assert offers.make(1, KEYS[4:]) == ()
    assert len(offers) == store.stats().pinned == 0, "nothing found, nothing to keep"


def test_from_the_look_up_to_the_end_of_the_load() -> None:
    tier = FaultyTier()
    transfers = make(KVStore([tier]), spec=SPEC)
    for key in KEYS[:2]:
        put(transfers.store, key)
    assert transfers.look_up(LookUp("r", (tuple(KEYS[:2]),), 1)) == (tier.name, tier.name)
    assert transfers.look_up(LookUp("r", (tuple(KEYS[:2]),), 2, replaces=1))
    assert len(transfers.offers) == 1
    tier.gate.clear()
    transfers.load(Load("r", (tuple(KEYS[:2]),), 0, 0, 16, (9, 2, 7, 4), 2))
    assert transfers.arrivals() == []
    assert transfers.store.stats().pinned == 2
    tier.gate.set()
    assert eventually(lambda: bool(transfers.arrivals()))
    assert transfers.store.stats().pinned == 0
    transfers.close()
