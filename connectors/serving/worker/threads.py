"""Threads beside an engine's own."""

from __future__ import annotations

import ctypes

import torch


def compute_alone() -> None:
    """Initializer of a thread that computes alone: OpenMP gives it no team.

    OpenMP gives every thread that computes a team of its own. When the teams together have more threads than there are
    processors, all of them stop waiting actively, and every parallel loop of the engine pays for waking a thread:
    decode steps of a small model took twice as long, from the first load on. Only this thread's number is set:
    `torch.set_num_threads` sets that of later threads, too, and vLLM has replaced it.
    """
    torch.get_num_threads()  # the first call in a thread sets its number; later calls leave it alone
    try:
        set_number = ctypes.CDLL(torch._C.__file__).omp_set_num_threads  # noqa: SLF001
    except (AttributeError, OSError):  # torch without OpenMP
        return
    set_number(1)
