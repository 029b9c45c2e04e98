"""The memory that tiers allocate once, when they are made."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import TierUnavailableError


def can_pin() -> bool:
    """Whether there is a device for which memory could be pinned."""
    return torch.cuda.is_available()


def allocate_buffer(name: str, nbytes: int, *, device: torch.device | str = "cpu", pinned: bool = False) -> Tensor:
    """`[nbytes]` uint8 on a device, or in host memory that is pinned or plain.

    Raises
    ------
    TierUnavailableError : there is not so much memory, or no such device.
    """
    try:
        with torch.inference_mode(mode=False):  # else the buffer could be written in this mode only
            return torch.empty(nbytes, dtype=torch.uint8, device=device, pin_memory=pinned)
    except (RuntimeError, AssertionError) as exc:  # the latter from a torch without CUDA
        kind = "pinned" if pinned else str(device)
        raise TierUnavailableError(
            f"tier {name!r} cannot get {nbytes} bytes of {kind} memory; give a smaller capacity_bytes "
            f"or another device: {exc}"
        ) from exc
