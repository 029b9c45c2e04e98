"""Documents to passages that a model can read, cut where a reader would cut."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

try:
    from semantic_text_splitter import MarkdownSplitter, TextSplitter
except ImportError as error:
    raise ImportError('kvloom.rag needs semantic-text-splitter: pip install "kvloom[rag]"') from error


class Splitter:
    """Cuts texts at headings, paragraphs, sentences, words: the largest of them that gives at most `passage_tokens`.

    Parameters
    ----------
    tokenizer : a fast tokenizer of transformers; it counts the tokens.
    passage_tokens : the most tokens of a passage. Fewer, larger passages leave fewer borders for fusion to mend.
    """

    def __init__(self, tokenizer: Any, passage_tokens: int) -> None:
        if isinstance(passage_tokens, bool) or not isinstance(passage_tokens, int) or passage_tokens < 16:
            raise ValueError(f"passage_tokens is {passage_tokens!r}; expected a number of at least 16")
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise TypeError(
                f"tokenizer is of type {type(tokenizer).__name__}; expected a fast tokenizer of transformers"
            )
        state = json.loads(backend.to_str())
        state["truncation"] = state["padding"] = None
        plain = json.dumps(state)
        self._text = TextSplitter.from_huggingface_tokenizer_str(plain, passage_tokens, trim=True)
        self._markdown = MarkdownSplitter.from_huggingface_tokenizer_str(plain, passage_tokens, trim=True)

    def split(self, text: str, *, is_markdown: bool = False) -> list[tuple[int, int]]:
        """First character and the one behind the last of each passage, in order; white space between is left out."""
        splitter = self._markdown if is_markdown else self._text
        found: Sequence[tuple[int, str]] = splitter.chunk_indices(text)
        return [(start, start + len(part)) for start, part in found if part.strip()]
