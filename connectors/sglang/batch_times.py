"""What computing prompts takes in SGLang: its storage is not told, so kvloom's plugin looks at its batches.

SGLang calls `register` once in each of its processes, see `weight_updates`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from weakref import WeakSet

from ..serving.scheduler.prefill_rate import is_prefill_step

T = TypeVar("T")

_LOG = logging.getLogger("kvloom")
_RESULTS = "sglang.srt.managers.scheduler.Scheduler.process_batch_result"


class Learner(Protocol):
    """Something that learns what computing costs."""

    def observe_prefill(self, tokens: int, position: float, seconds: float) -> None: ...


_OPEN: WeakSet[Learner] = WeakSet()  # in this process; closed ones go by themselves


def register() -> None:
    """Ask SGLang to say when the result of a batch has been processed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_RESULTS, BatchTimes().around, HookType.AROUND)


def watch(learner: Learner) -> None:
    """Tell this one of batches from now on."""
    _OPEN.add(learner)


class BatchTimes:
    """Times of batches of prompts, each from when it was launched, or the one before it was over, to its result.

    Parameters
    ----------
    clock : the one by which SGLang says when it launched a batch, `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended_s = float("-inf")

    def around(self, process: Callable[..., T], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> T:
        """`process_batch_result` of a scheduler; what goes wrong here is logged."""
        try:
            return process(scheduler, batch, *args, **kwargs)
        finally:
            now_s = self._clock()
            try:
                if _OPEN:
                    self._observe(batch, now_s)
            except Exception:  # noqa: BLE001  this is SGLang's own loop
                _LOG.exception("the time of a batch was not taken")
            self._ended_s = now_s

    def _observe(self, batch: Any, now_s: float) -> None:
        if not batch.forward_mode.is_extend() or batch.launch_ts is None:
            return
        lengths, before = list(batch.extend_lens), list(batch.prefix_lens)
        if not is_prefill_step({str(i): count for i, count in enumerate(lengths)}):
            return
        total = sum(lengths)
        position = sum(n * (start + n / 2) for n, start in zip(lengths, before, strict=True)) / total
        seconds = now_s - max(batch.launch_ts, self._ended_s)
        for learner in list(_OPEN):
            learner.observe_prefill(total, position, seconds)
