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


def run(is_cpu: bool, stop_s: float) -> dict[str, Any]:
    """Counts of passed, failed and skipped tests; the end of pytest's output if one failed."""
    if is_cpu:
        return {"status": "skipped", "why": "the default suite runs these files without a GPU"}
    if missing := [module for module in _NEEDS if find_spec(module) is None]:
        return {"status": "skipped", "why": f"{', '.join(missing)} not installed"}
    if missing := [file for file in _FILES if not (ROOT / file).exists()]:
        return {"status": "skipped", "why": f"{', '.join(missing)} not in this tree"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_FILES]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    left_s = max(10.0, stop_s - time.monotonic())
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=left_s
        )
    except subprocess.TimeoutExpired:
        return {"status": "skipped", "why": f"not done after {left_s:.0f} s"}
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", done.stdout)}
    part: dict[str, Any] = {"status": "passed" if done.returncode == 0 else "failed", "counts": counts}
    return part if done.returncode == 0 else part | {"why": (done.stdout + done.stderr)[-4000:]}
