"""Sketches of keys: what their few directions keep of scores, and an index made of them."""

import pytest
import torch
from torch import Tensor

from kvloom.core import RopeSpec
from kvloom.errors import CodecError
from kvloom.retrieval.registry import selector_by_name
from kvloom.retrieval.selector import KeepsState, LayerShape, LearnsFromQueries, Selector, pooled, top_ids
from kvloom.retrieval.sketch.key_sketch import KeySketch
from kvloom.retrieval.sketch.sketch import SketchIndex
from kvloom.testing import SHAPE, SelectorContract, chosen_mask, make_context, recovered_mass
from kvloom.testing.selector import ROPE

pytest.importorskip("faiss")

SLOW = RopeSpec(inv_freq=tuple(1e-6 * 0.9**i for i in range(16)))  # far is as good as near
FAR = LayerShape(kv_heads=2, group=2, head_dim=32, scale=32**-0.5, rope=SLOW)
READ = 6  # directions that queries of `far` read


def far(tokens: int, *, seed: int = 0, asked: int = 40) -> tuple[Tensor, Tensor]:
    """Keys `[2, T, 32]` that vary most where queries `[4, asked, 32]` do not look; queries at T and behind."""
    random = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(9)))[0]
    sizes = torch.cat((torch.full((READ,), 1.0), torch.full((32 - READ,), 3.0)))
    plain = torch.randn(2, tokens, 32, generator=random) * sizes @ turn + 2.0
    looks = torch.cat((torch.full((READ,), 10.0), torch.full((32 - READ,), 0.02)))
    queries = torch.randn(4, asked, 32, generator=random) * looks @ turn.repeat_interleave(2, 0)
    return SLOW.shift(plain, torch.arange(tokens)), SLOW.shift(queries, tokens + torch.arange(asked))


def built(keys: Tensor, queries: Tensor | None, **parameters) -> SketchIndex:
    index = SketchIndex(FAR, **parameters)
    index.add(keys)
    if queries is not None:
        index.observe(queries, keys.shape[1] + torch.arange(queries.shape[1]))
    index.build()
    return index


def mass(index: SketchIndex, keys: Tensor, queries: Tensor, budget: int) -> float:
    """Recovered by the last 10 queries, mean."""
    count, tokens = queries.shape[1], keys.shape[1]
    found = [
        recovered_mass(queries[:, n], keys, index.select(queries[:, n], tokens + n, budget).ids, FAR)
        for n in range(count - 10, count)
    ]
    return sum(found) / 10


class TestSketchIndex(SelectorContract):
    mass = 0.6  # what a token is worth in these contexts hangs on its exact distance, as for codes

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return SketchIndex(shape, start=start)

    def ready(self, selector: Selector) -> Selector:
        asked = [make_context(64, seed=seed)[2] for seed in range(12)]
        plain = torch.stack([ROPE.shift(q[:, None], -64)[:, 0] for q in asked], 1)
        at = torch.arange(len(selector), len(selector) + 12)
        selector.observe(ROPE.shift(plain, at), at)
        selector.build()
        return selector


class TestBeforeItIsBuilt(SelectorContract):
    mass = 0.85  # it is exact

    def make_selector(self, shape: LayerShape, start: int = 0) -> Selector:
        return SketchIndex(shape, start=start)


def test_it_is_what_the_catalog_makes() -> None:
    found = selector_by_name("sketch", SHAPE, 0, start=16, parameters={"rank": 8})
    assert isinstance(found, SketchIndex) and isinstance(found, LearnsFromQueries) and isinstance(found, KeepsState)
    assert (found.start, found.rank) == (16, 8)
    with pytest.raises(ValueError, match="does not take"):
        selector_by_name("sketch", SHAPE, 0, parameters={"ranks": 8})


def test_directions_of_queries_do_for_what_they_ask() -> None:
    """As few as queries read suffice, though keys vary elsewhere; the keys' own directions do not."""
    keys, queries = far(3000)
    learned, fallback = (built(keys, q, rank=READ, candidate_ratio=1.0) for q in (queries[:, :30], None))
    exact = SketchIndex(FAR)
    exact.add(keys)
    best = mass(exact, keys, queries, 60)
    assert mass(learned, keys, queries, 60) > 0.97 * best
    assert mass(fallback, keys, queries, 60) < 0.7 * best


def test_all_directions_are_the_scores() -> None:
    """Up to what a turn by the mean distance leaves, which these frequencies do not feel, and to 16 bits."""
    keys, queries = far(500)
    moments = torch.eye(32).expand(2, -1, -1)
    sketch = KeySketch.fit(FAR, keys, moments, start=0, rank=32, centroids=4, band=(64, 500))
    scores, rows, _ = sketch.search(queries[:, 0], 500, 500, "max")
    tokens = sketch.tokens_of(torch.arange(500).expand(2, -1), rows)
    assert [sorted(row) for row in tokens.tolist()] == [list(range(500))] * 2
    expected = (queries[:, 0].view(2, 2, -1) @ keys.mT * FAR.scale).flatten(0, 1)
    found = torch.empty_like(expected).scatter_(1, tokens.repeat_interleave(2, 0), scores)
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.std()), rtol=0.02)


