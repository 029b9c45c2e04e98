"""Natural text out of files and folders, named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .workload import read_documents


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
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text; convert it or leave it out") from error
        except OSError as error:
            raise ValueError(f"cannot read the text {path}: {error.strerror}") from error
        if not text.strip():
            raise ValueError(f"{path} holds no text; leave it out")
        texts.append(text)
    return texts
