"""Choices by codes, compiled and in torch, against scores of every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.retrieval.kernels import code_ops, ops
from kvloom.retrieval.kernels.code_ops import (
    code_counts,
    code_importance,
    pack_codes,
    packed_code_bytes,
    unpack_codes,
    vq_scores,
    vq_select,
)
from kvloom.retrieval.selector import LayerShape, pooled


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def path(request: pytest.FixtureRequest) -> str:
    """Each test runs with numba's kernels and without."""
    if request.param == "torch":
        request.getfixturevalue("monkeypatch").setattr(code_ops, "compiled_for_cpu", lambda *_: None)
    elif ops.compiled_for_cpu("code_ops_numba") is None:
        pytest.skip("numba is not installed: pip install 'kvloom[retrieval]'")
    return request.param


def random_codes(kv_heads: int, tokens: int, codes: int, seed: int) -> Tensor:
    return torch.randint(0, codes, (kv_heads, tokens), generator=torch.Generator().manual_seed(seed))


def random_table(query_heads: int, codes: int, seed: int) -> Tensor:
    return 3 * torch.randn(query_heads, codes, generator=torch.Generator().manual_seed(seed))


def roomy(packed: Tensor) -> Tensor:
    """The same rows with bytes behind them that mean nothing."""
    return torch.nn.functional.pad(packed, (0, 7), value=255)[:, : packed.shape[1] + 5]


@given(bits=st.sampled_from([12, 16]), tokens=st.integers(0, 40), seed=st.integers(0, 99))
def test_packing(bits: int, tokens: int, seed: int) -> None:
    codes = random_codes(2, tokens, 1 << bits, seed)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, packed_code_bytes(tokens, bits))
    assert torch.equal(unpack_codes(packed, bits, tokens), codes)
    assert torch.equal(unpack_codes(roomy(packed), bits, tokens), codes)


def test_layout_is_fixed() -> None:
    assert pack_codes(torch.tensor([[0xABC, 0x123, 0xDEF]]), 12).tolist() == [[0xBC, 0x3A, 0x12, 0xEF, 0x0D]]
    assert pack_codes(torch.tensor([[0xABCD, 1]]), 16).tolist() == [[0xCD, 0xAB, 1, 0]]
    assert packed_code_bytes(524288, 12) == 786432


shapes = given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 4)),
    codes=st.sampled_from([1, 3, 40, 4096]),
    tokens=st.sampled_from([1, 2, 7, 8, 9, 31, 200]),
    bits=st.sampled_from([12, 16]),
    seed=st.integers(0, 999),
)


