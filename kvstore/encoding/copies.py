"""Copies of tensors: in host memory by the calling thread alone, to and from devices on streams of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core import EncodedChunk

_SHARED_FROM_BYTES = 1 << 23  # a copy takes longer than OpenMP's threads may wait for one another


def copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copies into the first of each pair what the second holds; returns when all of it is there.

    In host memory, what is shorter than 8 MiB is copied by `copy_bytes`. torch shares longer copies among OpenMP's
    threads, unless the calling thread computes alone, and all that is not contiguous.

    Where a CUDA device takes part, the copies run on a stream of their own: they do not queue behind the work of the
    caller's stream, and nothing queued there is waited for. The sources must therefore be complete. Copies from and to
    pinned memory use the copy engine. The calling thread waits, without the interpreter's lock.
    """
    device = next((tensor.device for pair in pairs for tensor in pair if tensor.is_cuda), None)
    if device is None:
        for target, source in pairs:
            _copy_in_host(target, source)
        return
    stream = torch.cuda.Stream(device)
    try:
        with torch.cuda.stream(stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
    finally:
        stream.synchronize()  # also if one fails: the others must not write once the caller has given the space away


def copy_bytes(target: memoryview, source: memoryview) -> None:
    """Copies as many bytes as `source` has, in the calling thread alone and without the interpreter's lock.

    torch would share the copy among OpenMP threads, which wait for one another: where the processors are busy, a
    megabyte then takes as long as the scheduler's time slices, tens of milliseconds, and not tens of microseconds
    (docs/decisions/135-copies-in-host-memory.md).
    """
    if len(source):
        np.copyto(np.frombuffer(target, np.uint8, len(source)), np.frombuffer(source, np.uint8))


def _copy_in_host(target: Tensor, source: Tensor) -> None:
    is_plain = target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
    if is_plain and target.shape == source.shape and target.nbytes < _SHARED_FROM_BYTES:
        copy_bytes(_bytes_of(target), _bytes_of(source))
    else:
        target.copy_(source)


def _bytes_of(tensor: Tensor) -> memoryview:
    array: NDArray[np.uint8] = tensor.detach().view(-1).view(torch.uint8).numpy()
    return array.data


def on_cpu(blob: EncodedChunk, *, unleased: bool = False) -> EncodedChunk:
    """The chunk in cpu memory: itself if it is there, else with copies of what is not.

    Parameters
    ----------
    unleased : what a tier has lent is copied, too, so that the result may be kept.
    """
    is_lent = blob.leased and unleased
    copied = {name: torch.empty_like(t, device="cpu") for name, t in blob.tensors.items() if is_lent or t.is_cuda}
    copy([(target, blob.tensors[name].detach()) for name, target in copied.items()])
    if not copied and not is_lent:
        return blob
    return EncodedChunk(blob.codec, {**blob.tensors, **copied}, blob.meta, blob.layered, blob.leased and not is_lent)


def wait_for_devices() -> None:
    """Returns when every CUDA device that this process uses has done what was queued on it, in any stream."""
    # To synchronize a device for the first time would make a context on it, of hundreds of megabytes.
    in_use: Callable[[int], bool] = getattr(  # private, but there is no other way to ask
        torch._C,  # noqa: SLF001
        "_cuda_hasPrimaryContext",
        lambda _: True,
    )
    for index in range(torch.cuda.device_count()):
        if in_use(index):
            torch.cuda.synchronize(index)
