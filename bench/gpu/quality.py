"""Quality of fusion, codecs and retrieval on a pretrained model, side by side within a few minutes of a GPU.

    python -m kvloom.bench.gpu.quality --model DIR --out FOLDER [--minutes 4] [--processes 5]

Without an installation: make a folder with a link `kvloom` to this tree, and name it in PYTHONPATH. The benches run at
the same time, each in several processes that load the model, because a small model leaves a GPU waiting for the
processor. When time is up they end with the questions that they have, and write `blend.json`, `codecs.json` and
`retrieval.json` with what they print beside them, as `.txt`. Exit code 1: one of them failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

BENCHES = ("blend", "codecs", "retrieval")
QUESTIONS = {"blend": 200, "retrieval": 100}  # of each kind
_GRACE_S = 60.0  # for summaries, beyond the minutes


def command_of(bench: str, options: argparse.Namespace) -> list[str]:
    """What runs one bench."""
    command = [sys.executable, "-m", "kvloom.cli", "bench", bench, "--model", str(options.model)]
    command += ["--device", options.device, "--json", str(options.out / f"{bench}.json")]
    if bench == "codecs":
        return [*command, "--windows", str(options.windows)]
    command += ["--questions", str(options.questions or QUESTIONS[bench])]
    command += ["--processes", str(options.processes), "--minutes", str(options.minutes)]
    # Benches that share a GPU would falsify times.
    return [*command, "--full", "--no-times"] if bench == "blend" else command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benches, prints what they print, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="kvloom.bench.gpu.quality", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--processes", type=int, default=5, help="of fusion and of retrieval")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--questions", type=int, help="of each kind; default: 200 for fusion, 100 for retrieval")
    parser.add_argument("--windows", type=int, default=16, help="of text, for codecs")
    parser.add_argument("--benches", default=",".join(BENCHES), help="some of these, between commas")
    options = parser.parse_args(arguments)
    benches = options.benches.split(",")
    if unknown := [bench for bench in benches if bench not in BENCHES]:
        parser.error(f"benches are {', '.join(unknown)}; expected some of {', '.join(BENCHES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # threads would fight for the cores
    stop_s = time.monotonic() + 60 * options.minutes + _GRACE_S
    running = {}
    for bench in benches:
        with (options.out / f"{bench}.txt").open("w") as said:
            running[bench] = subprocess.Popen(
                command_of(bench, options), env=env, stdout=said, stderr=subprocess.STDOUT
            )
    failed = []
    for bench, process in running.items():
        try:
            process.wait(timeout=max(1.0, stop_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        if process.returncode:
            failed.append(bench)
        print((options.out / f"{bench}.txt").read_text())
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
