"""What a new request consists of: its documents, its exact part, its keys. Imports no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ....blend.method import NEEDS_QUESTION, FusionMethod
from ....blend.question import QUESTION_TOKENS
from ..keys import Keys, PrefixKeys
from ..messages import Document
from ..settings import RequestOptions, ServingSettings, documents_between
from .known_documents import KnownDocuments


@dataclass(frozen=True, slots=True)
class Request:
    """A request that kvloom serves.

    Attributes
    ----------
    token_ids : of the prompt and of what the engine generates; grows, and `keys` with it.
    alone : documents that the request computes as if they were alone.
    inexact : the first token whose KV is not what plain computation gives; None if there is none.
    digest : 32 bytes that stand for everything that a fusion's KV depends on: which tokens are recomputed depends on
        all of them. Empty where all is exact.
    question : the tokens behind the documents, if tokens are chosen by them; otherwise None.
    plan : the same together with the request's salt: requests of one plan share their fusion.
    salt : of the request's keys.
    """

    token_ids: Sequence[int]
    prompt_tokens: int
    options: RequestOptions
    documents: tuple[Document, ...]
    alone: tuple[Document, ...]
    ratio: float
    inexact: int | None
    keys: PrefixKeys
    digest: bytes = b""
    plan: bytes = b""
    question: NDArray[np.int64] | None = None
    salt: bytes = b""


class RequestReader:
    """Finds the documents of requests.

    Parameters
    ----------
    settings : the user's.
    keys : makes the keys of the engine's requests.
    known : stored documents, to be found in prompts that name none; None to look for none.
    block_tokens : of the engine.
    fusion : how workers fuse; its ratio is for requests that give none.
    """

    def __init__(
        self,
        settings: ServingSettings,
        keys: Keys,
        known: KnownDocuments | None,
        block_tokens: int,
        fusion: FusionMethod,
    ) -> None:
        self._settings = settings
        self._keys = keys
        self._known = known
        self._block_tokens = block_tokens
        self._fusion = fusion

    def read(
        self,
        token_ids: Sequence[int],
        identity: bytes,
        options: RequestOptions,
        is_stored: Callable[[Document], bool],
        *,
        may_fuse: bool,
    ) -> Request:
        """As `Planner.open`. `is_stored` is asked for a document that the first rank would load."""
        salt, settings = self._keys.salt(identity), self._settings
        may_fuse = may_fuse and options.load
        spans = options.documents or documents_between(token_ids, settings.separator_ids)
        ratio = self._fusion.ratio if options.ratio is None else options.ratio
        if not spans and ratio < 1.0 and may_fuse:
            spans = self._stored_spans(token_ids, salt, is_stored)
        documents = tuple(self._keys.document(start, stop, token_ids[start:stop], salt) for start, stop in spans)
        lead_ids = self._keys.lead_ids
        is_led = tuple(token_ids[: len(lead_ids)]) == lead_ids
        alone = tuple(document for document in documents[:1] if is_led and document.start == len(lead_ids))
        # A document right behind the lead tokens was computed there: exact. So is a fusion that computes everything.
        inexact = next((each.start for each in documents if each not in alone), None) if ratio < 1.0 else None
        if inexact is not None:
            # The engine tells fused blocks from exact ones by the hash of a whole block of the prompt.
            has_whole_block = len(token_ids) // self._block_tokens > inexact // self._block_tokens
            inexact = inexact if may_fuse and has_whole_block else None
        question = None
        if inexact is not None and self._fusion.select in NEEDS_QUESTION:
            behind = np.asarray(token_ids[documents[-1].stop :], dtype=np.int64)
            question = behind[-QUESTION_TOKENS:] if len(behind) else None
        digest = b"" if inexact is None else self._digest(token_ids, documents, ratio, question)
        return Request(
            token_ids,
            len(token_ids),
            options,
            documents,
            alone,
            ratio,
            inexact,
            self._keys.prefixes(token_ids, salt),
            digest,
            b"" if inexact is None else blake3(salt + digest).digest(),
            question,
            salt,
        )

    def exact(self, request: Request) -> Request:
        """The same request without a fusion: all of it is computed, or loaded as it was computed."""
        return replace(request, inexact=None, digest=b"", plan=b"", question=None)

    def fused(self, request: Request, first: int, ratio: float) -> Request:
        """The same fusion, but the leading documents, before number `first`, are computed like what is in no document.

        Its digest is that of a request that names the other documents only, with this ratio.
        """
        documents = request.documents[first:]
        inexact = max(request.inexact or 0, documents[0].start)
        digest = self._digest(request.token_ids, documents, ratio, request.question)
        plan = blake3(request.salt + digest).digest()
        return replace(request, documents=documents, ratio=ratio, inexact=inexact, digest=digest, plan=plan)

    def _digest(
        self,
        token_ids: Sequence[int],
        documents: Sequence[Document],
        ratio: float,
        question: NDArray[np.int64] | None,
    ) -> bytes:
        spans = [(document.start, document.stop) for document in documents]
        how = self._fusion
        plan = ("kvloom fusion", ratio, how.select, how.check_layer, how.correction, self._keys.lead_ids, spans)
        fused_ids = np.asarray(token_ids[: spans[-1][1]], dtype="<i8")
        asked = b"" if question is None else question.astype("<i8").tobytes()
        return blake3(repr(plan).encode() + fused_ids.tobytes() + asked).digest()

    def _stored_spans(
        self, token_ids: Sequence[int], salt: bytes, is_stored: Callable[[Document], bool]
    ) -> tuple[tuple[int, int], ...]:
        """Spans of the stored documents in a prompt that names none."""
        if self._known is None:
            return ()
        row = np.asarray(token_ids[:], dtype=np.int64)
        return tuple(
            self._known.find(
                row,
                lambda start, stop: self._keys.content(row[start:stop], salt),
                lambda start, stop: is_stored(self._keys.document(start, stop, row[start:stop], salt)),
            )
        )
