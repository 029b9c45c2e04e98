"""How much `kvloom bench vllm` measures, whole and in a quick run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .inputs import Shape
from .windows import FULL_WINDOWS, QUICK_WINDOWS, WindowSizes


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    Attributes
    ----------
    wide : the random model; None to measure times on the bundled one alone.
    documents, document_tokens : of a prompt whose first token is timed.
    texts, text_tokens : that tokens are compared on, and how long the longest is.
    records, record_tokens : that are answered, and of their documents together.
    context_tokens, contexts : behind which is decoded through retrieval, and how many of each kind of task.
    long_tokens : behind which the default retrieval is timed, on a random model; 0 for not at all.
    windows : of a hit in a model with windows.
    families : that are served, by their names in `FAMILIES`; none takes no time, all of them minutes.
    """

    wide: Shape | None
    rounds: int
    decode_rounds: int
    documents: int
    document_tokens: int
    batch: int
    new_tokens: int
    texts: int
    text_tokens: int
    records: int
    record_tokens: int
    max_tokens: int
    context_tokens: int
    contexts: int
    long_tokens: int
    windows: WindowSizes
    families: Sequence[str]


FULL_SIZES = Sizes(
    wide=Shape(),
    rounds=7,
    decode_rounds=15,
    documents=9,
    document_tokens=512,
    batch=4,
    new_tokens=128,
    texts=104,
    text_tokens=1500,
    records=200,
    record_tokens=4480,
    max_tokens=8192,
    context_tokens=16_384,
    contexts=2,
    long_tokens=65_536,
    windows=FULL_WINDOWS,
    families=(),
)
QUICK_SIZES = Sizes(
    wide=None,
    rounds=2,
    decode_rounds=2,
    documents=4,
    document_tokens=256,
    batch=2,
    new_tokens=32,
    texts=8,
    text_tokens=600,
    records=2,
    record_tokens=1024,
    max_tokens=4096,
    context_tokens=1024,
    contexts=1,
    long_tokens=2048,
    windows=QUICK_WINDOWS,
    families=("DeepSeek V2",),
)
