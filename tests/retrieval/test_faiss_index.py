import numpy as np
import pytest
import torch

pytest.importorskip("faiss")

from kvloom.bench.retrieval.faiss_index import HnswIndex, IvfIndex
from kvloom.core import GrowableIndex
from kvloom.retrieval.per_head import PerHeadSelector
from kvloom.retrieval.selector import LayerShape, Selector
from kvloom.testing import SelectorContract


class TestIvf(SelectorContract):
    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return PerHeadSelector(shape, lambda dim: IvfIndex(dim, nprobe=8), name="ivf", start=start)


class TestHnsw(SelectorContract):
    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return PerHeadSelector(shape, HnswIndex, name="hnsw", start=start)


@pytest.mark.parametrize("make", [IvfIndex, HnswIndex])
def test_scores_are_the_inner_products_of_the_ids(make) -> None:
    random = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(2000, 16, generator=random), torch.randn(3, 16, generator=random)
    index = make(16)
    assert index.search(queries, 4)[1].tolist() == [[-1] * 4] * 3
    index.add(keys[:700])
    index.add(keys[700:])
    assert isinstance(index, GrowableIndex)
    found = index.search_with_cost(queries, 10)
    torch.testing.assert_close(found.scores, (queries[:, None] * keys[found.ids]).sum(-1))
    best = (queries @ keys.T).topk(10).indices
    assert np.mean([len(set(a) & set(b)) for a, b in zip(found.ids.tolist(), best.tolist(), strict=True)]) >= 6
    assert 10 < index.search_with_cost(queries[:1], 10).compared_keys < 2000
    assert found.read_bytes >= found.compared_keys * 64
    assert index.held_bytes > 0
    everything = index.search_with_cost(queries, 2000)
    assert sorted(everything.ids[0].tolist()) == list(range(2000))
    assert everything.compared_keys == 2000
    with pytest.raises(ValueError, match="queries are"):
        index.search(queries * torch.nan, 3)


def test_lists_that_are_read_are_what_is_counted() -> None:
    """Clusters far apart: one list of ten is a tenth of the keys."""
    random = torch.Generator().manual_seed(3)
    centres = 50 * torch.eye(10)
    keys = centres.repeat(40, 1) + torch.randn(400, 10, generator=random)
    index = IvfIndex(10, nprobe=1, nlist=10)
    index.add(keys)
    found = index.search_with_cost(centres[3:4], 5)
    assert (found.ids % 10 == 3).all()
    assert found.compared_keys == 40
    assert index.search_with_cost(centres[3:4].expand(2, -1), 5).compared_keys == 40
    assert index.search_with_cost(centres[3:5], 5).compared_keys == 80
