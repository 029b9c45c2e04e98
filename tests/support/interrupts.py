"""Asynchronous exceptions, raised at any instruction of the package that a test chooses."""

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import kvloom

ROOM = str(Path(kvloom.__file__).parent / "kvstore")


class Interrupt(BaseException):
    """What a signal handler, or another thread, raises."""


def interrupted(operation: Callable[[], object], position: int, folder: str = ROOM) -> bool:
    """Calls `operation` and raises `Interrupt` before the instruction of that number among those of the folder's code.

    False if the operation came to its end before.
    """
    left = position

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(folder):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            left -= 1
            if left == -1:
                sys.settrace(None)
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        operation()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def at_every_position(
    prepare: Callable[[], Callable[[], object]], verify: Callable[[], object], step: int = 1, folder: str = ROOM
) -> int:
    """Interrupts what `prepare` returns at every `step`th instruction, and verifies after each; at how many."""
    for position in positions(step):
        if not interrupted(prepare(), position, folder):
            verify()
            return position
        verify()
    raise AssertionError("the operation does not end")


def at_some_positions(
    prepare: Callable[[], Callable[[], object]],
    verify: Callable[[], object],
    number: int | None,
    seed: int = 0,
    folder: str = ROOM,
) -> int:
    """As `at_every_position`, at so many that are drawn from all; None for all. How many instructions there are."""
    last = 1
    while interrupted(prepare(), last, folder):  # at growing distances, until it ends before
        verify()
        last *= 2
    chosen = range(last) if number is None else sorted(random.Random(seed).sample(range(last), min(number, last)))
    for position in chosen:
        if not interrupted(prepare(), position, folder):
            verify()
            return position
        verify()
    return last


def positions(step: int) -> Iterator[int]:
    yield from range(0, 10_000_000, step)