def test_candidates_are_the_tokens_of_the_best_codes() -> None:
    keys, queries = far(2000)
    sketch = KeySketch.fit(FAR, keys, None, start=0, rank=8, centroids=64, band=(64, 2000))
    small, _ = sketch.coordinates(queries[:, 3], 2003)
    table = (small.view(2, 2, -1) @ sketch.centroids.float().mT).flatten(0, 1) * FAR.scale
    parts = sketch.state()
    codes = torch.empty(2, 2000, dtype=torch.int64)
    for h in range(2):
        codes[h, parts["tokens"][h].long()] = torch.arange(64).repeat_interleave(parts["counts"][h])
    importance = pooled(table.gather(1, codes.repeat_interleave(2, 0)), FAR)
    scores, rows, _ = sketch.search(queries[:, 3], 2003, 200, "max")
    assert scores.shape == (4, 200) and rows.counts.sum(1).tolist() == [200, 200]
    tokens = sketch.tokens_of(torch.arange(200).expand(2, -1), rows)
    for h in range(2):
        # whole codes, but for the least important one: of that the latest
        least = importance[h, tokens[h]].min()
        above = (importance[h] > least * (1 + 1e-5)).nonzero().flatten().tolist()
        assert set(above) < set(tokens[h].tolist())
        rest = sorted(set(tokens[h].tolist()) - set(above))
        of_least = (codes[h] == codes[h, rest[0]]).nonzero().flatten().tolist()
        assert rest == of_least[len(of_least) - len(rest) :]


def test_few_candidates_find_nearly_what_all_do() -> None:
    keys, queries = far(4000)
    all_of, some = (built(keys, queries[:, :30], rank=8, candidate_ratio=r) for r in (1.0, 0.1))
    assert (all_of.candidates(4000, 50), some.candidates(4000, 50)) == (4000, 400)
    assert mass(some, keys, queries, 50) > 0.9 * mass(all_of, keys, queries, 50) > 0.5
    reads = [index.select(queries[:, -1], 4039, 50).read_bytes for index in (some, all_of)]
    assert reads[0] < reads[1] / 2


def test_candidates_grow_with_the_root_of_long_contexts() -> None:
    index = SketchIndex(FAR, candidate_ratio=0.1, ratio_tokens=10_000)
    assert [index.candidates(n, 10) for n in (100, 10_000, 40_000, 1_000_000)] == [40, 1000, 2000, 10_000]
    assert index.candidates(40_000, 1000) == 4000
    assert index.candidates(30, 20) == 30


@pytest.mark.parametrize("pieces", [[5000], [1, 1023, 1024, 7, 900, 2045], [500] * 10])
def test_what_is_added_behind_is_found(pieces: list[int]) -> None:
    keys, queries = far(8000)
    index = built(keys[:, :3000], queries[:, :30], rank=8, candidate_ratio=0.2)
    whole = built(keys, queries[:, :30], rank=8, candidate_ratio=0.2)
    for piece in keys[:, 3000:].split(pieces, 1):
        index.add(piece)
    assert len(index) == 8000
    assert index.sketch is not None
    assert len(index.sketch) == 3000 + 4 * 1024
    assert index.sketch.sorted_tokens > 6000
    assert mass(index, keys, queries, 80) > 0.95 * mass(whole, keys, queries, 80)
    everything = index.select(queries[:, 0], 8000, 8000).ids
    assert bool(chosen_mask(everything, 8000).all())
    again = built(keys[:, :3000], queries[:, :30], rank=8, candidate_ratio=0.2)
    again.add(keys[:, 3000:])
    for n in range(3):
        assert torch.equal(index.select(queries[:, n], 8000, 99).ids, again.select(queries[:, n], 8000, 99).ids)


@pytest.mark.parametrize("recent", [3, 1024 + 5])
def test_a_token_just_added_can_be_the_one(recent: int) -> None:
    """Exact keys and rows of the sketch are compared with one another."""
    keys, queries = far(3000 + recent)
    index = built(keys[:, :3000], queries[:, :30], rank=8)
    wanted = queries[:, -1].view(2, 2, -1).mean(1)
    keys[:, 3001] = 3 * wanted
    index.add(keys[:, 3000:])
    for budget in (1, 40):
        assert all(3001 in row for row in index.select(queries[:, -1], 3040, budget).ids.tolist())
    # and one that is hopeless does not crowd out what is in the sketch
    behind = index.select(queries[:, 5], 3040, 40).ids
    exact = (queries[:, 5].view(2, 2, -1) @ keys.mT * FAR.scale).flatten(0, 1)
    best = top_ids(pooled(exact, FAR), 40)
    shared = [len(set(a) & set(b)) for a, b in zip(behind.tolist(), best.tolist(), strict=True)]
    assert min(shared) > 25


