"""Real text that comes with the package: questions over Wikipedia passages, and held-out English.

Origins and licences are in `data/README.md`.
"""

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)]{3}[.!?]) ")  # not after "dr." or "u. s."
_DIGIT_GROUP = re.compile(r"(?<=\d), (?=\d{3}\b)")
_MIN_CHARS, _MAX_CHARS = 40, 240


@dataclass(frozen=True, slots=True)
class Question:
    """A question whose answer takes several passages.

    Attributes
    ----------
    answers : accepted spellings, at least one.
    passages : Wikipedia text in lower case, about 2,400 characters each, cut at no sentence border.
    """

    question: str
    answers: tuple[str, ...]
    passages: tuple[str, ...]


def _read(name: str) -> str:
    return gzip.decompress((files("kvloom.bench").joinpath("data", name)).read_bytes()).decode("utf-8")


def load_questions() -> list[Question]:
    """The 100 MuSiQue questions of the package, 10 passages each."""
    rows = map(json.loads, _read("musique_100.jsonl.gz").splitlines())
    return [Question(row["question"], tuple(row["answers"]), tuple(row["passages"])) for row in rows]


def load_heldout() -> list[str]:
    """Paragraphs of the Debian Administrator's Handbook, which the reference model never saw."""
    return [line for line in _read("heldout.txt.gz").splitlines() if line]


def sentences(texts: Iterable[str]) -> list[str]:
    """Whole natural sentences, each once, in their order.

    The first and the last piece of a text may be cut and are left out, as is whatever is not plain ASCII prose of
    40 to 240 characters or holds quotation marks.
    """
    found: dict[str, None] = {}
    for text in texts:
        for piece in _SENTENCE_END.split(" ".join(text.split()))[1:-1]:
            sentence = _DIGIT_GROUP.sub(",", piece).replace("( ", "(").replace(" )", ")").replace(" - ", "-")
            plain = sentence.isascii() and sentence[0].isalpha() and '"' not in sentence and "()" not in sentence
            if plain and _MIN_CHARS <= len(sentence) <= _MAX_CHARS and sentence[-1] in ".!?":
                found[sentence] = None
    return list(found)
