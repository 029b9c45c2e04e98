"""What every tier must do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..core import ChunkInfo, ChunkKey, Tier
from ..errors import TierFullError, TierUnavailableError
from ..kvstore.capabilities import ReadsLayers
from .chunks import make_blob, make_key, same_blob


def keys_of(tier: Tier) -> list[ChunkKey]:
    """Keys of all chunks in a tier, least recently written first."""
    return [entry.key for entry in tier.entries()]


class TierContract:
    """Subclasses give `make_tier(capacity_bytes)`."""

    def make_tier(self, capacity_bytes: int | None) -> Tier:
        """An empty tier; None for one without limit."""
        raise NotImplementedError

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        tier = self.make_tier(None)
        yield tier
        tier.close()

    def test_is_a_tier(self, tier: Tier) -> None:
        assert isinstance(tier, Tier) and tier.name and tier.used_bytes == 0 and keys_of(tier) == []

    def test_absent(self, tier: Tier) -> None:
        assert tier.get(make_key(1)) is None and make_key(1) not in tier and not tier.delete(make_key(1))
        assert "text" not in tier

    def test_round_trip(self, tier: Tier) -> None:
        for seed in range(3):
            tier.put(make_key(seed), make_blob(seed, numbers=50 * seed))
        for seed in range(3):
            found = tier.get(make_key(seed))
            assert found is not None and same_blob(found, make_blob(seed, numbers=50 * seed))
            assert make_key(seed) in tier

    def test_accounts_for_every_byte(self, tier: Tier) -> None:
        used = [tier.used_bytes]
        for seed in range(3):
            tier.put(make_key(seed), make_blob(seed))
            used.append(tier.used_bytes)
        assert used[1] >= make_blob(0).nbytes and used == [n * used[1] for n in range(4)]
        assert tier.delete(make_key(1)) and not tier.delete(make_key(1))
        assert tier.used_bytes == used[2] and tier.get(make_key(1)) is None and make_key(1) not in tier

    def test_says_what_a_chunk_takes_if_it_says_anything(self, tier: Tier) -> None:
        for number, numbers in enumerate((10, 1000, 300, 0)):
            taken_bytes = tier.put(make_key(number % 3), make_blob(number, numbers=numbers))
            held = {entry.key: entry.nbytes for entry in tier.entries()}
            assert taken_bytes in (None, held[make_key(number % 3)])

    def test_replaces(self, tier: Tier) -> None:
        tier.put(make_key(1), make_blob(1, numbers=1000))
        large_bytes = tier.used_bytes
        tier.put(make_key(1), make_blob(2, numbers=10))
        found = tier.get(make_key(1))
        assert found is not None and same_blob(found, make_blob(2, numbers=10))
        assert 0 < tier.used_bytes < large_bytes and keys_of(tier) == [make_key(1)]

    def test_iterates_in_order_of_writing(self, tier: Tier) -> None:
        for number in (5, 3, 9, 5):
            tier.put(make_key(number), make_blob(number))
        assert keys_of(tier) == [make_key(3), make_key(9), make_key(5)]
        assert sum(entry.nbytes for entry in tier.entries()) == tier.used_bytes

    def test_remembers_what_it_is_told_of_a_chunk(self, tier: Tier) -> None:
        infos = [ChunkInfo(make_key(9), "tenant é", 2e9, 0.25), ChunkInfo(), ChunkInfo(namespace="other")]
        for number, info in enumerate(infos):
            tier.put(make_key(number), make_blob(number), info)
        assert [entry.info for entry in tier.entries()] == infos
        tier.put(make_key(0), make_blob(0))
        assert [entry.info for entry in tier.entries()] == [*infos[1:], ChunkInfo()]

    def test_full_changes_nothing(self, tier: Tier) -> None:
        tier.put(make_key(0), make_blob(0))
        chunk_bytes = tier.used_bytes
        small = self.make_tier(2 * chunk_bytes)
        small.put(make_key(0), make_blob(0))
        small.put(make_key(1), make_blob(1))
        for number, blob in ((2, make_blob(2)), (0, make_blob(2, numbers=1000))):
            with pytest.raises(TierFullError) as full:
                small.put(make_key(number), blob)
            assert full.value.needed_bytes >= blob.nbytes
        assert small.used_bytes == small.capacity_bytes == 2 * chunk_bytes
        found = small.get(make_key(0))
        assert found is not None and same_blob(found, make_blob(0)) and make_key(2) not in small
        del found  # what is being read may keep its space
        small.put(make_key(1), make_blob(3))  # replacing takes no further space
        assert small.delete(make_key(0))
        small.put(make_key(2), make_blob(2))
        assert keys_of(small) == [make_key(1), make_key(2)]
        small.close()

    def test_layers_are_those_of_the_whole(self, tier: Tier) -> None:
        if not isinstance(tier, ReadsLayers):
            pytest.skip("tier reads no layers")
        blob = make_blob(1)
        tier.put(make_key(1), blob)
        assert tier.get_layers(make_key(2), 0, 1) is None
        for start, stop in ((0, 4), (1, 3), (3, 4), (2, 99)):
            found = tier.get_layers(make_key(1), start, stop)
            assert found is not None and same_blob(found, blob.layers(start, stop))

    def test_closed(self) -> None:
        tier = self.make_tier(None)
        tier.put(make_key(1), make_blob(1))
        tier.close()
        tier.close()
        for call in (
            lambda: tier.get(make_key(1)),
            lambda: tier.put(make_key(2), make_blob(2)),
            lambda: tier.delete(make_key(1)),
        ):
            with pytest.raises(TierUnavailableError):
                call()
