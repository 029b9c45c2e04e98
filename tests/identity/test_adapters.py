"""Adapters by number: known by what the engine has read, and by nothing once that is uncertain."""

import json
import shutil
from pathlib import Path

import pytest

from kvloom.connectors.identity.adapters import AdapterNames


def adapter(folder: Path, data: bytes = b"1" * 99) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(data)
    (folder / "adapter_config.json").write_text("{}")
    return str(folder)


def test_an_adapter_is_its_files(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "one"), adapter(tmp_path / "two", b"2" * 99)
    names = AdapterNames()
    first = names.digest(1, one)
    assert first is not None and len(first) == 32
    assert names.digest(2, two) not in (None, first)
    assert names.digest(3, str(shutil.copytree(one, tmp_path / "copy"))) == first
    assert AdapterNames().digest(7, one) == names.digest(1, one) == first
    Path(one, "notes.txt").write_text("not read by an engine")
    assert names.digest(1, one) == first


@pytest.mark.parametrize("what", ["weights", "same bytes", "config", "new file", "gone"])
def test_files_that_are_touched_end_a_name(tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    path, before = adapter(tmp_path / "live"), adapter(tmp_path / "before")
    names = AdapterNames()
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
    names = AdapterNames()
    assert names.digest(1, one) is not None
    assert names.digest(1, two) is None
    assert names.digest(1, one) is None
    assert names.digest(1, two, reloads=True) is not None


def test_what_is_no_adapter_here_has_none(tmp_path: Path) -> None:
    names = AdapterNames()
    assert names.digest(1, "someone/adapter") is None
    (tmp_path / "empty").mkdir()
    assert names.digest(2, str(tmp_path / "empty")) is None
    (tmp_path / "empty" / "adapter_config.json").write_text("{}")
    assert names.digest(3, str(tmp_path / "empty")) is None
