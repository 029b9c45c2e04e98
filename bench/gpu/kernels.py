"""Every Triton kernel against the function that it stands for, computed on the cpu."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...compress.kernels import ops as bit_ops
from ...compress.kernels import ops_triton as bit_kernels
from ...core import RopeSpec
from ...retrieval.kernels import (
    attend_triton,
    code_ops,
    code_ops_triton,
    ops,
    ops_triton,
    quantized_ops,
    quantized_ops_triton,
    top_triton,
)
from ...retrieval.selector import LayerShape, pooled
from .rows import Row, compare, median_ms, part_of, until

Comparison = tuple[Tensor, Tensor, float]
_EPS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True)
class _Shape:
    """Shape of a layer: H KV heads of D channels, G query heads each, S tokens, K of them chosen, rank r."""

    H: int
    G: int
    D: int
    S: int
    K: int
    r: int

    @property
    def Hq(self) -> int:  # noqa: N802  the shape letter
        return self.H * self.G


_GPU, _CPU = _Shape(8, 4, 128, 32768, 2048, 160), _Shape(2, 2, 16, 70, 20, 12)


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """One row for each kernel and dtype; on a GPU with its time and the share of the memory bandwidth it reaches."""
    device, shape = torch.device("cpu" if is_cpu else "cuda"), _CPU if is_cpu else _GPU
    checks = _Checks(device, shape)
    copy_gb_s = None if is_cpu else _copy_gb_s(device)

    def row(name: str, check: Callable[[], Comparison]) -> Row:
        checks.timed = None
        found = compare(name, check)
        if checks.timed is not None and found["passed"] and copy_gb_s is not None:
            step, nbytes = checks.timed
            found |= median_ms(step, device)
            found["gb_s"] = nbytes / found["ms"] / 1e6
            found["copy_bandwidth_share"] = found["gb_s"] / copy_gb_s
        return found

    rows = until(stop_s, [partial(row, name, check) for name, check in checks.all(is_cpu)])
    return part_of(rows, copy_gb_s=copy_gb_s)


class _Checks:
    def __init__(self, device: torch.device, shape: _Shape) -> None:
        self.device, self.shape = device, shape
        self.timed: tuple[Callable[[], object], int] | None = None  # the last kernel and the bytes that it moves
        self._random = torch.Generator().manual_seed(0)

    def all(self, is_cpu: bool) -> Iterator[tuple[str, Callable[[], Comparison]]]:
        # the interpreter multiplies bfloat16 by its bits, so there products have other dtypes
        dtypes = [torch.float32, torch.float16, *([] if is_cpu else [torch.bfloat16])]
        for bits in (1, 3, 4, 8):
            yield f"pack_bits, {bits} bits", partial(self._pack, bits)
            yield f"unpack_bits, {bits} bits", partial(self._unpack, bits)
        for interleaved in (False, True):
            for dtype in (torch.float16, torch.bfloat16):
                name = f"dequantize_rotate, {_name(dtype)}, {'pairs' if interleaved else 'halves'}"
                yield name, partial(self._dequantize, dtype, interleaved)
        for dtype in dtypes:
            yield f"landmark_scores, {_name(dtype)}", partial(self._landmark_scores, dtype)
            yield f"gather_attend, {_name(dtype)}", partial(self._gather_attend, dtype)
        yield "tile_scores", self._tile_scores
        yield "quantized_scores", self._quantized_scores
        yield "quantized_sums", self._quantized_sums
        for pooling in ("max", "sum"):
            yield f"top_pooled, {pooling}", partial(self._top_pooled, pooling)
        for kind in ("float16", "int8", "int4"):
            yield f"rebuild_keys, {kind}", partial(self._rebuild_keys, kind)
        for bits in (12, 16):
            yield f"code_counts, {bits} bits", partial(self._code_counts, bits)
            yield f"vq_scores, {bits} bits", partial(self._vq_scores, bits)
            yield f"vq_select, {bits} bits", partial(self._vq_select, bits)

    # ------------------------------------------------------------------------------------------------- compression

    def _pack(self, bits: int) -> Comparison:
        codes = self._codes(bits)
        found = bit_kernels.pack_bits(self._on(codes), bits)
        self._time(partial(bit_kernels.pack_bits, self._on(codes), bits), codes.nbytes + found.nbytes)
        return found, bit_ops.pack_bits(codes, bits), 0.0

    def _unpack(self, bits: int) -> Comparison:
        codes = self._codes(bits)
        packed = bit_ops.pack_bits(codes, bits)
        on_device = self._on(packed)
        found = bit_kernels.unpack_bits(on_device, bits, codes.shape[-1])
        step = partial(bit_kernels.unpack_bits, on_device, bits, codes.shape[-1])
        self._time(step, codes.nbytes + packed.nbytes)
        return found, codes, 0.0

    def _dequantize(self, dtype: torch.dtype, interleaved: bool) -> Comparison:
        codes, bits = self._codes(4), 4
        N, T, D = codes.shape
        packed = bit_ops.pack_bits(codes, bits)
        scale, zero = self._numbers(N, T, 1).half(), self._numbers(N, T, 1).half()
        levels = self._numbers(N, 1 << bits)
        cos, sin = _rope(D, interleaved).cos_sin(torch.arange(T))
        true, found = torch.empty(N, T, D, dtype=dtype), torch.empty(N, T, D, dtype=dtype, device=self.device)
        tables: dict[str, Any] = {"levels": levels, "cos": cos, "sin": sin}
        bit_ops.dequantize_rotate(packed, bits, scale, zero, true, interleaved=interleaved, **tables)
        arguments = (self._on(packed), bits, self._on(scale), self._on(zero), found)
        on_device: dict[str, Any] = {name: self._on(table) for name, table in tables.items()}
        step = partial(bit_kernels.dequantize_rotate, *arguments, interleaved=interleaved, **on_device)
        step()
        self._time(step, packed.nbytes + found.nbytes)
        return found, true, _EPS[dtype]

    # --------------------------------------------------------------------------------------------------- retrieval

    def _landmark_scores(self, dtype: torch.dtype) -> Comparison:
        s = self.shape
        queries, rows = self._numbers(s.Hq, s.D).to(dtype), self._numbers(s.H, s.S // 8, s.D).to(dtype)
        step = partial(ops_triton.landmark_scores, self._on(queries), self._on(rows), s.D**-0.5)
        self._time(step, rows.nbytes + 4 * s.Hq * rows.shape[1])
        true = ops.landmark_scores(queries, rows, scale=s.D**-0.5)
        return step(), true, 2e-5 if dtype == torch.float32 else 5e-4  # matrix units sum 16 bits less exactly

    def _gather_attend(self, dtype: torch.dtype) -> Comparison:
        s = self.shape
        queries, ids = self._numbers(s.Hq, s.D).to(dtype), self._ids()
        keys, values = self._numbers(s.H, s.S, s.D).to(dtype), self._numbers(s.H, s.S, s.D).to(dtype)
        arguments = (self._on(queries), self._on(keys), self._on(values), self._on(ids), s.D**-0.5)
        step = partial(attend_triton.gather_attend, *arguments)
        self._time(step, 2 * ids.numel() * s.D * keys.element_size())
        out, lse = step()
        true_out, true_lse = ops.gather_attend(queries, keys, values, ids, scale=s.D**-0.5)
        found, true = (torch.cat((o.flatten().cpu(), e.cpu())) for o, e in ((out, lse), (true_out, true_lse)))
        return found, true, _EPS[dtype]

    def _tile_scores(self) -> Comparison:
        s = self.shape
        queries, rows = self._numbers(s.Hq, s.r), self._numbers(s.H, s.S, s.r).half()
        length = max(1, s.K // 16)
        firsts = torch.randint(0, s.S - length, (s.H, 16), generator=self._random)
        counts, tiles = torch.full_like(firsts, length), ops.tiled(rows)
        true = ops.tile_scores(queries, tiles, firsts, counts, scale=1.0)
        ids = (firsts[..., None] + torch.arange(length)).flatten(1)
        step = partial(ops_triton.tile_scores, self._on(queries), self._on(tiles), self._on(ids), 1.0)
        self._time(step, 2 * ids.numel() * s.r)
        return step(), true, 5e-4

    def _quantized_scores(self) -> Comparison:
        s = self.shape
        keys = self._numbers(s.H, max(1, s.S // quantized_ops.GROUP_TOKENS), quantized_ops.GROUP_TOKENS, s.D)
        means = keys.mean(2).half()
        words, scales = quantized_ops.quantize_keys(keys, means.float())
        queries = self._numbers(s.Hq, s.D).half()
        # not `quantized_scores`, which rounds queries to 8 bits on a processor with numba
        stored = quantized_ops.dequantize_keys(words, scales, means).flatten(1, 2)
        true = (queries.float().view(s.H, -1, s.D) @ stored.mT).flatten(0, 1) * s.D**-0.5
        q, w, c, m = (self._on(tensor) for tensor in (queries, words, scales, means))
        step = partial(quantized_ops_triton.quantized_scores, q, w, c, m, s.D**-0.5)
        self._time(step, words.nbytes + scales.nbytes + true.nbytes)
        return step()[0], true, 5e-4

    def _quantized_sums(self) -> Comparison:
        s = self.shape
        values = self._numbers(s.H, max(1, s.S // quantized_ops.GROUP_TOKENS), quantized_ops.GROUP_TOKENS, s.D)
        means = values.mean(2).half()
        words, scales = quantized_ops.quantize_values(values, means.float())
        weights = torch.softmax(3 * self._numbers(s.Hq, values[0, ..., 0].numel()), 1)
        true = quantized_ops.quantized_sums(weights, words, scales, means)
        step = partial(quantized_ops_triton.quantized_sums, *map(self._on, (weights, words, scales, means)))
        self._time(step, words.nbytes + scales.nbytes + weights.nbytes)
        return step(), true, 5e-4

    def _top_pooled(self, pooling: str) -> Comparison:
        s = self.shape
        scores = 3 * self._numbers(s.Hq, s.S)
        step = partial(top_triton.top_pooled, self._on(scores), s.H, s.K, pooling)
        self._time(step, scores.nbytes)
        weights = pooled(scores.double(), LayerShape(s.H, s.G, s.D, 1.0), "max" if pooling == "max" else "sum")
        found = weights.gather(1, step().cpu()).sum(1)
        return found, weights.topk(s.K, dim=1).values.sum(1), 5e-4  # importances in steps of 1/2048 nat

    def _rebuild_keys(self, kind: str) -> Comparison:
        s = self.shape
        basis, ids = self._numbers(s.H, s.r, s.D).half(), self._ids()
        scale, bias = (None, None) if kind == "float16" else (self._numbers(s.r).abs() + 0.5, self._numbers(s.H, s.D))
        if kind == "float16":
            factor = self._numbers(s.S, s.r).half()
        elif kind == "int8":
            factor = torch.randint(-128, 128, (s.S, s.r), generator=self._random).to(torch.int8)
        else:
            factor = bit_ops.pack_bits(torch.randint(0, 16, (s.S, s.r), generator=self._random).to(torch.uint8), 4)
        cos, sin = _rope(s.D, False).cos_sin(torch.arange(s.S))
        true = ops.rebuild_keys(factor, basis, ids, scale=scale, bias=bias, cos=cos, sin=sin)
        rows, tables, chosen, c, d = (self._on(t) for t in (factor, basis, ids, cos, sin))
        a, b = (None, None) if scale is None or bias is None else (self._on(scale), self._on(bias))

        def step() -> Tensor:
            return ops_triton.rebuild_keys(rows, tables, chosen, a, b, c, d, interleaved=False)

        self._time(step, ids.numel() * factor.nbytes // s.S + true.nbytes)
        return step(), true, _EPS[torch.float16]

    def _code_counts(self, bits: int) -> Comparison:
        packed, starts, codes = self._packed(bits)
        true = code_ops.code_counts(packed, self.shape.S, codes, bits=bits, band_starts=starts)
        step = partial(code_ops_triton.code_counts, self._on(packed), bits, self.shape.S, starts)
        self._time(step, packed.nbytes)
        per_band = codes // (len(starts) + 1)
        found = step().view(len(packed), -1, 1 << bits)[..., :per_band].flatten(1)
        return found, true, 0.0

    def _vq_scores(self, bits: int) -> Comparison:
        packed, starts, codes = self._packed(bits)
        table = self._numbers(self.shape.Hq, codes)
        true = code_ops.vq_scores(table, packed, self.shape.S, bits=bits, band_starts=starts)
        step = partial(code_ops_triton.vq_scores, self._on(table), self._on(packed), bits, self.shape.S, starts)
        self._time(step, packed.nbytes + true.nbytes)
        return step(), true, 0.0

    def _vq_select(self, bits: int) -> Comparison:
        s = self.shape
        packed, starts, codes = self._packed(bits)
        counts = code_ops.code_counts(packed, s.S, codes, bits=bits, band_starts=starts)
        importance = self._numbers(s.H, codes)
        true = code_ops.vq_select(importance, packed, s.S, counts, s.K, bits=bits, band_starts=starts)
        tensors = (self._on(importance), self._on(packed))
        step = partial(code_ops_triton.vq_select, *tensors, bits, s.S, self._on(counts), s.K, starts)
        self._time(step, 2 * packed.nbytes + true.nbytes)
        return step(), true, 0.0

    # ------------------------------------------------------------------------------------------------------ inputs

    def _on(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def _time(self, step: Callable[[], object], nbytes: int) -> None:
        self.timed = step, nbytes

    def _numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._random)

    def _codes(self, bits: int) -> Tensor:
        """`[N, T, D]`: of a chunk of 256 tokens in 32 layers on a GPU."""
        s = self.shape
        N, T = (32 * s.H, 256) if s.S > 1024 else (s.H, 9)
        return torch.randint(0, 1 << bits, (N, T, s.D), generator=self._random).to(torch.uint8)

    def _ids(self) -> Tensor:
        """`[H, K]`, no token twice in a row, the last ones -1."""
        s = self.shape
        ids = torch.stack([torch.randperm(s.S, generator=self._random)[: s.K] for _ in range(s.H)])
        ids[:, -3:] = -1
        return ids

    def _packed(self, bits: int) -> tuple[Tensor, list[int], int]:
        """Packed codes of three bands, the first tokens of all but the first, and codes of all bands."""
        s, codes = self.shape, 512 if self.shape.S > 1024 else 20
        packed = code_ops.pack_codes(torch.randint(0, codes, (s.H, s.S), generator=self._random), bits)
        return packed, [s.S // 3, s.S // 2], 3 * codes


def _rope(D: int, interleaved: bool) -> RopeSpec:
    return RopeSpec(tuple(10000.0 ** -(2 * i / D) for i in range(D // 2)), interleaved=interleaved)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy_gb_s(device: torch.device) -> float:
    """Bytes read and written a second by a plain copy within the device, in GB/s."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_ms(partial(target.copy_, source), device)["ms"] / 1e6
