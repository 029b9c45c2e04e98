"""One model in several processes: a function of many items, each done by whoever is free.

A small model leaves a GPU waiting for the processor that launches its kernels, and a processor's cores waiting for one
another; processes of one thread each do neither.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...evaluation.models import load_model

Item = TypeVar("Item")
Found = TypeVar("Found")
Made = TypeVar("Made")
_MOST_PROCESSES = 8  # unless told otherwise: each has the model in memory


class LoadedModel:
    """A model and its tokenizer in one process, and what was made of them there."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self._made: dict[Hashable, Any] = {}

    def once(self, name: Hashable, make: Callable[[], Made]) -> Made:
        """What `make` gave when it was first asked for under this name."""
        if name not in self._made:
            self._made[name] = make()
        made: Made = self._made[name]
        return made


class ModelPool:
    """A local model, loaded here and, with more than one process, once in each of them; to be closed.

    Parameters
    ----------
    folder, dtype, device : as for `load_model`.
    processes : 1 for none beside this one, None for one for each core of a processor, up to 8, and 1 on another device.

    Attributes
    ----------
    here : the model in this process.
    """

    def __init__(
        self, folder: Path | None, *, dtype: str | None = None, device: str | None = None, processes: int | None = 1
    ) -> None:
        if processes is not None and processes < 1:
            raise ValueError(f"processes is {processes}; expected at least 1")
        self.here = LoadedModel(*load_model(folder, dtype=dtype, device=device))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if processes is None:
            processes = min(cores, _MOST_PROCESSES) if self.here.model.device.type == "cpu" else 1
        self.processes = processes
        self._executor = None
        if processes > 1:
            threads = max(1, cores // processes)
            self._executor = ProcessPoolExecutor(
                processes,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(folder, dtype, str(self.here.model.device), threads),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the processes; what they have begun is finished first."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(
        self,
        function: Callable[[LoadedModel, Item], Found],
        items: Iterable[Item],
        *,
        stop_s: float = math.inf,
        advance: Callable[[], object] = lambda: None,
    ) -> list[Found]:
        """`function` of each item, in their order.

        Parameters
        ----------
        function : of the top level of a module; the same items give the same results in every process.
        stop_s : by `time.monotonic`: no item is begun later, and the results end with the first item that was not.
        advance : called after each item.
        """
        todo = list(items)
        if self._executor is None:
            found: list[Found] = []
            for item in todo:
                if time.monotonic() >= stop_s:
                    break
                with torch.no_grad():
                    found.append(function(self.here, item))
                advance()
            return found
        return self._shared(function, todo, stop_s, advance)

    def _shared(
        self,
        function: Callable[[LoadedModel, Item], Found],
        items: Sequence[Item],
        stop_s: float,
        advance: Callable[[], object],
    ) -> list[Found]:
        if self._executor is None:
            raise ValueError("there is one process; nothing is shared")
        results: dict[int, Found] = {}
        waiting: dict[Future[Found], int] = {}
        begun = 0
        while True:
            # Few at a time, so that what has not begun when time is up does not begin.
            while begun < len(items) and len(waiting) < 2 * self.processes and time.monotonic() < stop_s:
                waiting[self._executor.submit(_call, function, items[begun])] = begun
                begun += 1
            if not waiting:
                break
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                results[waiting.pop(future)] = future.result()
                advance()
        return [results[number] for number in range(begun)]


_loaded: list[LoadedModel] = []  # one, in the processes of a pool, which do nothing else; in others none


def _begin(folder: Path | None, dtype: str | None, device: str, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    _loaded.append(LoadedModel(*load_model(folder, dtype=dtype, device=device)))


def _end_with_parent() -> None:
    """Ends this process as soon as the one that started it has ended, which a signal may have done without a word."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # whatever else runs here: nobody is left to take a result


def _call(function: Callable[[LoadedModel, Item], Found], item: Item) -> Found:
    with torch.no_grad():
        return function(_loaded[0], item)
