"""What holds for every test: one thread for tensors this small, the same numbers every time, and no deadlines."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)  # two threads on two busy cores wait for each other: seven times slower on these models
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported; kernels then run on the cpu
settings.register_profile("kvloom", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvloom")


@pytest.fixture(autouse=True)
def plain_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that count the bytes of a `HostTier` count the same ones where CUDA is there; who wants pinned says so."""
    if torch.cuda.is_available():
        monkeypatch.setattr("kvloom.kvstore.tiers.host.can_pin", lambda: False)


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Whatever ran before, in whichever order."""
    torch.manual_seed(0)
