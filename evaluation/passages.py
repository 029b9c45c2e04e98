"""Real text that comes with the package: questions over Wikipedia passages, and held-out English.

Origins and licences are in `data/README.md`.
"""

import gzip
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

TUNE, CHECK = SPLITS = ("tune", "check")
"""Text, names and seeds that methods may be tuned on, and those that they are checked with: kept apart."""

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


def load_questions(split: str | None = None) -> list[Question]:
    """The 100 MuSiQue questions of the package, 10 passages each; or those of one split (`SPLITS`): about a third to
    tune on, the rest to check with. Questions that share a passage are in the same split.
    """
    rows = map(json.loads, _read("musique_100.jsonl.gz").splitlines())
    found = [Question(row["question"], tuple(row["answers"]), tuple(row["passages"])) for row in rows]
    if split is None:
        return found
    wanted = _check_split(split) == TUNE
    return [one for one, first in zip(found, _first_relatives(found), strict=True) if (first % 3 == 0) == wanted]


def load_heldout(split: str | None = None) -> list[str]:
    """Paragraphs of the Debian Administrator's Handbook, which the reference model never saw; or of one split: profiles
    and selectors learn from the first half, which is `tune`.
    """
    lines = [line for line in _read("heldout.txt.gz").splitlines() if line]
    if split is None:
        return lines
    half = len(lines) // 2
    return lines[:half] if _check_split(split) == TUNE else lines[half:]


def _check_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    return split


def _first_relatives(questions: Sequence[Question]) -> list[int]:
    """For each question the number of the first one with which it shares a passage, directly or through others."""
    relatives = list(range(len(questions)))
    holders: dict[str, int] = {}
    for number, question in enumerate(questions):
        for passage in question.passages:
            other = relatives[holders.setdefault(passage[:200], number)]
            mine = relatives[number]
            low, high = min(mine, other), max(mine, other)
            relatives = [low if relative == high else relative for relative in relatives]
    return relatives


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