@settings(max_examples=50)
@shapes
def test_scores_and_counts(heads, codes, tokens, bits, seed) -> None:
    H, G = heads
    of_tokens, table = random_codes(H, tokens, codes, seed), random_table(H * G, codes, seed)
    packed = roomy(pack_codes(of_tokens, bits))
    true = torch.stack([table[head, of_tokens[head // G]] for head in range(H * G)])
    assert torch.equal(vq_scores(table, packed, tokens, bits=bits), true)
    counts = code_counts(packed, tokens, codes, bits=bits)
    assert counts.tolist() == [row.bincount(minlength=codes).tolist() for row in of_tokens]
    shape = LayerShape(H, G, 1, 1.0)
    for pooling in ("max", "sum"):
        importance = code_importance(table, counts, pooling=pooling)
        torch.testing.assert_close(vq_scores(importance.exp(), packed, tokens, bits=bits), pooled(true, shape, pooling))


@settings(max_examples=80)
@given(budget=st.integers(0, 210), ties=st.booleans(), data=st.data())
def test_selection(budget, ties, data) -> None:
    """The best tokens of all by score, and of those that score alike the last."""
    H, codes = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 3, 40, 4096]))
    tokens, bits = data.draw(st.sampled_from([1, 2, 7, 8, 9, 31, 200])), data.draw(st.sampled_from([12, 16]))
    seed = data.draw(st.integers(0, 999))
    of_tokens, importance = random_codes(H, tokens, codes, seed), random_table(H, codes, seed)
    if ties:
        importance = importance.round() * 0.0 if seed % 5 == 0 else importance.round()  # zeros of both signs
    packed = roomy(pack_codes(of_tokens, bits))
    counts = code_counts(packed, tokens, codes, bits=bits)
    ids = vq_select(importance, packed, tokens, counts, budget, bits=bits)
    scores = importance.gather(1, of_tokens)
    for row, of_head in zip(ids.tolist(), scores.tolist(), strict=True):
        ranked = sorted(range(tokens), key=lambda n: (-of_head[n], -n))
        assert row == sorted(ranked[:budget])


@settings(max_examples=40)
@given(
    tokens=st.sampled_from([1, 9, 31, 200]),
    codes=st.sampled_from([1, 5, 40]),
    cuts=st.lists(st.floats(0, 1), min_size=1, max_size=4),
    bits=st.sampled_from([12, 16]),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_bands_have_their_own_tables(tokens, codes, cuts, bits, share, seed) -> None:
    band_starts = sorted(round(cut * tokens) for cut in cuts)
    of_tokens, all_codes = random_codes(2, tokens, codes, seed), codes * (len(band_starts) + 1)
    packed, table = pack_codes(of_tokens, bits), random_table(4, all_codes, seed)
    in_bands = torch.stack([of_tokens[:, n] + codes * sum(n >= edge for edge in band_starts) for n in range(tokens)], 1)
    true = torch.stack([table[head, in_bands[head // 2]] for head in range(4)])
    assert torch.equal(vq_scores(table, packed, tokens, bits=bits, band_starts=band_starts), true)
    counts = code_counts(packed, tokens, all_codes, bits=bits, band_starts=band_starts)
    assert counts.tolist() == [row.bincount(minlength=all_codes).tolist() for row in in_bands]
    importance = code_importance(table, counts)
    scores = importance.gather(1, in_bands)
    torch.testing.assert_close(scores.exp(), pooled(true, LayerShape(2, 2, 1, 1.0)))
    budget = int(share * tokens)
    ids = vq_select(importance, packed, tokens, counts, budget, bits=bits, band_starts=band_starts)
    for row, of_head in zip(ids.tolist(), scores.tolist(), strict=True):
        assert row == sorted(sorted(range(tokens), key=lambda n: (-of_head[n], -n))[:budget])


def test_selection_of_masked_codes() -> None:
    """Codes of importance -inf come last, and equals among them by recency."""
    packed = pack_codes(torch.tensor([[0, 1, 2, 1, 0]]), 12)
    counts = code_counts(packed, 5, 3)
    importance = torch.tensor([[-torch.inf, -torch.inf, -80.0]])
    assert vq_select(importance, packed, 5, counts, 3).tolist() == [[2, 3, 4]]


def test_importance_survives_hot_heads() -> None:
    """Weights that float32 cannot hold still rank codes."""
    importance = code_importance(torch.tensor([[0.0, -200.0, -300.0]]), torch.tensor([[1, 1, 1]]))
    assert importance.tolist() == [[0.0, -200.0, -300.0]]


def test_codes_of_no_token_take_no_share() -> None:
    table = torch.tensor([[5.0, 1.0, 1.0], [0.0, 2.0, 2.0]])
    for pooling, share in (("max", 0.25), ("sum", 0.5)):
        importance = code_importance(table, torch.tensor([[0, 3, 1]]), pooling=pooling)
        torch.testing.assert_close(importance[0, 1:].exp(), torch.tensor([share, share]))
    assert code_importance(table, torch.zeros(1, 3, dtype=torch.int64)).tolist() == [[-torch.inf] * 3]


def test_what_does_not_fit_is_refused() -> None:
    packed = pack_codes(torch.tensor([[0, 1, 5]]), 12)
    counts = code_counts(packed, 3, 6)
    table = torch.zeros(1, 6)
    for message, call in (
        ("a code is 5; expected below 5", lambda: code_counts(packed, 3, 5)),
        ("bits is 8", lambda: pack_codes(torch.zeros(1, 1), 8)),
        ("4 codes of 12 bits take 6", lambda: unpack_codes(packed, 12, 4)),
        ("4 codes of 12 bits take 6", lambda: vq_scores(table, packed, 4)),
        ("3 query heads cannot share 2", lambda: vq_scores(torch.zeros(3, 6), packed.repeat(2, 1), 3)),
        ("table is", lambda: vq_scores(table[0], packed, 3)),
        ("codes 6; expected .* a multiple of 4", lambda: vq_scores(table, packed, 3, band_starts=[1, 1, 2])),
        (r"band_starts are \[2, 1\]", lambda: vq_scores(table, packed, 3, band_starts=[2, 1])),
        (r"band_starts are \[4\]", lambda: code_counts(packed, 3, 12, band_starts=[4])),
        ("table is", lambda: code_importance(table, counts[:, :5])),
        ("'mean'", lambda: code_importance(table, counts, pooling="mean")),
        ("budget is -1", lambda: vq_select(table, packed, 3, counts, -1)),
        ("importance is", lambda: vq_select(table, packed, 3, counts.int(), 1)),
        (r"counts add up to \[3\]; expected 2", lambda: vq_select(table, packed, 2, counts, 1)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
