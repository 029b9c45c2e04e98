"""Triton kernels against the torch functions they stand for, on values: by Triton's interpreter where no GPU is."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvloom.compress.kernels import ops
from kvloom.core import RopeSpec

pytest.importorskip("triton", reason="Triton is not installed: pip install 'kvloom[triton]'")

from kvloom.compress.kernels import ops_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def on(tensor: Tensor) -> Tensor:
    return tensor.to(DEVICE)


def codes_of(*shape: int, bits: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    rope = RopeSpec(tuple(10000.0 ** -(i / (dim // 2)) for i in range(dim // 2)))
    return rope.cos_sin(torch.arange(50, 50 + tokens))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 24, 33, 8 * 1024 + 40])
def test_packing(bits: int, count: int) -> None:
    codes = codes_of(2, 1, count, bits=bits)
    packed = ops.pack_bits(codes, bits)
    assert torch.equal(ops_triton.pack_bits(on(codes), bits).cpu(), packed)
    assert torch.equal(ops_triton.unpack_bits(on(packed), bits, count).cpu(), codes)


def test_packing_of_nothing_and_of_strides() -> None:
    assert ops_triton.pack_bits(on(codes_of(0, 8, bits=3)), 3).shape == (0, 3)
    assert ops_triton.unpack_bits(on(torch.zeros(2, 0, dtype=torch.uint8)), 3, 0).shape == (2, 0)
    codes = codes_of(16, 3, bits=3).T
    packed = ops_triton.pack_bits(on(codes), 3)
    assert torch.equal(packed.cpu(), ops.pack_bits(codes, 3))
    assert torch.equal(ops_triton.unpack_bits(packed.T.contiguous().T, 3, 16).cpu(), codes)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    bits=st.integers(1, 8),
    runs=st.sampled_from([(1, 1), (4, 8), (1, 8), (12, 1), (12, 4), (2, 2)]),
    dim=st.sampled_from([8, 24]),
    dtype=st.sampled_from(FLOATS),
    scale_dtype=st.sampled_from([torch.float16, torch.float32]),
    has_levels=st.booleans(),
    turns=st.booleans(),
    interleaved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_dequantize_rotate(
    bits: int,
    runs: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    has_levels: bool,
    turns: bool,
    interleaved: bool,
    seed: int,
) -> None:
    N, T, random = 3, 36, torch.Generator().manual_seed(seed)
    packed = ops.pack_bits(codes_of(N, T, dim, bits=bits, seed=seed), bits)
    scale, zero = (torch.randn(N, *runs, generator=random).to(scale_dtype) / 2**bits for _ in range(2))
    tables: dict[str, Tensor | None] = {
        "levels": torch.randn(N, 1 << bits, generator=random) if has_levels else None,
    }
    if turns:
        tables |= zip(("cos", "sin"), angles(T, dim), strict=True)
    true, found = (torch.full((N, T + 2, dim), 7.0).to(dtype) for _ in range(2))
    found = on(found)
    ops.dequantize_rotate(packed, bits, scale, zero, true[:, :T], interleaved=interleaved, **tables)
    ops_triton.dequantize_rotate(
        on(packed),
        bits,
        on(scale),
        on(zero),
        found[:, :T],
        interleaved=interleaved,
        **{name: None if table is None else on(table) for name, table in tables.items()},
    )
    assert bool((found[:, T:] == 7).all())  # nothing is written behind the tokens asked for
    assert torch.allclose(found.cpu().float(), true.float(), rtol=torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dim", [1, 5, 80])
def test_dequantize_of_other_widths(dim: int) -> None:
    packed = ops.pack_bits(codes_of(2, 3, dim, bits=3), 3)
    scale, zero = torch.rand(2, 3, dim), torch.rand(2, 3, dim)
    true, found = torch.zeros(2, 3, dim), on(torch.zeros(2, 3, dim))
    ops.dequantize_rotate(packed, 3, scale, zero, true)
    ops_triton.dequantize_rotate(on(packed), 3, on(scale), on(zero), found)
    assert torch.allclose(found.cpu(), true, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvloom.compress.kernels import ops_triton as k

def build(kernel, types, **constants):
    for name, value in constants.items():
        types[name] = "constexpr"
    names = kernel.arg_names
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, {name: types[name] for name in names}, values)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

u8, f16, f32 = "*u8", "*fp16", "*fp32"
for bits in (3, 8):
    build(k._pack, dict(codes=u8, packed=u8, count="i32", eighth="i32"), BITS=bits, BLOCK=1024)
    build(k._unpack, dict(packed=u8, codes=u8, count="i32", eighth="i32"), BITS=bits, BLOCK=1024)
sizes = dict(out_token="i32", T="i32", D="i32")
for has, bits in ((False, 4), (True, 3)):
    turn = dict(cos=f32, sin=f32, out=f16)
    tables = dict(packed=u8, scale=f16, zero=f16, levels=f32, out_row="i32", G="i32", C="i32")
    build(k._dequantize_rotate, tables | turn | sizes, BITS=bits, HAS_LEVELS=has, ROTATES=has,
          INTERLEAVED=has, BLOCK_TOKENS=32, BLOCK_PAIRS=64)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    """The interpreter takes what the compiler refuses; the compiler needs no GPU to make its assembly."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False, env=without_interpreter()
    )
    assert done.stdout.strip() == "compiled", done.stderr[-3000:]


def without_interpreter() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
