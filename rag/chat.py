"""Chats over documents of a corpus, as frameworks have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..connectors.hf.answering import Generation, Sampling, chat_prompt
from .corpus import Corpus


def chat_generation(
    corpus: Corpus, messages: Sequence[Mapping[str, str]], documents: Sequence[str], sampling: Sampling
) -> Generation:
    """What makes the next message of a chat, for `Corpus.run` or `pieces_of`; it then has the usage and how it ended.

    Parameters
    ----------
    messages : `role` (system, user, assistant) and `content` of each; documents stand before the first user's words.
    documents : texts, in the order in which the model reads them; those that the corpus holds are not computed again.

    Raises
    ------
    ValueError : there are no messages.
    """
    if not messages:
        raise ValueError("messages is empty; give at least one")
    connector = corpus.connector
    prompt = chat_prompt(connector.tokenizer, [dict(message) for message in messages], has_documents=bool(documents))
    return Generation(lambda: connector, list(documents), prompt, sampling)
