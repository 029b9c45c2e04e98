"""LMCache's real storage classes around kvloom: its factory, memory objects, bitmaps, storage manager, benchmark."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "lmcache.v1", reason="stock LMCache is not installed here; `make test-engines` runs this in its own environment"
)

import torch

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

COUNT, SIZE = 8, 1 << 16


def plugin(**params: Any) -> dict[str, Any]:
    return {
        "type": "plugin",
        "module_path": "kvloom.connectors.lmcache",
        "class_name": "KVLoomL2Adapter",
        "adapter_params": params,
    }


def opened(**params: Any) -> Any:
    """An adapter, made by LMCache's own factory from the option's JSON."""
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.plugin_l2_adapter import PluginL2AdapterConfig

    return create_l2_adapter(PluginL2AdapterConfig.from_dict(plugin(**params)))


def objects(seed: int | None) -> list[Any]:
    from lmcache.cli.commands.bench.l2_adapter_bench import data

    made: list[Any] = data.make_memory_objects(data.make_aligned_tensor(COUNT * SIZE), COUNT, SIZE, 0)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    for each in made:
        if generator is None:
            each.raw_data.zero_()
        else:
            each.raw_data.copy_(torch.randint(0, 256, each.raw_data.shape, dtype=torch.uint8, generator=generator))
    return made


def keys(model: str = "org/model", first: int = 0) -> list[Any]:
    from lmcache.cli.commands.bench.l2_adapter_bench.data import make_object_keys

    made: list[Any] = make_object_keys(COUNT, model_name=model, key_offset=first)
    return made


class Driver:
    """The calls that LMCache's controllers make."""

    def __init__(self, **params: Any) -> None:
        self.adapter = opened(**params)

    def store(self, names: list[Any], given: list[Any]) -> Any:
        task = self.adapter.submit_store_task(names, given)
        self._wait(self.adapter.get_store_event_fd())
        return self.adapter.pop_completed_store_tasks()[task]

    def find(self, names: list[Any]) -> list[bool]:
        task = self.adapter.submit_lookup_and_lock_task(names, {})
        self._wait(self.adapter.get_lookup_and_lock_event_fd())
        return self._flags(self.adapter.query_lookup_and_lock_result(task), len(names))

    def load(self, names: list[Any], into: list[Any]) -> list[bool]:
        task = self.adapter.submit_load_task(names, into)
        self._wait(self.adapter.get_load_event_fd())
        return self._flags(self.adapter.query_load_result(task), len(names))

    def _wait(self, fd: int) -> None:
        from lmcache.cli.commands.bench.l2_adapter_bench.data import wait_eventfd

        assert wait_eventfd(fd, timeout=30.0), "no task has finished in time"

    def _flags(self, bitmap: Any, count: int) -> list[bool]:
        return [bitmap.test(i) for i in range(count)]


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")
    yield


def test_bytes_come_back_and_outlive_a_restart(tmp_path: Path) -> None:
    driver, given, names = Driver(disk_path=str(tmp_path)), objects(0), keys()
    adapter = driver.adapter
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    assert len(fds) == 3
    assert driver.find(names) == [False] * COUNT
    stored = driver.store(names, given)
    assert stored.is_successful() and stored.bytes_transferred() == COUNT * SIZE
    assert adapter.get_usage().total_bytes_used == COUNT * SIZE
    adapter.close()

    driver, taken = Driver(disk_path=str(tmp_path), host_bytes="16MiB"), objects(None)
    assert driver.find(names) == [True] * COUNT and driver.find(keys("org/other")) == [False] * COUNT
    assert driver.adapter.report_status()["locked"] == COUNT
    assert driver.load(names, taken) == [True] * COUNT
    driver.adapter.submit_unlock(names)
    for one, other in zip(given, taken, strict=True):
        assert torch.equal(one.raw_data, other.raw_data)
    status = driver.adapter.report_status()
    assert status["is_healthy"] and status["locked"] == 0 and status["loaded_objects"] == COUNT
    assert json.dumps(status)
    driver.adapter.delete(names[:2])
    assert driver.find(names) == [False, False, *[True] * (COUNT - 2)]
    driver.adapter.close()


