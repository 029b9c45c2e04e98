"""Attention of scattered queries against the same thing written out in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.blend.attention import causal_attention


def make_inputs(
    positions: list[int], tokens: int, *, kv_heads: int = 2, group: int = 2, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries at `positions`, keys and values of `tokens`, positions; head dim 8, value dim 6."""
    random = torch.Generator().manual_seed(seed)
    shapes = (kv_heads * group, len(positions), 8), (kv_heads, tokens, 8), (kv_heads, tokens, 6)
    queries, keys, values = (torch.randn(*shape, generator=random) for shape in shapes)
    return queries, keys, values, torch.tensor(positions, dtype=torch.int64)


def reference(
    queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor, *, scale: float, window_tokens: int | None
) -> Tensor:
    """Every score written out, in float64."""
    group = len(queries) // len(keys)
    wide_keys, wide_values = (t.double().repeat_interleave(group, dim=0) for t in (keys, values))
    distance = positions[:, None] - torch.arange(keys.shape[1])
    unseen = (distance < 0) if window_tokens is None else (distance < 0) | (distance >= window_tokens)
    scores = (queries.double() @ wide_keys.mT * scale).masked_fill(unseen, -torch.inf)
    return scores.softmax(dim=-1) @ wide_values


@st.composite
def scattered(draw: st.DrawFn) -> tuple[list[int], int]:
    tokens = draw(st.integers(1, 48))
    return sorted(draw(st.sets(st.integers(0, tokens - 1), min_size=1))), tokens


@given(
    scattered(), st.sampled_from([1, 2, 3]), st.sampled_from([1, 2, 4]), st.none() | st.integers(1, 60), st.integers(0)
)
def test_equals_reference(
    where: tuple[list[int], int], kv_heads: int, group: int, window_tokens: int | None, seed: int
) -> None:
    inputs = make_inputs(*where, kv_heads=kv_heads, group=group, seed=seed % 2**32)
    out = causal_attention(*inputs, scale=0.3, window_tokens=window_tokens)
    expected = reference(*inputs, scale=0.3, window_tokens=window_tokens)
    assert out.dtype == torch.float32 and torch.allclose(out.double(), expected, atol=2e-6)


@pytest.mark.parametrize("window_tokens", [None, 1, 50, 400])
@pytest.mark.parametrize("count", [256, 257, 600, 700])
def test_many_queries(count: int, window_tokens: int | None) -> None:
    positions = torch.randperm(700, generator=torch.Generator().manual_seed(count))[:count].sort().values.tolist()
    inputs = make_inputs(positions, 700, kv_heads=1, group=2)
    out = causal_attention(*inputs, scale=0.5, window_tokens=window_tokens)
    expected = reference(*inputs, scale=0.5, window_tokens=window_tokens)
    assert torch.allclose(out.double(), expected, atol=2e-6)


@pytest.mark.parametrize("window_tokens", [None, 5])
def test_what_a_query_does_not_see_changes_nothing(window_tokens: int | None) -> None:
    positions = [3, 4, 11, 12, 29]
    queries, keys, values, where = make_inputs(positions, 40)
    out = causal_attention(queries, keys, values, where, scale=0.3, window_tokens=window_tokens)
    for index, position in enumerate(positions):
        seen = torch.zeros(40, dtype=torch.bool)
        seen[0 if window_tokens is None else max(0, position + 1 - window_tokens) : position + 1] = True
        other_keys, other_values = keys.clone(), values.clone()
        other_keys[:, ~seen], other_values[:, ~seen] = 50.0, -1e4
        again = causal_attention(queries, other_keys, other_values, where, scale=0.3, window_tokens=window_tokens)
        assert torch.equal(again[:, index], out[:, index])
        other_values[:, position] += 1.0
        moved = causal_attention(queries, other_keys, other_values, where, scale=0.3, window_tokens=window_tokens)
        assert (moved[:, index] > out[:, index]).all()  # its own key is seen


def test_a_query_at_the_start_sees_itself_alone() -> None:
    queries, keys, values, where = make_inputs([0], 9)
    out = causal_attention(queries, keys, values, where, scale=0.3)
    assert torch.allclose(out[:, 0], values[:, 0].repeat_interleave(2, dim=0))


def test_no_queries() -> None:
    assert causal_attention(*make_inputs([], 9), scale=0.3).shape == (4, 0, 6)


def test_queries_in_any_layout() -> None:
    """Engines hand over transposed views."""
    queries, keys, values, where = make_inputs([1, 5, 8], 9)
    strided = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (queries, keys, values)]
    assert not strided[0].is_contiguous()
    expected = causal_attention(queries, keys, values, where, scale=0.3)
    assert torch.allclose(causal_attention(*strided, where, scale=0.3), expected, atol=1e-6)
