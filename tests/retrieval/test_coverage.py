import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvloom.retrieval.coverage import covering
from kvloom.retrieval.selector import Selection


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    count=st.integers(1, 40),
    coverage=st.floats(0.05, 0.99),
    near=st.sampled_from([-math.inf, 0.0, 2.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_the_fewest_tokens_that_hold_the_share(
    heads: int, group: int, count: int, coverage: float, near: float, seed: int
) -> None:
    """Against a loop over every prefix of the tokens by importance; some ids are none."""
    random = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(heads, count, 8, generator=random), torch.randn(heads * group, 8, generator=random)
    ids = torch.stack([torch.randperm(100, generator=random)[:count] for _ in range(heads)]).sort(1).values
    ids[:, count // 2 + 1 :] = -1
    lse = torch.full((heads * group,), near)
    found = covering(Selection(ids, 7, 3), keys, queries, lse, coverage=coverage, scale=2.0)
    assert (found.read_bytes, found.compared_keys) == (7, 3)
    for head in range(heads):
        own = [place for place in range(count) if ids[head, place] >= 0]
        scores = (queries.view(heads, group, -1)[head] @ keys[head, own].T * 2.0).double()
        exps, beside = scores.exp(), math.exp(near)
        weights = exps / (exps.sum(1, keepdim=True) + beside)
        order = weights.amax(0).argsort(descending=True).tolist()
        shares = [weights[:, order[:n]].sum(1) + beside / (exps.sum(1) + beside) for n in range(len(own) + 1)]
        least = next(n for n, share in enumerate(shares) if bool((share >= coverage - 1e-6).all()))
        kept = [i for i in found.ids[head].tolist() if i >= 0]
        assert kept == sorted(int(ids[head, own[place]]) for place in order[: len(kept)])
        # float32 may disagree about a share that is met to the last digit
        assert len(kept) == least or bool((shares[len(kept)] - coverage).abs().min() < 1e-5)
        assert found.ids[head].tolist()[len(kept) :] == [-1] * (found.ids.shape[1] - len(kept))


def test_what_is_near_may_be_enough() -> None:
    ids = torch.arange(5).expand(2, -1)
    keys, queries = torch.zeros(2, 5, 4), torch.zeros(2, 4)
    near = torch.tensor([50.0, 0.0])
    found = covering(Selection(ids, 0), keys, queries, near, coverage=0.49, scale=1.0)
    assert found.ids.tolist() == [[-1, -1], [0, 1]]  # 1 and 2 of 6 equal shares are 3
    none = covering(Selection(ids, 0), keys, queries, torch.full((2,), 50.0), coverage=0.5, scale=1.0)
    assert none.ids.shape == (2, 0)


def test_everything_and_nothing() -> None:
    ids = torch.arange(4).expand(2, -1)
    keys, queries, near = torch.randn(2, 4, 4), torch.randn(2, 4), torch.zeros(2)
    whole = Selection(ids, 0)
    assert covering(whole, keys, queries, near, coverage=1.0, scale=1.0) is whole
    empty = Selection(ids[:, :0], 0)
    assert covering(empty, keys[:, :0], queries, near, coverage=0.5, scale=1.0) is empty
    none = covering(Selection(torch.full((2, 4), -1), 0), keys, queries, near - math.inf, coverage=0.5, scale=1.0)
    assert none.ids.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keys_of_half_precision(dtype: torch.dtype) -> None:
    keys, queries = torch.randn(1, 9, 16), torch.randn(2, 16)
    ids, near = torch.arange(9)[None], torch.zeros(2)
    wide = covering(Selection(ids, 0), keys.to(dtype).float(), queries, near, coverage=0.6, scale=1.0)
    narrow = covering(Selection(ids, 0), keys.to(dtype), queries, near, coverage=0.6, scale=1.0)
    assert torch.equal(wide.ids, narrow.ids) and 0 < wide.ids.shape[1] < 9
