"""Packing of codes: round trips, sizes and the layout that stored chunks rely on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.compress.kernels.ops import dequantize_rotate, pack_bits, packed_bytes, unpack_bits


@given(bits=st.integers(1, 8), count=st.integers(0, 67), rows=st.integers(0, 3), seed=st.integers(0, 99))
def test_round_trip(bits: int, count: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, 2, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 2, packed_bytes(count, bits))
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_layout_is_fixed() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack_bits(codes, 4).tolist() == [i | (i + 8) << 4 for i in range(8)]
    low, high = codes % 8 % 4, codes % 8 // 4
    plane_of_two = [sum(int(low[j + 4 * i]) << (2 * i) for i in range(4)) for j in range(4)]
    plane_of_one = [sum(int(high[j + 2 * i]) << i for i in range(8)) for j in range(2)]
    assert pack_bits(codes % 8, 3).tolist() == plane_of_two + plane_of_one


def test_strides_do_not_matter() -> None:
    codes = torch.randint(0, 8, (24, 5), dtype=torch.uint8)
    assert torch.equal(pack_bits(codes.T, 3), pack_bits(codes.T.contiguous(), 3))


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_other_widths(bits: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 8"):
        pack_bits(torch.zeros(8, dtype=torch.uint8), bits)


def test_refuses_other_lengths() -> None:
    with pytest.raises(ValueError, match="16 codes of 3 bits take 6"):
        unpack_bits(torch.zeros(7, dtype=torch.uint8), 3, 16)


def test_dequantize_and_rotate_by_hand() -> None:
    """Two tokens of one row, two channels in one pair, an angle of 90 degrees for the second token."""
    packed = pack_bits(torch.tensor([[[1, 2], [3, 0]]], dtype=torch.uint8), 2)
    scale, zero = torch.tensor([[[2.0, 10.0]]]), torch.tensor([[[0.5, -1.0]]])
    cos, sin, out = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]), torch.empty(1, 2, 2)
    dequantize_rotate(packed, 2, scale, zero, out)
    assert out.tolist() == [[[2.5, 19.0], [6.5, -1.0]]]
    dequantize_rotate(packed, 2, scale, zero, out, cos=cos, sin=sin)
    assert out.tolist() == [[[2.5, 19.0], [1.0, 6.5]]]
    dequantize_rotate(packed, 2, scale, zero, out, levels=torch.tensor([[-1.0, 0.0, 0.25, 4.0]]))
    assert out.tolist() == [[[0.5, 1.5], [8.5, -11.0]]]


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("packed", torch.zeros(3, 4, 1, dtype=torch.uint8)),
        ("scale", torch.zeros(3, 3, 1)),
        ("zero", torch.zeros(3, 2, 2)),
        ("out", torch.zeros(3, 8, 4).transpose(1, 2)),
        ("levels", torch.zeros(3, 15)),
        ("cos", torch.zeros(4, 8)),
        ("sin", None),
    ],
)
def test_dequantize_refuses_what_does_not_fit(name: str, wrong: torch.Tensor | None) -> None:
    right = {
        "packed": torch.zeros(3, 4, 4, dtype=torch.uint8),
        "bits": 4,
        "scale": torch.zeros(3, 2, 1),
        "zero": torch.zeros(3, 2, 1),
        "out": torch.zeros(3, 4, 8),
        "cos": torch.zeros(4, 4),
        "sin": torch.zeros(4, 4),
    }
    dequantize_rotate(**right)
    with pytest.raises(ValueError, match=r"expected|divide"):
        dequantize_rotate(**(right | {name: wrong}))
