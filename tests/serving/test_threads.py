"""Threads beside an engine's own."""

from concurrent.futures import ThreadPoolExecutor

import torch

from kvloom.connectors.serving.worker.threads import compute_alone


def test_a_thread_computes_alone_and_others_as_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(1, initializer=compute_alone) as pool, ThreadPoolExecutor(1) as other:
            assert pool.submit(torch.get_num_threads).result() == 1
            pool.submit(lambda: torch.ones(1 << 20).sum()).result()
            assert pool.submit(torch.get_num_threads).result() == 1
            assert other.submit(torch.get_num_threads).result() == 2
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