@pytest.mark.parametrize("added", [0, 5, 1030])
def test_state_makes_the_same_index(added: int) -> None:
    keys, queries = far(2500 + added)
    index = built(keys[:, :2500], queries[:, :30], rank=8)
    index.add(keys[:, 2500:])
    parts = {name: tensor.clone() for name, tensor in index.state().items()}
    again = SketchIndex(FAR)
    again.add(keys)
    again.restore_state(parts)
    assert (len(again), again.rank, again.held_bytes) == (len(index), 8, index.held_bytes)
    for n in range(30, 35):
        assert torch.equal(again.select(queries[:, n], 4000, 77).ids, index.select(queries[:, n], 4000, 77).ids)
    more = far(1100, seed=3)[0]
    index.add(more)
    again.add(more)
    assert torch.equal(again.select(queries[:, 9], 4000, 77).ids, index.select(queries[:, 9], 4000, 77).ids)


def test_state_of_something_else_is_refused() -> None:
    keys, queries = far(600)
    index = built(keys, queries, rank=8)
    parts = dict(index.state())
    with pytest.raises(ValueError, match="no sketch yet"):
        SketchIndex(FAR).state()
    with pytest.raises(CodecError, match="a sketch of 600 tokens"):
        index.restore_state(parts)  # there is one already

    def refused(changed: dict[str, Tensor], match: str, tokens: int = 600) -> None:
        fresh = SketchIndex(FAR)
        fresh.add(keys[:, :tokens])
        with pytest.raises(CodecError, match=match):
            fresh.restore_state(changed)
        assert fresh.sketch is None

    refused(parts, "600 tokens for 599", tokens=599)
    refused({name: t for name, t in parts.items() if name != "sketch.rows"}, "rows of a key sketch are missing")
    refused(parts | {"sketch.rows": parts["sketch.rows"].float()}, "contradicts itself")
    refused(parts | {"sketch.keys": parts["sketch.keys"][:1]}, "contradicts itself")
    refused(parts | {"sketch.mean": parts["sketch.mean"] / 0}, "not finite")
    refused(parts | {"sketch.band": torch.tensor([7, 7])}, "contradicts itself")
    twice = parts["sketch.tokens"].clone()
    twice[0, 0] = twice[0, 1]
    refused(parts | {"sketch.tokens": twice}, "each token once")
    refused(parts | {"sketch.counts": parts["sketch.counts"] + 1}, "each token once")


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_fewer_tokens_than_centroids(tokens: int) -> None:
    keys, queries = far(tokens)
    index = built(keys, queries)
    for budget in (1, max(1, tokens - 1)):
        ids = index.select(queries[:, 0], tokens, budget).ids
        assert ids.shape == (2, min(budget, tokens))
        assert bool((chosen_mask(ids, tokens).sum(1) == ids.shape[1]).all())


@pytest.mark.parametrize("case", ["keys alike", "queries zero", "keys huge", "no rotation"])
def test_what_has_no_directions_is_searched_all_the_same(case: str) -> None:
    keys, queries = far(700)
    if case == "keys alike":
        keys = torch.ones_like(keys)
    if case == "keys huge":
        keys = keys * 1e6
        keys[:, 50] *= 1e9
    shape = LayerShape(2, 2, 32, 32**-0.5) if case == "no rotation" else FAR
    index = SketchIndex(shape, rank=8)
    index.add(keys)
    index.observe(queries * 0 if case == "queries zero" else queries, 700 + torch.arange(40))
    index.build()
    assert index.sketch is not None and bool(index.sketch.state()["rows"].isfinite().all())
    ids = index.select(queries[:, 0], 740, 70).ids
    assert bool((chosen_mask(ids, 700).sum(1) == 70).all())


def test_what_cannot_be_learned_from_is_refused() -> None:
    index = SketchIndex(FAR)
    _, queries = far(10)
    at = torch.arange(40)
    with pytest.raises(ValueError, match="not finite"):
        index.observe(queries / 0, at)
    with pytest.raises(ValueError, match="queries are"):
        index.observe(queries[:1], at)
    with pytest.raises(ValueError, match="positions are"):
        index.observe(queries, at[:3])
    index.build()  # nothing to build
    assert index.sketch is None
    for wrong in ({"rank": 0}, {"candidate_ratio": 0.0}, {"candidates_a_token": 0.5}, {"pooling": "mean"},
                  {"offset_tokens": -1}, {"centroids": 0}):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SketchIndex(FAR, **wrong)


def test_what_is_held_is_counted() -> None:
    keys, queries = far(4096)
    index = SketchIndex(FAR, rank=8)
    index.add(keys)
    assert index.held_bytes == 0
    index.observe(queries, 4096 + torch.arange(40))
    index.build()
    bases, books = 2 * (32 + 2 * 32 * 8) * 4, 2 * 512 * (8 * 2 + 8)
    assert index.held_bytes == 2 * 4096 * (8 * 2 + 4) + bases + books


def test_queries_may_lie_in_any_order() -> None:
    keys, queries = far(900)
    strided = queries.transpose(0, 1).contiguous().transpose(0, 1)
    found = [built(keys, q, rank=8).select(queries[:, 1], 940, 50).ids for q in (queries, strided)]
    assert torch.equal(*found)
    unturned = SketchIndex(LayerShape(2, 2, 32, 0.2))
    unturned.observe(strided, torch.arange(40))
