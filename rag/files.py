"""Text of files: plain text, Markdown, HTML and PDF; what cannot be read is named with the reason."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_HTML = (".html", ".htm", ".xhtml")
_MARKDOWN = (".md", ".markdown", ".mdx")
_MOST_BYTES = 256 << 20
# What files that are no Unicode are written in. Among all that are known, rare ones are taken for them by mistake.
_ENCODINGS = ["cp1252", "cp1250", "cp1251", "shift_jis", "gb18030", "big5", "euc_kr", "euc_jp", "koi8_r"]
_SPACES = re.compile(r"\s+")
_BLOCKS = ("p", "h1", "h2", "h3", "h4", "h5", "h6", "section", "article", "table", "ul", "ol", "pre", "blockquote")
_LOOKED_AT = 8192  # bytes; a file with a zero byte among its first ones is no text


@dataclass(frozen=True, slots=True)
class FileText:
    """A file's text and its title: the one that an HTML page or a PDF states, otherwise the file's name."""

    path: Path
    text: str
    title: str
    is_markdown: bool


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was left out, and why."""

    path: Path
    why: str


def state_of(path: Path) -> str:
    """Size and time of change: while they stay, a file is not read again."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def files_in(paths: Iterable[Path]) -> Iterator[Path]:
    """The files themselves, and all files below folders, in order of their names; hidden ones are left out.

    Raises
    ------
    FileNotFoundError : a path does not exist.
    """
    for path in paths:
        if path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))
        elif path.exists():
            yield path
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")


def read_file(path: Path) -> FileText | Skipped:
    """A file's text, or why there is none."""
    try:
        if not path.is_file():
            return Skipped(path, "no regular file")
        size = path.stat().st_size
        if size == 0:
            return Skipped(path, "empty")
        if size > _MOST_BYTES:
            return Skipped(path, f"{size / (1 << 20):.0f} MiB; files of at most {_MOST_BYTES >> 20} MiB are read")
        data = path.read_bytes()
    except OSError as error:
        return Skipped(path, error.strerror or str(error))
    if data.startswith(b"%PDF-"):
        return _pdf(path)
    decoded = _decoded(data)
    if decoded is None:
        return Skipped(path, "no text")
    title, text = path.stem, decoded
    if path.suffix.lower() in _HTML:
        title, text = _html(decoded, title)
    if not text.strip():
        return Skipped(path, "no text in it")
    return FileText(path, text, title, path.suffix.lower() in _MARKDOWN)


def _decoded(data: bytes) -> str | None:
    """Text of bytes in UTF-8, UTF-16, UTF-32 with their marks, or else in the encoding that fits them best."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    ):
        if data.startswith(mark):
            try:
                return data.decode(name)
            except UnicodeDecodeError:
                return None
    if b"\0" in data[:_LOOKED_AT]:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = from_bytes(data[: 1 << 20], cp_isolation=_ENCODINGS).best()
        if best is None:
            return None
        try:
            return data.decode(best.encoding)
        except UnicodeDecodeError:
            return data.decode(best.encoding, "replace")


def _html(text: str, title: str) -> tuple[str, str]:
    from bs4 import BeautifulSoup

    page = BeautifulSoup(text, "html.parser")
    for tag in page(["script", "style", "noscript", "template", "nav", "svg"]):
        tag.decompose()
    stated = page.title.get_text(" ", strip=True) if page.title else ""
    if page.head:
        page.head.decompose()
    for piece in page.find_all(string=True):  # where a line ends in the source says nothing, outside of <pre>
        if piece.find_parent("pre") is None:
            piece.replace_with(_SPACES.sub(" ", piece))
    for tag in page([*_BLOCKS, "br", "li", "tr", "div"]):
        tag.append("\n\n" if tag.name in _BLOCKS else "\n")
    lines = [line.strip() for line in page.get_text().splitlines()]
    body = "\n".join(line for i, line in enumerate(lines) if line or (i and lines[i - 1]))
    return stated or title, body.strip()


def _pdf(path: Path) -> FileText | Skipped:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            return Skipped(path, "encrypted")
        pages = [(page.extract_text() or "").strip() for page in reader.pages]
        title = str((reader.metadata and reader.metadata.title) or "").strip()
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OSError) as error:
        return Skipped(path, f"damaged PDF: {error}"[:200])
    text = "\n\n".join(page for page in pages if page)
    if not text:
        return Skipped(path, "a PDF without text: its pages are pictures")
    return FileText(path, text, title or path.stem, False)
