"""Documents and texts to token ids, from any number of threads at once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache

from transformers import PreTrainedTokenizerBase

_KEPT_TEXTS = 2048
_KEPT_CHARACTERS = 4096  # longer texts are not kept: all together take 16 MB at most


class Tokenization:
    """Token ids of documents and of texts.

    A tokenizer of transformers keeps the options of its last call, among them whether special tokens are split. Threads
    that call one with different options disturb each other: tokens come out wrong, and text of a document becomes a
    live special token. So documents and texts get a copy of the tokenizer each, that is always called alike and that
    nobody else has. Token ids of the last documents are kept: a passage is looked at several times for one answer, and
    again for the next.

    Parameters
    ----------
    tokenizer : copied; what is added to it later is not seen here.
    separator : ends every document that does not end with it.

    Attributes
    ----------
    tokenizer : the copy for texts.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self._for_documents, self.tokenizer = deepcopy(tokenizer), deepcopy(tokenizer)
        self._separator = separator
        self._recent = lru_cache(_KEPT_TEXTS)(lambda text: tuple(self._encode_document(text)))
        # The first call of each sets its options for good.
        end_ids = self.encode_text(separator)
        # A separator with special tokens follows a document as tokens; a plain text may merge with the document's.
        self._special_end = [] if set(end_ids).isdisjoint(tokenizer.all_special_ids) else end_ids
        self._unsplit = self._special_tokens_that_stay_whole()

    def encode_document(self, text: str, name: str) -> list[int]:
        """Token ids of a document, ended by the separator, without BOS; special tokens in it are plain text.

        Raises
        ------
        ValueError : it has no tokens, or a special token that this tokenizer cannot read as plain text.
        """
        if not self._special_end and not text.endswith(self._separator):
            text += self._separator
        ids = list(self._recent(text)) if len(text) <= _KEPT_CHARACTERS else self._encode_document(text)
        if not ids:
            raise ValueError(f"{name} has no tokens; leave it out")
        if not self._unsplit.keys().isdisjoint(ids):
            found = next(self._unsplit[token] for token in ids if token in self._unsplit)
            raise ValueError(f"{name} contains {found!r}, which its tokenizer cannot read as plain text; remove it")
        return ids + self._special_end

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text of the application's own, without BOS; special tokens in it are special."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _encode_document(self, text: str) -> list[int]:
        ids: list[int] = self._for_documents(
            text, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        return ids

    def _special_tokens_that_stay_whole(self) -> dict[int, str]:
        """Special tokens, by id, that come out of a document with their text in it, although they are to be split.

        Not among them: an unknown and a padding token of their own, which ordinary text may use.
        """
        tokenizer = self._for_documents
        special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        special |= {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        usual = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id}
        return {i: text for i, text in special.items() if i not in usual and i in self._encode_document(text)}
