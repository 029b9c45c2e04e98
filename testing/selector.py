"""What every selector must do, and contexts in which a query attends to few tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..core import RopeSpec
from ..retrieval.attention import attend, attend_at, merge
from ..retrieval.selector import LayerShape, Selector, TravelsWithChunks

ROPE = RopeSpec(inv_freq=tuple(10000.0 ** -(i / 16) for i in range(16)))
SHAPE = LayerShape(kv_heads=2, group=2, head_dim=32, scale=32**-0.5, rope=ROPE)


def make_context(
    tokens: int, *, seed: int = 0, shape: LayerShape = SHAPE, v_dim: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    """A context, and a query that attends to few of its tokens.

    Every four neighbouring tokens share one of 12 topics. The key and the query of a topic share a direction before
    rotation.

    Returns
    -------
    tuple : keys `[H, T, D]` after rotation, values `[H, T, Dv]`, and a query `[Hq, D]` at position T.
    """
    random = torch.Generator().manual_seed(seed)
    topics = torch.randn(12, shape.kv_heads, shape.head_dim, generator=random)
    of_token = torch.randint(0, 12, (tokens // 4 + 1,), generator=random).repeat_interleave(4)[:tokens]
    keys = topics[of_token].transpose(0, 1) + 0.4 * torch.randn(
        shape.kv_heads, tokens, shape.head_dim, generator=random
    )
    queries = 2.5 * topics[3].repeat_interleave(shape.group, 0) + 0.3 * torch.randn(
        shape.query_heads, shape.head_dim, generator=random
    )
    if shape.rope is not None:
        keys = shape.rope.shift(keys, torch.arange(tokens))
        queries = shape.rope.shift(queries[:, None], tokens)[:, 0]
    return keys, torch.randn(shape.kv_heads, tokens, v_dim, generator=random), queries


def recovered_mass(queries: Tensor, keys: Tensor, ids: Tensor, shape: LayerShape = SHAPE) -> float:
    """Share of the softmax over all tokens that falls on the chosen ones, mean over query heads."""
    scores = (queries.view(shape.kv_heads, shape.group, -1) @ keys.mT) * shape.scale
    weights = scores.softmax(-1)
    return float((weights * chosen_mask(ids, keys.shape[1])[:, None]).sum(-1).mean())


def chosen_mask(ids: Tensor, tokens: int) -> Tensor:
    """Which of `tokens` tokens are among `ids` `[H, K]`, where -1 is no token: `[H, S]` bool."""
    marked = torch.zeros(len(ids), tokens + 1, dtype=torch.bool)
    return marked.scatter_(1, torch.where(ids < 0, tokens, ids), True)[:, :tokens]


class SelectorContract:
    """Subclasses give `make_selector(shape, start)`.

    Attributes
    ----------
    mass : share of the softmax over 600 tokens that `budget` tokens must recover, mean of three contexts.
    """

    mass = 0.8
    budget = 48

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        """A selector without tokens."""
        raise NotImplementedError

    def ready(self, selector: Selector) -> Selector:
        """Does what an index needs after tokens were added: observed queries, a build."""
        return selector

    def filled(
        self, tokens: int, *, seed: int = 0, shape: LayerShape = SHAPE, start: int = 0
    ) -> tuple[Selector, Tensor, Tensor, Tensor]:
        """A selector with `tokens` tokens from `start` on, and keys, values and query of the whole context."""
        keys, values, queries = make_context(start + tokens, seed=seed, shape=shape)
        selector = self.make_selector(shape, start)
        selector.add(keys[:, start:], values[:, start:])
        return self.ready(selector), keys, values, queries

    def test_it_is_a_selector(self) -> None:
        assert isinstance(self.make_selector(SHAPE), Selector)

    @pytest.mark.parametrize("tokens", [0, 1, 5, 8, 13, 300])
    def test_budget_of_all_is_everything(self, tokens: int) -> None:
        selector, keys, values, queries = self.filled(tokens)
        assert len(selector) == tokens
        ids = selector.select(queries, tokens, tokens).ids
        assert [sorted(i for i in row if i >= 0) for row in ids.tolist()] == [list(range(tokens))] * 2
        whole = attend(queries, keys, values, scale=SHAPE.scale)
        torch.testing.assert_close(attend_at(queries, keys, values, ids, scale=SHAPE.scale), whole)
        assert sorted(selector.select(queries, tokens, 10 * tokens + 10).ids[0].tolist())[-tokens:] == list(
            range(tokens)
        )

    @pytest.mark.parametrize("start", [0, 16])
    def test_chosen_tokens_are_some_of_its_own_and_none_twice(self, start: int) -> None:
        selector, keys, _, queries = self.filled(301, start=start)
        for budget in (1, 7, 48, 200):
            selection = selector.select(queries, keys.shape[1], budget)
            assert selection.ids.dtype == torch.int64
            assert selection.ids.shape[0] == SHAPE.kv_heads
            assert selection.ids.shape[1] <= budget
            for row in selection.ids.tolist():
                kept = [i for i in row if i >= 0]
                assert len(set(kept)) == len(kept)
                assert all(start <= i < start + 301 for i in kept)
                assert row[len(kept) :] == [-1] * (len(row) - len(kept))

    def test_it_finds_what_matters(self) -> None:
        masses = []
        for seed in range(3):
            selector, keys, _, queries = self.filled(600, seed=seed)
            masses.append(recovered_mass(queries, keys, selector.select(queries, 600, self.budget).ids))
        assert sum(masses) / 3 >= self.mass

    def test_what_was_chosen_and_the_rest_make_the_whole(self) -> None:
        selector, keys, values, queries = self.filled(200)
        ids = selector.select(queries, 200, 40).ids
        rest = ~chosen_mask(ids, 200)
        parts = [
            attend_at(queries, keys, values, ids, scale=SHAPE.scale),
            attend(queries, keys, values, scale=SHAPE.scale, visible=rest),
        ]
        torch.testing.assert_close(merge(parts), attend(queries, keys, values, scale=SHAPE.scale))

    def test_adding_in_pieces_is_adding_at_once(self) -> None:
        whole, keys, values, queries = self.filled(301)
        pieces = self.make_selector(SHAPE)
        for a, b in ((0, 1), (1, 64), (64, 64), (64, 77), (77, 256), (256, 301)):
            pieces.add(keys[:, a:b], values[:, a:b])
        pieces = self.ready(pieces)
        assert len(pieces) == len(whole) == 301
        for budget in (1, 16, 100):
            at_once, in_pieces = whole.select(queries, 301, budget), pieces.select(queries, 301, budget)
            assert torch.equal(at_once.ids.sort().values, in_pieces.ids.sort().values)

    def test_the_same_question_has_the_same_answer(self) -> None:
        selector, _, _, queries = self.filled(300)
        twin, *_ = self.filled(300)
        assert torch.equal(selector.select(queries, 300, 32).ids, twin.select(queries, 300, 32).ids)

    def test_what_cannot_be_searched_is_refused(self) -> None:
        selector, keys, values, queries = self.filled(64)
        with pytest.raises(ValueError, match="queries are not finite"):
            selector.select(queries * torch.nan, 64, 8)
        with pytest.raises(ValueError, match="queries are"):
            selector.select(queries[:1], 64, 8)
        with pytest.raises(ValueError, match="keys are not finite"):
            selector.add(keys / 0.0, values)
        with pytest.raises(ValueError, match="keys are"):
            selector.add(keys[:1], values[:1])
        with pytest.raises(ValueError, match="budget is -1"):
            selector.select(queries, 64, -1)
        assert len(selector) == 64

    def test_it_says_what_it_costs(self) -> None:
        selector, _, _, queries = self.filled(300)
        selection = selector.select(queries, 300, 32)
        assert selection.read_bytes >= 0
        assert 0 <= selection.compared_keys <= 2 * 300
        assert selector.held_bytes >= 0

    def test_it_travels_with_chunks(self) -> None:
        selector, _, _, queries = self.filled(301)
        if not isinstance(selector, TravelsWithChunks):
            pytest.skip("this index does not travel with chunks")
        again = self.make_selector(SHAPE)
        assert isinstance(again, TravelsWithChunks)
        for a, b in ((0, 64), (64, 256), (256, 301)):
            again.restore({name: t.clone() for name, t in selector.export(a, b).items()}, b - a)
        assert len(again) == 301
        assert torch.equal(self.ready(again).select(queries, 301, 40).ids, selector.select(queries, 301, 40).ids)
