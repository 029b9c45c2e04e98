"""The project's tests that need CUDA, by pytest, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from typing import Any

from ...evaluation.environment import ROOT

_FILES = ("tests/tiers/test_device.py", "tests/compress/test_ops_triton.py", "tests/retrieval/test_ops_triton.py")
_NEEDS = ("pytest", "pytest_timeout", "hypothesis")
# a state machine and threads without work for a device, and compiling for another one than is here
_LEFT_OUT = "not Slab and not test_threads and not compile_for_a_gpu"
_WORKERS = 8  # most of the time goes into compiling kernels, a processor each
_LAST_LINES = 12  # of pytest's output, shown if it does not end in time


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests; the end of pytest's output if one failed, or if time ran out.

    By pytest-xdist in several processes where it is installed.
    """
    if is_cpu:
        return {"status": "skipped", "why": "the default suite runs these files without a GPU"}
    if missing := [module for module in _NEEDS if find_spec(module) is None]:
        return {"status": "skipped", "why": f"{', '.join(missing)} not installed"}
    if missing := [file for file in _FILES if not (ROOT / file).exists()]:
        return {"status": "skipped", "why": f"{', '.join(missing)} not in this tree"}
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-k", _LEFT_OUT, *_FILES]
    if find_spec("xdist") is not None:
        command += ["-n", str(min(_WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    left_s = max(10.0, stop_s - time.monotonic())
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=left_s
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stdout or b""  # bytes, whatever `text` says
        lines = (said if isinstance(said, str) else said.decode(errors="replace")).splitlines()
        last = " | ".join(lines[-_LAST_LINES:])
        return {"status": "skipped", "why": f"not done after {left_s:.0f} s; the last lines: {last}"}
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    part: dict[str, Any] = {"status": "passed" if done.returncode == 0 else "failed", "counts": counts}
    return part if done.returncode == 0 else part | {"why": (done.stdout + done.stderr)[-4000:]}
