"""Tasks of LMCache: results once, by number, announced by the descriptor, whatever happens in them."""

import os
import select
import threading

import pytest

from kvloom.connectors.lmcache.settings import LMCacheSettings
from kvloom.connectors.lmcache.tasks import TaskQueue


def wait(queue: TaskQueue[int]) -> int:
    assert select.select([queue.event_fd], [], [], 10)[0], "no task has finished in time"
    return os.eventfd_read(queue.event_fd)


def test_results_come_once(caplog: pytest.LogCaptureFixture) -> None:
    queue: TaskQueue[int] = TaskQueue("test")
    gate = threading.Event()
    first = queue.submit(lambda: int(gate.wait(10)), lambda: -1)
    assert queue.pop(first) is None
    with pytest.raises(BlockingIOError):
        os.eventfd_read(queue.event_fd)
    gate.set()
    assert wait(queue) == 1 and queue.pop(first) == 1 and queue.pop(first) is None
    with caplog.at_level("CRITICAL"):
        second = queue.submit(lambda: 1 // 0, lambda: -1)
        wait(queue)
    assert queue.is_alive and queue.pop_all() == {second: -1} and queue.pop_all() == {}
    queue.close()
    queue.close()
    late = queue.submit(lambda: 1, lambda: -1)
    assert not queue.is_alive and queue.pop(late) == -1


def test_close_finishes_what_was_submitted() -> None:
    queue: TaskQueue[int] = TaskQueue("test")
    tasks = [queue.submit(lambda i=i: i, lambda: -1) for i in range(100)]
    queue.close()
    assert queue.pop_all() == dict(zip(tasks, range(100), strict=True))


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({}, "there is no tier"),
        ({"disk_paths": "x"}, "adapter_params has 'disk_paths'; known are host_bytes"),
        ({"host_bytes": "1GiB", "host_codec": "nuq4"}, "host_codec is given; objects of LMCache are"),
        ({"host_bytes": True}, "host_bytes is True; expected bytes from 1"),
    ],
)
def test_wrong_settings_are_said_in_a_line(params: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        LMCacheSettings.of(params)
    assert "\n" not in str(caught.value)
