"""Weights that change in a running engine: SGLang's storage is not told, so kvloom's plugin tells it.

SGLang calls `register` once in each of its processes, through the entry point `sglang.srt.plugins`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar
from weakref import WeakSet

from . import batch_times

T = TypeVar("T")

_UPDATES = ("disk", "distributed", "tensor", "ipc")
_MANAGER = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"


class Renewable(Protocol):
    """Something whose names of KV are over when the weights change."""

    def renew(self) -> None: ...


_OPEN: WeakSet[Renewable] = WeakSet()  # in this process; closed ones go by themselves


def register() -> None:
    """Ask SGLang to say when weights have been updated, and what batches take."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for source in _UPDATES:
        HookRegistry.register(f"{_MANAGER}.update_weights_from_{source}", _renewing, HookType.AROUND)
    batch_times.register()


def watch(storage: Renewable) -> None:
    """Renew this one from now on."""
    _OPEN.add(storage)


def _renewing(update: Callable[..., T], *args: object, **kwargs: object) -> T:
    """An update of weights; afterwards, also if it failed, as a part of them may be new, nothing old is found."""
    try:
        return update(*args, **kwargs)
    finally:
        for storage in list(_OPEN):
            storage.renew()
