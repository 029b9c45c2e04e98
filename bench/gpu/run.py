"""Everything of kvloom that a GPU runs, in one go: kernels, copies, codecs, sparse decoding, and the tests for CUDA.

    python3 bench/gpu/run.py [--cpu] [--minutes 7] [--json FILE] [--commit TEXT]

It needs this tree, torch and triton; nothing has to be installed. A part whose packages are missing is skipped and says
so. `--cpu` runs the smallest size without a GPU, kernels in Triton's interpreter. The result is one JSON object; exit
code 1 says that a part failed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent
_PARTS = ("kernels", "copies", "codecs", "decode", "cuda_tests")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all parts, prints the JSON object, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="bench/gpu/run.py", description="kvloom on a GPU, as one JSON object")
    parser.add_argument("--cpu", action="store_true", help="the smallest size, without a GPU")
    parser.add_argument("--minutes", type=float, default=7.0, help="parts that would begin later are skipped")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--commit", help="name of the source tree, if it is not a git checkout")
    options = parser.parse_args(arguments)
    if options.cpu:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    stop_s = time.monotonic() + 60.0 * options.minutes
    import torch

    if not options.cpu and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --cpu runs the smallest size without one")
    parts = {name: _run_part(name, options.cpu, stop_s) for name in _PARTS}
    from ...evaluation.environment import commit, environment, version_of

    passed = all(part["status"] != "failed" for part in parts.values())
    result = {
        "bench": "gpu",
        "commit": options.commit or commit(),
        "env": {**environment(), "triton": version_of("triton"), "numba": version_of("numba")},
        "interpreted": options.cpu,
        "passed": passed,
        "parts": parts,
    }
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)
    return 0 if passed else 1


def _run_part(name: str, is_cpu: bool, stop_s: float) -> dict[str, Any]:
    began_s = time.monotonic()
    if began_s >= stop_s:
        return {"status": "skipped", "why": "no time was left"}
    part: dict[str, Any]
    try:
        run: Callable[[bool, float], dict[str, Any]] = importlib.import_module(f".{name}", __package__).run
        part = run(is_cpu, stop_s)
    except ImportError as exc:
        part = {"status": "skipped", "why": str(exc)}
    except Exception:  # noqa: BLE001  one part must not keep the others from their result
        part = {"status": "failed", "why": traceback.format_exc(limit=-4)}
    return part | {"seconds": round(time.monotonic() - began_s, 2)}


def _as_package() -> int:
    """Runs `main` of this file as a module of the package, which the root of the tree is."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kvloom").symlink_to(_ROOT, target_is_directory=True)
        sys.path[0] = folder
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, [os.environ.get("PYTHONPATH")])])
        code: int = importlib.import_module("kvloom.bench.gpu.run").main()
        return code


if __name__ == "__main__":
    sys.exit(_as_package() if not __package__ else main())
