"""Pools beside the KV: what prefixes they can restore, and their pages as bytes."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvloom.connectors.sglang.side_pools import SidePool, restorable_prefixes, transfer_pages
from kvloom.core import ChunkKey
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import make_key


class Rows:
    """A pool of one row of numbers a page, as SGLang's host pools give and take them."""

    layout, dtype, page_size = "layer_first", torch.float32, 2

    def __init__(self, pages: int = 4) -> None:
        self.rows = torch.arange(pages * 6, dtype=torch.float32).view(pages, 6).clone()

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        return self.rows[index // 2]

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(6)

    def set_from_flat_data_page(self, index: int, page: torch.Tensor) -> None:
        self.rows[index // 2] = page


def transfer(policy: str, keys: int = 1, name: str = "swa") -> Any:
    return SimpleNamespace(name=name, hit_policy=policy, keys=[""] * keys)


@pytest.mark.parametrize(
    ("held", "asked", "expected", "reach"),
    [
        ({0, 1, 2, 3}, transfer("all_pages"), [1, 2, 3, 4], 4),
        ({0, 1, 3}, transfer("all_pages"), [1, 2], 2),
        ({1, 3}, transfer("trailing_pages"), [2, 4], 4),
        ({1, 2}, transfer("trailing_pages", 2), [3], 3),
        ({0}, transfer("trailing_pages", 3), [1], 1),
        (set(), transfer("trailing_pages"), [], 0),
        (set(), transfer("all_pages"), [], 0),
    ],
)
def test_restorable_prefixes(held: set[int], asked: Any, expected: list[int], reach: int) -> None:
    assert restorable_prefixes(4, [asked], lambda _, page: page in held) == (expected, {"swa": reach})


def test_all_pools_must_agree() -> None:
    pools = {"swa": {1, 3}, "indexer": {0, 1, 2}}
    asked = [transfer("trailing_pages"), transfer("all_pages", name="indexer")]
    assert restorable_prefixes(4, asked, lambda name, page: page in pools[name])[0] == [2]
    assert restorable_prefixes(2, [transfer("block_groups")], lambda *_: False) == ([1, 2], {}), "no verdict of ours"


def test_pages_are_bytes() -> None:
    source, target = Rows(), Rows()
    target.rows.zero_()
    keys: list[ChunkKey] = [make_key(i) for i in range(3)]
    with KVStore([HostTier(1 << 20)]) as store:
        pools = {"swa": SidePool("swa", source, "rank 0 of 1")}
        asked = SimpleNamespace(name="swa", host_indices=torch.arange(2, 8))
        assert transfer_pages(pools, asked, keys, lambda pool, key, at: pool.write(store, key, at)) == [True] * 3
        into = {"swa": SidePool("swa", target, "rank 0 of 1")}
        assert transfer_pages(into, asked, keys, lambda pool, key, at: pool.read(store, key, at)) == [True] * 3
        assert torch.equal(target.rows[1:], source.rows[1:]) and not target.rows[0].any()
        for other in (SidePool("mamba", target, "rank 0 of 1"), SidePool("swa", target, "rank 1 of 2")):
            assert not other.read(store, keys[0], 0), "another pool, another rank"
        lost = [keys[0], make_key(9), keys[2]]
        assert transfer_pages(into, asked, lost, lambda pool, key, at: pool.read(store, key, at)) == [
            True,
            False,
            False,
        ]
        short = SimpleNamespace(name="swa", host_indices=torch.arange(3))
        assert transfer_pages(into, short, keys, lambda pool, key, at: pool.read(store, key, at)) == [False] * 3
