"""Partial attention: parts that share no token make the whole, wherever their keys lie."""

from functools import partial

import torch

from kvloom.retrieval.attention import attend, attend_at, attend_selected
from kvloom.retrieval.paged_kv import PagedKV
from kvloom.retrieval.selector import Selection


def test_near_chosen_and_rest_make_the_whole() -> None:
    """Of a context's tensors and of pages alike; without chosen tokens, `near` alone."""
    random = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 96, 16, generator=random), torch.randn(2, 96, 8, generator=random)
    queries, scale = torch.randn(4, 16, generator=random), 0.25
    pages = PagedKV(32)
    pages.append(keys, values)
    near = attend(queries, keys[:, 64:], values[:, 64:], scale=scale)
    ids = torch.stack([torch.arange(0, 64, 2), torch.arange(1, 65, 2)])
    others = torch.stack([torch.arange(1, 65, 2), torch.arange(0, 64, 2)])
    rest = attend_at(queries, keys, values, others, scale=scale)
    whole = attend(queries, keys, values, scale=scale)
    for attend_ids in (
        partial(attend_at, queries, keys, values, scale=scale),
        partial(pages.attend, queries, scale=scale),
    ):
        torch.testing.assert_close(attend_selected(near, Selection(ids, 0, rest=lambda _: rest), attend_ids), whole)
        without = attend_selected(near, Selection(ids, 0), attend_ids)
        assert not torch.allclose(without[0], whole[0], atol=1e-3)
        nothing = Selection(torch.empty(2, 0, dtype=torch.int64), 0)
        torch.testing.assert_close(attend_selected(near, nothing, attend_ids), near)
