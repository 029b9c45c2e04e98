"""Copies of bytes: right, and in the calling thread alone."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from kvloom.kvstore.encoding.copies import copy_bytes


@pytest.mark.parametrize("nbytes", [0, 1, 1000, 1_000_003])
def test_the_bytes_are_copied_and_no_others(nbytes: int) -> None:
    source = np.random.default_rng(0).integers(0, 256, nbytes, dtype=np.uint8).tobytes()
    target = bytearray(b"x" * (nbytes + 10))
    copy_bytes(memoryview(target), memoryview(source))
    assert target == source + b"x" * 10


def test_a_target_that_is_too_small_or_read_only_is_refused() -> None:
    with pytest.raises(ValueError):
        copy_bytes(memoryview(bytearray(3)), memoryview(b"four"))
    with pytest.raises(ValueError):
        copy_bytes(memoryview(b"read"), memoryview(b"four"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_other_thread_is_woken() -> None:
    """torch's copy starts a team of OpenMP threads; this one must not."""
    code = (
        "import os, torch; from kvloom.kvstore.encoding.copies import copy_bytes; torch.set_num_threads(2);"
        "a, b = bytearray(1 << 24), bytearray(1 << 24); before = len(os.listdir('/proc/self/task'));"
        "copy_bytes(memoryview(a), memoryview(b)); print(len(os.listdir('/proc/self/task')) - before);"
        "torch.zeros(1 << 24, dtype=torch.uint8).copy_(torch.ones(1 << 24, dtype=torch.uint8));"
        "print(len(os.listdir('/proc/self/task')) - before)"
    )
    ours, torchs = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    ).stdout.split()
    assert (ours, torchs) == ("0", "1")


def test_other_threads_go_on_meanwhile() -> None:
    """The interpreter's lock is free while a large copy runs: another thread wakes within it."""
    data = bytearray(1 << 28)
    target = bytearray(1 << 28)
    woken_at_s: list[float] = []
    started = threading.Event()

    def wake() -> None:
        started.set()
        until_s = time.monotonic() + 5
        while time.monotonic() < until_s and not ended.is_set():
            woken_at_s.append(time.monotonic())
            time.sleep(0.001)

    ended = threading.Event()
    thread = threading.Thread(target=wake)
    thread.start()
    started.wait()
    began_s = time.monotonic()
    copy_bytes(memoryview(target), memoryview(data))
    done_s = time.monotonic()
    ended.set()
    thread.join()
    assert sum(began_s < at_s < done_s for at_s in woken_at_s) >= 3
