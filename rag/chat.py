"""Chats over documents of a corpus, as frameworks have them: messages in, text in pieces and usage out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..connectors.hf.answering import Generation, Sampling, chat_prompt
from .corpus import Corpus


def chat(
    corpus: Corpus,
    messages: Sequence[Mapping[str, str]],
    documents: Sequence[str],
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda _: None,
) -> tuple[str, Generation]:
    """The next message of a chat, and the generation that made it (usage, how it ended, whether it is exact).

    Parameters
    ----------
    messages : `role` (system, user, assistant) and `content` of each; documents stand before the first user's words.
    documents : texts, in the order in which the model reads them; those that the corpus holds are not computed again.

    Raises
    ------
    ValueError : there are no messages, or all is longer than the model's context.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one")
    connector = corpus.connector
    prompt = chat_prompt(connector.tokenizer, [dict(message) for message in messages], has_documents=bool(documents))
    generation = Generation(lambda: connector, list(documents), prompt, sampling, on_text)
    with corpus.answering:
        return generation.run(), generation
