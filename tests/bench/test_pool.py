"""One model in several processes: the same results in the same order as in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvloom.bench.harness.pool import ModelPool
from kvloom.evaluation.answers import known_kinds, shares_right
from kvloom.evaluation.questions import QuestionSampler


def test_processes_give_what_one_gives_and_end_in_time() -> None:
    # What processes call must be found by its name there; these modules of tests bear others.
    with ModelPool(None, device="cpu") as alone, ModelPool(None, device="cpu", processes=2) as shared:
        for pool in (alone, shared):
            seen: list[None] = []
            items = ["model", "nothing", "tokenizer", "once", "none"]
            assert pool.map(hasattr, items, advance=lambda seen=seen: seen.append(None)) == [1, 0, 1, 1, 0]
            assert len(seen) == 5
            assert pool.map(hasattr, items, stop_s=time.monotonic()) == []
            with pytest.raises(AttributeError, match="nothing"):
                pool.map(getattr, ["nothing"])
        shares = shares_right(
            alone.here.model, QuestionSampler(alone.here.tokenizer, context_tokens=256), ("needle", "extract")
        )
        assert shares["needle"] >= 0.5 > shares["extract"]
        assert known_kinds(shares) == ("needle",)
    with pytest.raises(ValueError, match="processes is 0"):
        ModelPool(None, processes=0)


POOL = """
import multiprocessing, time
from kvloom.bench.harness.pool import ModelPool

if __name__ == "__main__":
    with ModelPool(None, device="cpu", processes=2) as pool:
        pool.map(hasattr, ["model"] * 4)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        time.sleep(600)
"""


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_the_one_that_started_them(way: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "pool.py"
    program.write_text(POOL)
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as parent:
        children = [int(pid) for pid in parent.stdout.readline().split()]
        try:
            assert children and all(map(is_running, children))
            parent.send_signal(way)
            parent.wait(30)
            give_up_at_s = time.monotonic() + 30
            while any(map(is_running, children)) and time.monotonic() < give_up_at_s:
                time.sleep(0.05)
            assert not [pid for pid in children if is_running(pid)]
        finally:
            for pid in (parent.pid, *children):
                if is_running(pid):
                    os.kill(pid, signal.SIGKILL)
