"""Moving keys: what `RopeSpec.shift` promises beyond the algebra in `test_core.py`."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvloom.connectors.hf.model import TransformersModel
from kvloom.core import RopeSpec
from kvloom.testing import ROPE, same_bits

from ..support.models import CONFIGS, ROPES, make_model

HEAD_DIM = 2 * len(ROPE.inv_freq)


def make_keys(*shape: int) -> Tensor:
    return torch.randn(*shape, HEAD_DIM, generator=torch.Generator().manual_seed(7))


@given(st.integers(-50_000, 50_000), st.booleans())
def test_there_and_back_is_identity(offset: int, interleaved: bool) -> None:
    rope, keys = replace(ROPE, interleaved=interleaved), make_keys(2, 6)
    there = rope.shift(keys, offset)
    assert torch.allclose(rope.shift(there, -offset), keys, atol=1e-6)
    assert torch.allclose(there.norm(dim=-1), keys.norm(dim=-1), rtol=1e-5)
    assert offset == 0 or not torch.allclose(there, keys, atol=1e-3)


@given(st.lists(st.integers(-1000, 1000), min_size=6, max_size=6), st.booleans())
def test_offsets_by_token(offsets: list[int], interleaved: bool) -> None:
    rope, keys = replace(ROPE, interleaved=interleaved), make_keys(3, 2, 6)
    moved = rope.shift(keys, torch.tensor(offsets))
    alone = [rope.shift(keys[:, :, i : i + 1], offset) for i, offset in enumerate(offsets)]
    assert torch.allclose(moved, torch.cat(alone, dim=2), atol=1e-6)


def test_interleaved_is_a_permutation_of_halves() -> None:
    keys = make_keys(2, 6)
    pairs = torch.arange(HEAD_DIM).view(2, -1).T.reshape(-1)  # half layout -> interleaved layout
    expected = ROPE.shift(keys, 37)[..., pairs]
    assert torch.allclose(replace(ROPE, interleaved=True).shift(keys[..., pairs], 37), expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_keys_are_rounded_once(dtype: torch.dtype) -> None:
    keys = make_keys(2, 6).to(dtype)
    moved = ROPE.shift(keys, 4321)
    assert same_bits(moved, ROPE.shift(keys.float(), 4321).to(dtype))
    assert ROPE.shift(keys, 0) is keys


def test_keys_are_left_alone_in_any_layout() -> None:
    keys = make_keys(6, 2).transpose(0, 1)
    before = keys.clone()
    moved = ROPE.shift(keys, 5)
    assert same_bits(keys, before) and torch.equal(moved, ROPE.shift(before, 5))


def test_no_tokens() -> None:
    assert ROPE.shift(make_keys(2, 0), torch.empty(0, dtype=torch.int64)).shape == (2, 0, HEAD_DIM)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("architecture", CONFIGS)
def test_shift_agrees_with_the_models_own_rotation(architecture: str, rope: str) -> None:
    """Keys of one hidden state at two positions, rotated by the model, differ by exactly one shift."""
    model = TransformersModel(make_model(architecture, rope=rope), model_id="m")
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    here, there = torch.tensor([0, 1, 2, 3, 40]), torch.tensor([0, 100, 33, 250, 41])
    with torch.no_grad():
        (_, moved, _), (_, keys, _) = (model.qkv(1, hidden, positions) for positions in (there, here))
    assert isinstance(model.spec.rope, RopeSpec)
    assert (model.spec.rope.attention_scaling != 1.0) == (rope in ("yarn", "longrope"))
    assert torch.allclose(model.spec.rope.shift(keys, there - here), moved, atol=2e-5)
    assert not torch.allclose(keys, moved, atol=0.1)
