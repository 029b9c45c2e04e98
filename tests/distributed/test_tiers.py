"""Tiers over engines on other machines: the contract, and what all of them share, with the real engines."""

import pytest

from kvloom.bench.harness.samples import encoded, sample_chunk, sample_key
from kvloom.core import Tier
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import TierContract, make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.patience import LONG_S
from .servers import OpenTier, a_sharing

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def patient_lookups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up answers without a tier that does not answer in time; on a busy machine that may be any."""
    monkeypatch.setattr("kvloom.kvstore.placement.finder._WAIT_S", LONG_S)


class TestDistributedTier(TierContract):
    open_tier: OpenTier

    @pytest.fixture(autouse=True)
    def opens(self, open_tier: OpenTier) -> None:
        self.open_tier = open_tier

    def make_tier(self, capacity_bytes: int | None) -> Tier:
        return self.open_tier(a_sharing(capacity_bytes=capacity_bytes))


@pytest.mark.parametrize("nbytes", [64 * KIB, MIB, 4 * MIB, 16 * MIB])
def test_bytes_come_back_as_they_were(open_tier: OpenTier, nbytes: int) -> None:
    key = sample_key(nbytes)
    (blob,) = encoded({key: sample_chunk(nbytes, seed=nbytes)}).values()
    sharing = a_sharing()
    writer, reader = open_tier(sharing), open_tier(sharing)
    writer.put(key, blob)
    found = reader.get(key)
    assert found is not None and same_blob(found, blob)
    layers = reader.get_layers(key, 1, 3)
    assert layers is not None and same_blob(layers, blob.layers(1, 3))
    writer.close()
    reader.close()


def test_what_one_machine_puts_another_finds(open_tier: OpenTier) -> None:
    sharing = a_sharing()
    tiers = [open_tier(sharing) for _ in range(2)]
    is_mooncake = type(tiers[0]).__name__ == "MooncakeTier"
    stores = [KVStore([HostTier(None), tier]) for tier in tiers]
    one, other = stores
    keys = [make_key(n) for n in range(100)]
    assert other.match(keys) == 0
    for n, key in enumerate(keys):
        one.put(key, make_chunk(n), after=keys[n - 1] if n else None, namespace="rag", recompute_s=0.5)
    assert other.match(keys) == 100 and other.locate_prefix(keys[:2]) == ("far", "far")
    hit = other.read(keys[3])
    assert hit is not None and same_chunk(hit.chunk, make_chunk(3))
    assert other.stats().tiers[1].arrivals == 100
    if not is_mooncake:  # which can say of an object how long it is, and no more without reading it
        assert hit.recompute_s == 0.5 and other.stats().tiers[1].namespace_bytes.keys() == {"rag"}
    part = other.get(keys[5], layers=(1, 2))
    assert part is not None and part.first_layer == 1
    assert other.prefetch([make_key(7)]).result(LONG_S) == 1
    one.delete(keys[50])
    assert other.get(keys[50]) is None and other.stats().tiers[1].departures == 1
    assert other.match(keys) == 50
    for store in stores:
        assert [each for each in store.check() if "disagrees" not in each] == []
        store.close()


def test_stores_of_other_prefixes_share_nothing(open_tier: OpenTier) -> None:
    one, other = open_tier(a_sharing()), open_tier(a_sharing())
    one.put(make_key(1), make_blob(1))
    assert other.get(make_key(1)) is None and make_key(1) not in other
    one.close()
    other.close()


def test_a_key_that_was_absent_is_asked_for_again_after_a_while(open_tier: OpenTier) -> None:
    sharing = a_sharing(recheck_s=5.0)
    now_s = [0.0]
    tier = open_tier(sharing)
    store = KVStore([tier], monotonic=lambda: now_s[0])
    writer = open_tier(sharing)
    assert store.match([make_key(1)]) == 0
    writer.put(make_key(1), make_blob(1))
    now_s[0] = 4.9
    assert store.match([make_key(1)]) == 0
    now_s[0] = 5.1
    assert store.match([make_key(1)]) == 1
    store.close()
    writer.close()


def test_layers_of_a_chunk_that_was_replaced(open_tier: OpenTier) -> None:
    sharing = a_sharing()
    tier, other = open_tier(sharing), open_tier(sharing)
    tier.put(make_key(1), make_blob(1))
    first = tier.get_layers(make_key(1), 0, 1)
    other.put(make_key(1), make_blob(2, numbers=333))
    second = tier.get_layers(make_key(1), 1, 2)
    assert first is not None and same_blob(first, make_blob(1).layers(0, 1))
    assert second is not None and same_blob(second, make_blob(2, numbers=333).layers(1, 2))
    other.delete(make_key(1))
    assert tier.get_layers(make_key(1), 2, 3) is None
    tier.close()
    other.close()
