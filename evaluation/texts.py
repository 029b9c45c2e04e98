"""Natural text out of files and folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TEXT_SUFFIXES = (".txt", ".md", ".rst")


def read_texts(paths: Sequence[Path]) -> list[str]:
    """The texts of files, and of the text files in folders.

    Raises
    ------
    ValueError : no paths, none there, no text in one, or it is not UTF-8.
    """
    if not paths:
        raise ValueError("no text; name files or folders of it with --text")
    texts = []
    for path in paths:
        if path.is_dir():
            texts += read_documents(path)
        elif (text := _read(path)).strip():
            texts.append(text)
        else:
            raise ValueError(f"{path} holds no text; leave it out")
    return texts


def read_documents(folder: Path) -> list[str]:
    """The non-empty text files of a folder and the folders in it, by name.

    Raises
    ------
    ValueError : there is no such folder, no text in it, or a file is not UTF-8.
    """
    suffixes = ", ".join(TEXT_SUFFIXES)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; expected a folder of {suffixes} files")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES)
    texts = [text for path in paths if (text := _read(path)).strip()]
    if not texts:
        raise ValueError(f"no documents in {folder}; expected non-empty {suffixes} files")
    return texts


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text; convert it or leave it out") from error
    except OSError as error:
        raise ValueError(f"cannot read the text {path}: {error.strerror}") from error
