"""English prose for language modelling, from documentation that any Debian machine may install.

Sources: the HTML, POD and text files of the Debian packages in `PACKAGES` (each under the free licence in its
own `copyright` file), the licences in `/usr/share/common-licenses`, and the docstrings of the running Python's
standard library. `debian-handbook` is never trained on: it is the held-out text.
"""

import argparse
import ast
import gzip
import hashlib
import html.parser
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    *("git-doc", "postgresql-doc-15", "sqlite3-doc", "python3.11-doc", "debian-policy", "developers-reference"),
    *("maint-guide", "debian-faq", "debian-reference-en", "perl-doc", "python-django-doc", "postfix-doc"),
)
HELD_OUT_PACKAGE = "debian-handbook"
_BLOCKS = {"p", "li", "dd", "dt", "div", "section", "td", "tr", "h1", "h2", "h3", "h4", "blockquote", "body"}
_SKIPPED = {"script", "style", "pre", "nav", "head", "table", "code-block"}


class _Paragraphs(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._skip_depth = 0

    def _end_paragraph(self) -> None:
        if self._text:
            self.paragraphs.append("".join(self._text))
            self._text = []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 - named by HTMLParser
        if tag in _SKIPPED:
            self._skip_depth += 1
        if tag in _BLOCKS:
            self._end_paragraph()

    def handle_endtag(self, tag: str) -> None:
        if tag in _SKIPPED:
            self._skip_depth = max(0, self._skip_depth - 1)
        if tag in _BLOCKS:
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if not self._skip_depth:
            self._text.append(data)


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        60 <= len(paragraph) <= 4000
        and paragraph.isascii()
        and letters >= 0.9 * len(paragraph)
        and paragraph.rstrip()[-1:] in ".:;!?)"
    )


def _file_paragraphs(path: Path) -> Iterator[str]:
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    text = raw.decode("utf-8", errors="ignore")
    if path.name.removesuffix(".gz").endswith((".html", ".htm")):
        parser = _Paragraphs()
        parser.feed(text)
        parser.close()
        yield from parser.paragraphs
    else:
        yield from re.sub(r"[A-Z]<+\s*(.*?)\s*>+", r"\1", text).split("\n\n")


def _docstrings(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield from (ast.get_docstring(node) or "").split("\n\n")


def clean(paragraphs: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    """Whitespace folded, prose only, each paragraph once."""
    for paragraph in paragraphs:
        folded = " ".join(paragraph.split())
        digest = hashlib.blake2b(folded.lower().encode(), digest_size=8).digest()
        if _is_prose(folded) and digest not in seen:
            seen.add(digest)
            yield folded


def collect(packages_dir: Path, out_dir: Path) -> None:
    """Write `train.txt` and `heldout.txt`: one paragraph a line, files separated by an empty line."""
    out_dir.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()

    def write(name: str, groups: Iterator[Iterator[str]]) -> None:
        with (out_dir / name).open("w") as out:
            for group in groups:
                lines = list(clean(group, seen))
                if lines:
                    out.write("\n".join(lines) + "\n\n")

    def files(package: str, part: str = "") -> Iterator[Iterator[str]]:
        for path in sorted((packages_dir / package).rglob("*")):
            wanted = re.search(r"\.(html?|txt|pod)(\.gz)?$", path.name) and part in str(path)
            if wanted and path.is_file() and not path.is_symlink():
                yield _file_paragraphs(path)

    def training() -> Iterator[Iterator[str]]:
        for package in PACKAGES:
            yield from files(package)
        for path in sorted(Path("/usr/share/common-licenses").glob("*")):
            if path.is_file() and not path.is_symlink():
                yield _file_paragraphs(path)
        yield _docstrings(Path(sysconfig.get_paths()["stdlib"]))

    write("heldout.txt", files(HELD_OUT_PACKAGE, "en-US"))
    write("train.txt", training())


def download(packages_dir: Path) -> None:
    """`apt-get download` and unpack every package, without installing any."""
    for package in [*PACKAGES, HELD_OUT_PACKAGE]:
        target = packages_dir / package
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as work:
            subprocess.run(["apt-get", "download", "-q", package], cwd=work, check=True)
            for archive in Path(work).glob("*.deb"):
                subprocess.run(["dpkg", "-x", str(archive), str(target)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder for the unpacked Debian packages")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.txt and heldout.txt")
    args = parser.parse_args()
    download(args.packages)
    collect(args.packages, args.out)
    for name in ("train.txt", "heldout.txt"):
        print(name, (args.out / name).stat().st_size, "bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
