"""`kvloom ask` as a new user would try it: a folder of all kinds of files, changed between runs."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.cli import main

from ..support.models import make_model, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    make_model("llama").save_pretrained(path)
    make_tokenizer(bos=True).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def same_logging() -> Iterator[None]:
    """The command owns its process; tests share theirs."""
    before = logging.getLogger("pypdf").level
    yield
    logging.getLogger("pypdf").setLevel(before)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    path = tmp_path / "documents"
    path.mkdir()
    (path / "harbour.md").write_text("# Harbour\n\nThe harbour is closed today.\n")
    (path / "page.html").write_text("<html><head><title>T</title></head><body><p>Carol weaves.</p></body></html>")
    return path


def ask(capsys: pytest.CaptureFixture[str], documents: Path, folder: Path, *more: str) -> tuple[int, str, str]:
    cache = documents.parent / "cache"
    words = ["ask", str(documents), "harbour today", "--model", str(folder), "--cache", str(cache)]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--max-new-tokens", "2", *more])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_all_kinds_of_files(documents: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (documents / "empty.txt").touch()
    (documents / "binary.dat").write_bytes(bytes(range(256)) * 40)
    (documents / "latin.txt").write_bytes("Le café de Zoë".encode("latin-1"))
    (documents / "broken.pdf").write_bytes(b"%PDF-1.4 broken")
    (documents / "dangling.txt").symlink_to("missing.txt")
    (documents / "loop").symlink_to(".")
    os.mkfifo(documents / "pipe.txt")
    code, out, err = ask(capsys, documents, folder)
    assert code == 0, err
    assert "documents: 3 new" in err  # the harbour, the page, the café
    for name, why in {
        "empty.txt": "empty",
        "binary.dat": "no text",
        "broken.pdf": "damaged PDF",
        "dangling.txt": "No such file",
        "pipe.txt": "no regular file",
    }.items():
        (line,) = [each for each in err.splitlines() if each.startswith(f"left out {name}: ")]
        assert why in line
    assert "EOF marker" not in "\n".join(line for line in err.splitlines() if not line.startswith("left out"))
    assert "harbour.md, characters" in out


def test_files_that_change_and_go(documents: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "documents: 2 new" in ask(capsys, documents, folder)[2]
    code, _, err = ask(capsys, documents, folder)
    assert code == 0 and "documents: 2 unchanged" in err and "tokens computed" not in err
    (documents / "harbour.md").write_text("# Harbour\n\nToday the harbour is open.\n")
    (documents / "page.html").unlink()
    code, out, err = ask(capsys, documents, folder)
    assert code == 0 and "documents: 1 changed, 1 gone" in err and "tokens computed" in err
    assert "open" in out and "closed" not in out
    (documents / "harbour.md").unlink()
    code, _, err = ask(capsys, documents, folder)
    assert code == 2 and "there is no text in" in err


def test_a_large_file_is_computed_when_it_is_asked_for(
    documents: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = "".join(f"Line {number} says that loom number {number} stands still.\n" for number in range(2000))
    (documents / "large.txt").write_text(lines)
    code, _, err = ask(capsys, documents, folder)
    assert code == 0 and "new passages; they are computed when a question needs them" in err
    assert "tokens computed" not in err
    (usage,) = [line for line in err.splitlines() if "document tokens reused" in line]
    assert usage.startswith("0 of ")
    again = ask(capsys, documents, folder)[2]
    (usage,) = [line for line in again.splitlines() if "document tokens reused" in line]
    assert not usage.startswith("0 of ")