def test_damaged_bytes_are_misses(tmp_path: Path) -> None:
    driver, given, names = Driver(disk_path=str(tmp_path)), objects(1), keys()
    driver.store(names, given)
    driver.adapter.close()
    pattern, damaged = given[3].raw_data[:64].numpy().tobytes(), 0
    for file in (each for each in tmp_path.rglob("*") if each.is_file()):
        at = file.read_bytes().find(pattern)
        if at >= 0:
            with file.open("r+b") as stream:
                stream.seek(at)
                stream.write(bytes([pattern[0] ^ 1]))
            damaged += 1
    assert damaged == 1
    driver, taken = Driver(disk_path=str(tmp_path)), objects(None)
    assert driver.load(names, taken) == [i != 3 for i in range(COUNT)]
    assert not taken[3].raw_data.any()
    driver.adapter.close()


def test_listeners_hear_of_evictions(tmp_path: Path) -> None:
    heard: list[tuple[str, int]] = []

    class Listener:
        def on_l2_keys_stored(self, keys: list[Any], sizes: list[int]) -> None:
            heard.append(("stored", len(keys)))

        def on_l2_keys_accessed(self, keys: list[Any]) -> None:
            heard.append(("accessed", len(keys)))

        def on_l2_keys_deleted(self, keys: list[Any]) -> None:
            heard.append(("deleted", len(keys)))

    driver = Driver(host_bytes=6 * SIZE)
    driver.adapter.register_listener(Listener())
    driver.store(keys(), objects(0))
    gone = driver.find(keys()).count(False)
    assert gone > 0 and ("stored", COUNT) in heard and ("deleted", gone) in heard
    assert driver.adapter.get_usage().total_bytes_used == (COUNT - gone) * SIZE
    driver.adapter.close()


def test_what_fails_is_a_result_and_no_exception(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver, names = Driver(disk_path=str(tmp_path)), keys()
    assert not driver.store(names, [None] * COUNT).is_successful()
    assert driver.load(names, [None] * COUNT) == [False] * COUNT
    driver.adapter._objects.store.close()
    assert driver.find(names) == [False] * COUNT and driver.load(names, objects(0)) == [False] * COUNT
    assert not driver.store(names, objects(0)).is_successful()
    driver.adapter.delete(names)
    driver.adapter.submit_unlock(names)
    assert driver.adapter.report_status()["is_healthy"]
    driver.adapter.close()


def test_wrong_settings_end_the_start() -> None:
    with pytest.raises(ValueError, match="has 'disk_paths'; known are host_bytes"):
        opened(disk_paths="x")


def test_memory_tags_of_later_releases(tmp_path: Path) -> None:
    from lmcache.v1.distributed import api

    if not hasattr(api, "MemoryTags"):
        pytest.skip("LMCache before 0.5.7 asks for no tags")
    adapter = opened(disk_path=str(tmp_path))
    assert adapter.get_memory_tags() == api.MemoryTags(api.MemorySegment.STORAGE, api.MemoryResidency.LOCAL)
    adapter.close()


def test_their_benchmark_verifies(tmp_path: Path) -> None:
    """`lmcache bench l2` stores, finds and loads through the adapter, and compares every byte."""
    command = [
        *(str(Path(sys.executable).with_name("lmcache")), "bench", "l2", "--num-keys", "8", "--rounds", "2"),
        *("--data-size-kb", "256", "--lookup-max-hit-rate", "1.0", "--no-skip-verify", "--format", "json"),
        *("--l2-adapter", json.dumps(plugin(disk_path=str(tmp_path)))),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    print(ended.stdout)
