"""Copies of bytes and tensors: right, and in the calling thread alone."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kvloom.kvstore.encoding.copies import copy, copy_bytes

from ..support.patience import at_best


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
    """torch's copy starts a team of OpenMP threads; ours must not, of bytes and of tensors below 8 MiB."""
    code = (
        "import os, torch; from kvloom.kvstore.encoding.copies import copy, copy_bytes; torch.set_num_threads(2);"
        "a, b = bytearray(1 << 24), bytearray(1 << 24); c, d = torch.empty(1 << 21), torch.empty(1 << 21);"
        "e, f = c[: 1 << 20], d[: 1 << 20]; before = len(os.listdir('/proc/self/task'));"
        "copy_bytes(memoryview(a), memoryview(b)); copy([(e, f)] * 4);"
        "print(len(os.listdir('/proc/self/task')) - before);"
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7, 3), (3, 1 << 21)])
def test_tensors_are_copied(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.randint(0, 2, shape).to(dtype)
    target, strided = torch.zeros(shape, dtype=dtype), torch.zeros((*shape, 2), dtype=dtype)[..., 0]
    copy([(target, source), (strided, source)])
    assert torch.equal(target.float(), source.float()) and torch.equal(strided.float(), source.float())
    wider = torch.zeros((2, *shape), dtype=torch.float32)
    copy([(wider, source)])  # as torch copies: into another precision, and broadcast
    assert torch.equal(wider, source.float().expand(2, *shape))


def test_a_tensor_of_a_graph_is_read() -> None:
    source, target = torch.ones(5, requires_grad=True), torch.zeros(5)
    copy([(target, source.detach())])
    assert target.tolist() == [1.0] * 5


def test_other_threads_go_on_meanwhile() -> None:
    """The interpreter's lock is free while a large copy runs: another thread wakes within it, if it gets a core."""
    data = bytearray(1 << 28)
    target = bytearray(1 << 28)
    woken_at_s: list[float] = []
    started, ended = threading.Event(), threading.Event()

    def wake() -> None:
        while not ended.is_set():
            woken_at_s.append(time.monotonic())
            started.set()
            time.sleep(0.001)

    def wakings() -> int:
        began_s = time.monotonic()
        copy_bytes(memoryview(target), memoryview(data))
        done_s = time.monotonic()
        return sum(began_s < at_s < done_s for at_s in woken_at_s)

    thread = threading.Thread(target=wake)
    thread.start()
    started.wait()
    most = at_best(wakings, lambda count: count >= 3)
    ended.set()
    thread.join()
    assert most >= 3
