"""Adapters by number: known by what the engine has read, and by nothing once that is uncertain."""

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from blake3 import blake3

from kvloom.connectors.identity.adapters import AdapterNames


class Memory:
    """An engine's: what it has read, by number."""

    def __init__(self) -> None:
        self.read: dict[int, Read] = {}

    def load(self, number: int, path: str) -> None:
        self.read[number] = Read(content(path))

    def adapter(self, number: int) -> object | None:
        return self.read.get(number)

    def holds(self, adapter: object, folder: Path) -> bool | None:
        assert isinstance(adapter, Read)
        return None if adapter.is_strange else adapter.content == content(str(folder))


@dataclass(eq=False)
class Read:
    content: bytes
    is_strange: bool = False


def content(path: str) -> bytes:
    return blake3(Path(path, "adapter_model.safetensors").read_bytes()).digest()


def names_of(memory: Memory | None = None, *, starts_in_s: float = 60.0) -> AdapterNames:
    """Of an engine that starts after all that a test writes, unless it says otherwise."""
    return AdapterNames(memory, clock=lambda: time.time() + starts_in_s)


def adapter(folder: Path, data: bytes = b"1" * 99) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)


def test_an_adapter_is_its_files(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", b"2" * 99)
    names = names_of()
    first = names.digest(1, one)
    assert first is not None and len(first) == 32
    assert names.digest(2, two) not in (None, first)
    assert names.digest(3, str(shutil.copytree(one, tmp_path / "copy"))) == first
    assert names_of().digest(7, one) == names.digest(1, one) == first
    Path(one, "notes.txt").write_text("not read by an engine")
    assert names.digest(1, one) == first


@pytest.mark.parametrize("what", ["weights", "same bytes", "config", "new file", "gone"])
def test_files_that_are_touched_end_a_name(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    path, before = adapter(tmp_path / "live"), adapter(tmp_path / "before")
    names = names_of()
    first = names.digest(1, path)
    changes = {
        "weights": lambda: Path(path, "adapter_model.safetensors").write_bytes(b"2" * 99),
        "same bytes": lambda: Path(path, "adapter_model.safetensors").write_bytes(b"1" * 99),
        "config": lambda: Path(path, "adapter_config.json").write_text(json.dumps({"r": 8})),
        "new file": lambda: Path(path, "new_embeddings.safetensors").write_bytes(b""),
        "gone": lambda: shutil.rmtree(path),
    }
    changes[what]()
    assert names.digest(1, path) is None
    assert "adapter 1" in caplog.text
    shutil.rmtree(path, ignore_errors=True)
    shutil.move(before, path)
    assert names.digest(1, path) is None, "the engine may have dropped the first and read what came between"
    assert len(caplog.messages) == 1, "said once"
    assert names.digest(2, path) == first, "a new number is read anew"
    assert names.digest(1, path, reloads=True) == first == names.digest(1, path)


def test_a_number_that_is_used_again_has_no_name(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", b"2" * 99)
    names = names_of()
    assert names.digest(1, one) is not None
    assert names.digest(1, two) is None
    assert names.digest(1, one) is None
    assert names.digest(1, two, reloads=True) is not None


def test_what_is_no_adapter_here_has_none(tmp_path: Path) -> None:
    names = names_of()
    assert names.digest(1, "someone/adapter") is None
    (tmp_path / "empty").mkdir()
    assert names.digest(2, str(tmp_path / "empty")) is None
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert names.digest(3, str(tmp_path / "empty")) is None


def test_in_other_processes_files_must_be_older_than_the_engine(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapter(tmp_path / "young")
    names = names_of(starts_in_s=-60.0)
    assert names.digest(1, path) is None
    assert "number and in a folder of its own" in caplog.text
    assert names.digest(2, path, reloads=True) is not None, "it is read after this"


def test_what_the_engine_has_in_memory_is_what_counts(tmp_path: Path) -> None:
    path, other = adapter(tmp_path / "live"), adapter(tmp_path / "other", b"2" * 99)
    memory = Memory()
    names = names_of(memory, starts_in_s=-60.0)
    first = names.digest(1, path)
    assert first is not None, "not read yet: it will be read from these files"
    assert names.is_read(1) is False
    memory.load(1, path)
    assert names.is_read(1) is True
    assert names.digest(1, path) == first
    shutil.copy(Path(other, "adapter_model.safetensors"), path)
    assert names.digest(1, path) is None, "the engine still has the first"
    memory.load(1, path)  # in place, by whatever way
    second = names.digest(1, path)
    assert second not in (None, first)
    assert names.digest(2, other) == second
    memory.load(1, str(shutil.copytree(adapter(tmp_path / "third", b"3" * 99), tmp_path / "fourth")))
    assert names.digest(1, path) is None, "read from elsewhere under the old number"
    del memory.read[1]
    assert names.digest(1, path) == second, "dropped: it will be read again"


def test_an_adapter_that_was_read_before_its_first_request(tmp_path: Path) -> None:
    path = adapter(tmp_path / "live")
    memory = Memory()
    memory.load(1, path)
    memory.load(2, path)
    names = names_of(memory, starts_in_s=-60.0)
    assert names.digest(1, path) is not None
    adapter(tmp_path / "live", b"2" * 99)
    assert names.digest(2, path) is None


def test_kinds_that_cannot_be_compared_are_known_by_their_files(tmp_path: Path) -> None:
    path = adapter(tmp_path / "live")
    memory = Memory()
    old, young = names_of(memory), names_of(memory, starts_in_s=-60.0)
    memory.read[1] = Read(b"", is_strange=True)
    assert old.digest(1, path) is not None and young.digest(1, path) is None
    first = young.digest(2, path)
    memory.read[2] = Read(b"", is_strange=True)
    assert young.digest(2, path) == first is not None, "read after it was seen"
    adapter(tmp_path / "live", b"2" * 99)
    assert old.digest(1, path) is None and young.digest(2, path) is None
