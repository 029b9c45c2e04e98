"""Rows of the GPU script: what was compared, how far it was off, and how long it took."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]

_ROUNDS = 20


def compare(name: str, compute: Callable[[], tuple[Tensor, Tensor, float]]) -> Row:
    """A row of a comparison; an exception is a failure of this row alone.

    Parameters
    ----------
    compute : gives the values found, the true ones, and the largest error allowed, relative to the largest true number.
    """
    try:
        found, true, tolerance = compute()
        if found.shape != true.shape or found.dtype != true.dtype:
            return {"name": name, "passed": False, "why": f"{found.dtype} {list(found.shape)}, not {list(true.shape)}"}
        found, true = found.cpu().double(), true.cpu().double()
        size = true.abs().max().item() if true.numel() else 0.0
        error = (found - true).abs().max().item() / (size or 1.0) if true.numel() else 0.0
    except Exception:  # noqa: BLE001  a kernel that does not compile must not hide the others
        return {"name": name, "passed": False, "why": traceback.format_exc(limit=-3)}
    return {"name": name, "passed": bool(error <= tolerance), "error": error, "tolerance": tolerance}


def median_ms(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds of a step after warm-up: median, 10th and 90th percentile; on a CUDA device by its own clock."""
    rounds = _ROUNDS if device.type == "cuda" else 3
    for _ in range(3 if device.type == "cuda" else 1):
        step()
    taken = [_once_ms(step, device) for _ in range(rounds)]
    tenths = statistics.quantiles(taken, n=10, method="inclusive")
    return {"ms": statistics.median(taken), "ms_p10": tenths[0], "ms_p90": tenths[-1]}


def part_of(rows: Sequence[Row], **more: object) -> dict[str, Any]:
    """A part's result: failed if a row is."""
    status = "passed" if all(row.get("passed", True) for row in rows) else "failed"
    return {"status": status, **more, "rows": list(rows)}


def until(stop_s: float, steps: Iterable[Callable[[], Row]]) -> list[Row]:
    """Rows of the steps that begin before a time of the monotonic clock; the others are named as skipped."""
    rows: list[Row] = []
    left = 0
    for step in steps:
        if time.monotonic() < stop_s:
            rows.append(step())
        else:
            left += 1
    return [*rows, {"name": f"{left} more", "why": "no time was left"}] if left else rows


def _once_ms(step: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began_s = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - began_s)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    taken: float = begin.elapsed_time(end)
    return taken
