"""`StoreSource`: what it fills in, layer by layer, and how often it asks the store."""

import pytest
import torch

from kvloom.connectors.hf.source import LostChunksError, StoreSource
from kvloom.core import KVSpec, RopeSpec
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_chunk, make_key

LAYERS = 30
SPEC = KVSpec("m", LAYERS, 2, 8, torch.float32, RopeSpec((1.0, 0.3, 0.1, 0.01)))
STARTS, TOTAL = [0, 5, 12], 16
CHUNKS = [make_chunk(i, tokens=tokens, spec=SPEC, start=2) for i, tokens in enumerate((5, 7, 4))]
KEYS = [make_key(i) for i in range(3)]


class CountingStore(KVStore):
    reads: list[tuple[int, int] | None]

    def read(self, key, positions=None, *, layers=None, timeout_s=None):  # type: ignore[no-untyped-def]
        self.reads.append(layers)
        return super().read(key, positions, layers=layers, timeout_s=timeout_s)


@pytest.fixture
def store() -> CountingStore:
    made = CountingStore([HostTier(None)])
    for key, each in zip(KEYS, CHUNKS, strict=True):
        made.put(key, each)
    made.reads = []
    return made


@pytest.mark.parametrize("needed", [TOTAL, 12])
def test_every_layer_has_every_chunk_at_its_place(store: CountingStore, needed: int) -> None:
    source = StoreSource(store, KEYS, STARTS, TOTAL, LAYERS, {KEYS[1]: CHUNKS[1]})
    keys, values = (torch.full((LAYERS, 2, TOTAL, 8), torch.nan) for _ in range(2))
    for layer in range(LAYERS):
        source.load(layer, keys[layer, :, :needed], values[layer, :, :needed])
    for start, each in zip(STARTS, CHUNKS, strict=True):
        if start >= needed:
            assert keys[:, :, start:].isnan().all()
            break
        here = slice(start, start + len(each))
        moved = SPEC.rope.shift(each.keys, torch.arange(start, start + len(each)) - each.positions)  # type: ignore[union-attr]
        assert torch.equal(keys[:, :, here], moved) and torch.equal(values[:, :, here], each.values)
    read = 2 if needed == TOTAL else 1  # one chunk is held
    assert store.reads == [group for group in [(0, 1), (1, 9), (9, 25), (25, 30)] for _ in range(read)]


def test_all_lost_chunks_of_a_group_are_named_at_once(store: CountingStore) -> None:
    source = StoreSource(store, KEYS, STARTS, TOTAL, LAYERS, {})
    keys, values = torch.empty(2, TOTAL, 8), torch.empty(2, TOTAL, 8)
    source.load(0, keys, values)
    for key in KEYS[:2]:
        store.delete(key)
    with pytest.raises(LostChunksError) as error:
        source.load(1, keys, values)
    assert error.value.keys == set(KEYS[:2])
