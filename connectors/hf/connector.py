"""Hugging Face transformers: precompute documents once, fuse any of them into a cache that `model.generate` accepts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, takewhile
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

try:
    from rich.progress import Progress
    from transformers import DynamicCache, PreTrainedTokenizerBase
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.connector needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ...blend.blender import BlendedContext, Blender
from ...blend.choosers import CHOOSERS
from ...calibration.certificate import Certificate
from ...core import ChunkKey, KVChunk, KVSpec
from ...errors import TierError
from ...kvstore.chunk_store import ChunkStore
from ...kvstore.keys import content_key
from ...retrieval.settings import Retrieval
from ..identity.requests import chunk_salt, natural_lead
from ..serving.controller.decisions import Reason
from .documents import Document, document_text, document_texts, valid_text
from .generation import generation_call
from .identity import unwrapped
from .load_choice import Choice, LoadChoice, LoadOrRecompute
from .model import TransformersModel
from .prefill import Prefill
from .prompts import Prompts, TokenIds, positive_count, token_ids
from .retrieval.plan import RetrievalPlanner
from .retrieval.session import Generated, Session
from .source import LostChunksError, StoreSource
from .tokenization import Tokenization

_LOG = logging.getLogger("kvloom")


@dataclass(frozen=True, slots=True)
class Precomputed:
    """What `precompute` did: documents computed, documents already stored, tokens computed."""

    computed: int
    stored: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class FusedContext:
    """A fused context.

    Attributes
    ----------
    token_ids : `[S]`, lead and documents.
    blended : KV of them.
    exact_documents : leading documents whose KV of this very context was stored.
    computed_tokens : tokens of documents that were computed rather than loaded, mean over the layers.
    stored_s : seconds that computing what was loaded took once, as far as the store remembers.
    is_exact : whether all KV is that of a full prefill.
    decisions : for each document about which something was decided, why it was loaded or not, see `LoadChoice`. Those
        that a full recompute computes in any case, and those that could only be fused instead, are left out.
    """

    token_ids: Tensor
    blended: BlendedContext
    exact_documents: int
    computed_tokens: float
    stored_s: float
    is_exact: bool
    decisions: tuple[Reason, ...] = ()


class TransformersConnector:
    """kvloom inside a RAG pipeline built on transformers.

    Every document is one content chunk, computed alone behind the lead tokens (a BOS, whose KV is dropped again) and
    placed anywhere later. The question is always computed in full, by the model itself, over the fused cache. All
    methods may be called from several threads.

    Documents are texts, or objects of a RAG framework that have one, see `document_texts`.

    Parameters
    ----------
    model, tokenizer : a Hugging Face causal language model whose layers can be run in steps, see `TransformersModel`
        and docs/models.md, and its tokenizer. The model may change, and adapters may come and go: every method looks
        which KV it would compute now, see `ModelIdentity`. The tokenizer is copied.
    store : where chunks live.
    blender : how they are fused; None for `Blender()`.
    model_id : names the weights as they are now; None for the name of the model's folder if it holds them, and
        otherwise one made of their values.
    lead_ids : tokens in front of every context; None for the tokenizer's own, see `natural_lead`. Behind none at all,
        which warns, the first token of every document becomes a sink of attention and documents break when they are
        moved.
    salt : the tenant's secret, part of every key.
    separator : ends every document that does not end with it.
    pack_tokens : documents are packed into forward passes of about this many tokens.
    reuse_contexts : begin every context with the documents whose KV behind the same beginning is stored, which is
        exact, and at ratio 1 store each document as it is in its context. Off, every context is fused from documents
        that were computed alone.
    certificates : permit approximate retrieval, see `kvloom certify --retrieval`.
    allow_uncertified : use it without a certificate all the same; warns every time.
    load_or_recompute : `always`: what is stored is loaded. `auto`: a document or the next chunk of a prompt is
        computed instead where loading it takes longer, by what both have cost in this process. Only what is exact
        either way is decided: the ratio of a fusion does not change, and saved sessions are loaded.

    Raises
    ------
    EngineError : the model is of a kind that cannot be fused.
    TypeError, ValueError : an argument of the wrong type or value; the message names it. So do all methods.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        store: ChunkStore,
        blender: Blender | None = None,
        *,
        model_id: str | None = None,
        lead_ids: TokenIds | None = None,
        salt: bytes = b"",
        separator: str = "\n",
        pack_tokens: int = 4096,
        reuse_contexts: bool = False,
        certificates: Sequence[Certificate] = (),
        allow_uncertified: bool = False,
        load_or_recompute: LoadOrRecompute = "always",
    ) -> None:
        _expect("tokenizer", tokenizer, PreTrainedTokenizerBase)
        _expect("store", store, ChunkStore)
        _expect("salt", salt, bytes)
        if blender is not None:
            _expect("blender", blender, Blender)
        if model_id is not None:
            _expect("model_id", model_id, str)
        for i, certificate in enumerate(certificates if isinstance(certificates, Iterable) else [certificates]):
            _expect(f"certificates[{i}]", certificate, Certificate)
        self.model = unwrapped(model).eval()
        self.tokenizer = tokenizer
        self.store = store
        self.blender = blender or Blender()
        self.layers = TransformersModel(self.model, model_id=model_id)
        self._reuses_contexts = reuse_contexts
        self._salt = chunk_salt(tenant=salt)
        self._tokenization = Tokenization(tokenizer, valid_text(separator, "separator"))
        self._vocabulary: int = self.model.config.vocab_size
        if lead_ids is None:
            self.lead_ids = natural_lead(self._tokenization.tokenizer)
        else:
            self.lead_ids = tuple(token_ids(lead_ids, "lead_ids", vocabulary=self._vocabulary))
        if not self.lead_ids:
            _LOG.warning(
                "documents are computed behind no lead tokens: the first token of each becomes a sink of attention, "
                "and answers over fused documents suffer; give lead_ids, a BOS or the beginning of a prompt"
            )
        self._prefill = Prefill(
            self.layers, lead_ids=self.lead_ids, pack_tokens=positive_count(pack_tokens, "pack_tokens")
        )
        self._choice = LoadChoice(load_or_recompute)
        self._planner = RetrievalPlanner(
            self.layers,
            store,
            self._salt,
            tuple(certificates),
            allow_uncertified=allow_uncertified,
            choice=self._choice,
        )
        self._leads: dict[KVSpec, KVChunk] = {}

    @property
    def spec(self) -> KVSpec:
        """Of the KV that the model computed in the last call."""
        return self.layers.spec

    # ------------------------------------------------------------------------------------------------ tokens

    def encode_document(self, document: Document) -> list[int]:
        """Token ids of one document, ended by the separator, without BOS.

        A document is data: what looks like a special token in it is plain text (in the separator and the question,
        which are the application's own, it is special).

        Raises
        ------
        ValueError : the document is empty, longer than the model's context, or no valid Unicode.
        """
        return self._encode(document_text(document), "document")

    def _encode(self, text: str, name: str) -> list[int]:
        ids = self._tokenization.encode_document(text, name)
        if len(ids) + len(self.lead_ids) >= self.layers.max_tokens:
            raise ValueError(
                f"{name} has {len(ids)} tokens, the model's context {self.layers.max_tokens}; split it: "
                f"{text.strip()[:40]!r}..."
            )
        return ids

    def _encode_all(self, documents: object) -> list[list[int]]:
        return [self._encode(text, f"documents[{i}]") for i, text in enumerate(document_texts(documents))]

    def encode_question(self, text: str) -> list[int]:
        """Token ids of what follows the documents, without BOS."""
        return self._tokenization.encode_text(valid_text(text, "question"))

    def _checked(self, documents: Sequence[TokenIds]) -> list[list[int]]:
        """Token ids of documents, each with at least one."""
        rows = [token_ids(ids, f"documents[{i}]", vocabulary=self._vocabulary) for i, ids in enumerate(documents)]
        if not rows or not all(rows):
            empty = f"documents[{rows.index([])}]" if rows else "documents"
            raise ValueError(f"{empty} is empty; give at least one token")
        return rows

    def key_of(self, token_ids: TokenIds) -> ChunkKey:
        """Key under which the store holds a document of these tokens."""
        return self.keys_of([token_ids])[0]

    def keys_of(self, documents: Sequence[TokenIds]) -> list[ChunkKey]:
        """Keys under which the store holds documents of these tokens."""
        self.layers.refresh()
        return [self._key_of(ids) for ids in self._checked(documents)]

    def _key_of(self, ids: Sequence[int]) -> ChunkKey:
        return content_key(self.spec, ids, lead_ids=self.lead_ids, salt=self._salt)

    # -------------------------------------------------------------------------------------------- precompute

    def precompute(self, documents: Iterable[Document], *, progress: bool = False) -> Precomputed:
        """Compute and store the KV of documents that are not stored yet, many in one forward pass.

        Parameters
        ----------
        documents : equal ones are computed once.
        progress : show a progress bar.

        Raises
        ------
        ValueError : no documents, an empty one, or one longer than the model's context.
        TierError : no tier can hold a chunk.
        """
        encoded = self._encode_all(documents)
        self.layers.refresh()
        by_key = {self._key_of(ids): ids for ids in encoded}
        todo = {key: ids for key, ids in by_key.items() if key not in self.store}
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("precomputing documents", total=sum(map(len, todo.values())))
            for key, chunk, spent_s in self._prefill.documents(todo):
                self._choice.observe_prefill(len(chunk), len(self.lead_ids) + len(chunk) / 2, spent_s)
                self.store.put(key, chunk, recompute_s=spent_s)
                bar.advance(task, len(chunk))
        return Precomputed(len(todo), len(by_key) - len(todo), sum(map(len, todo.values())))

    def compute(self, documents: Sequence[TokenIds]) -> list[KVChunk]:
        """KV of documents (token ids), each alone behind the lead tokens (whose KV is left out), in one forward."""
        self.layers.refresh()
        return self._prefill.behind_lead(self._checked(documents))

    # -------------------------------------------------------------------------------------------------- fuse

    def fuse(
        self,
        documents: Sequence[TokenIds],
        *,
        opening_ids: TokenIds | None = None,
        question_ids: TokenIds | None = None,
        blender: Blender | None = None,
    ) -> FusedContext:
        """KV of documents (token ids) in this order, behind the lead tokens; what is not stored is computed and stored.

        With `reuse_contexts`, leading documents whose KV in this context is stored are loaded and exact; at ratio 1 the
        others are stored as they are in this context.

        `opening_ids` stand in front of the documents in place of the lead tokens (a chat with a system message of its
        own) and are stored, too; then the first document is fused like the others.

        `question_ids` are the tokens that will follow, of which a blender may make its choice: the context then suits
        this question best, and should not be kept for another one. Without them, it goes by deviation alone.

        Chunks that turn out corrupt, gone or too slow while they are read are computed again and the fusion starts
        over, so that a damaged store costs time, never the answer.
        """
        rows, blender = self._checked(documents), blender or self.blender
        question = None
        if question_ids is not None:
            question = torch.tensor(token_ids(question_ids, "question_ids", vocabulary=self._vocabulary)).long()
        self.layers.refresh()
        opening = list(self.lead_ids)
        if opening_ids is not None:
            opening = token_ids(opening_ids, "opening_ids", vocabulary=self._vocabulary)
        is_lead = opening == list(self.lead_ids)
        alone = [self._key_of(ids) for ids in rows]
        in_context = self._context_keys(opening, rows if self._reuses_contexts else rows[: int(is_lead)])
        lead = [opening] if opening else []
        lead_keys = [content_key(self.spec, ids, salt=self._salt) for ids in lead]
        held = {key: self._lead for key in lead_keys if is_lead}
        context = torch.tensor(list(chain.from_iterable([*lead, *rows])))
        starts = list(accumulate(map(len, [*lead, *rows][:-1]), initial=0))
        in_full = blender.recompute_ratio >= 1.0
        lost: set[ChunkKey] = set()
        choices: dict[ChunkKey, Choice] = {}

        def is_loaded(key: ChunkKey, ids: Sequence[int], position: int) -> bool:
            if key in lost or (tier := self.store.locate(key)) is None:
                choices[key] = Choice(False, "nothing stored")
            elif key not in choices:
                choices[key] = self._choice.decide(tier, len(ids) * self.spec.token_bytes, len(ids), position)
            return choices[key].loads

        computed_tokens = 0.0
        with self.store.pinned(list(dict.fromkeys([*lead_keys, *alone, *in_context]))):
            while True:
                for key in lead_keys:
                    if key not in held and (key in lost or key not in self.store):
                        self._compute_opening(key, opening, held)
                # Below ratio 1, a document that is not loaded as it is in this context would be fused instead: that is
                # no choice, but for the first one, which is computed alone in any case.
                places = zip(in_context, rows, starts[len(lead) :], strict=False)
                stored = (
                    is_loaded(key, ids, start) if in_full else key not in lost and key in self.store
                    for key, ids, start in places
                )
                exact = sum(takewhile(bool, stored))
                if exact == 1 and is_lead and not in_full and not is_loaded(in_context[0], rows[0], len(opening)):
                    exact = 0
                # The first document has the lead tokens before it: alone, its KV is already that of this context.
                begun = max(exact, int(is_lead))
                # At ratio 1 documents are computed in this context; alone they are of use for other ones, unless those
                # are to begin alike.
                loaded = [*in_context[:exact], *alone[exact : begun if in_full and self._reuses_contexts else None]]
                missing = {
                    key: ids
                    for place, (key, ids) in enumerate(zip(loaded[exact:], rows[exact:], strict=False), exact)
                    if key not in held
                    and not (
                        is_loaded(key, ids, len(self.lead_ids))
                        if place < begun or not in_full  # otherwise it is stored for others, and not read
                        else key not in lost and key in self.store
                    )
                }
                computed_tokens += sum(map(len, missing.values()))
                self._compute_missing(missing, held)
                source = StoreSource(
                    self.store,
                    [*lead_keys, *loaded, *alone[len(loaded) :]],
                    starts,
                    len(context),
                    self.spec.num_layers,
                    held,
                )
                began_s = time.perf_counter()
                try:
                    blended = blender.blend(
                        self.layers,
                        context,
                        starts,
                        source,
                        exact_tokens=len(opening) + sum(map(len, rows[:begun])),
                        question_ids=question,
                        device=self.layers.device,
                    )
                    break
                except LostChunksError as error:
                    lost |= error.keys
            for tier, nbytes, read_s in source.reads.values():
                self._choice.observe_load(tier, nbytes, read_s)
            if in_full and self._reuses_contexts:
                start = len(opening) + sum(map(len, rows[:begun]))
                spent_s = time.perf_counter() - began_s
                self._store_in_context(rows[begun:], in_context[begun:], start, blended, spent_s)
        return FusedContext(
            context,
            blended,
            exact_documents=exact,
            computed_tokens=computed_tokens + blended.computed_tokens,
            stored_s=sum(each.recompute_s or 0.0 for each in self.store.explain([k for k in loaded if k not in held])),
            is_exact=in_full or blended.candidates == 0,
            decisions=tuple(choices[key].reason for key in dict.fromkeys([*in_context, *alone]) if key in choices),
        )

    def stored_contexts(self, documents: Sequence[TokenIds]) -> Callable[[Sequence[int]], bool]:
        """A test of orders of these documents (token ids): whether the store has the KV of the last one that an order
        names, by index, as it is behind the others in that order, for the model as it is now.

        So an order can be found that begins with what need not be computed.
        """
        self.layers.refresh()
        rows = self._checked(documents)

        def is_stored(order: Sequence[int]) -> bool:
            *before, last = order
            ids = [*self.lead_ids, *chain.from_iterable(rows[i] for i in before)]
            return content_key(self.spec, rows[last], lead_ids=ids, salt=self._salt) in self.store

        return is_stored

    def _context_keys(self, opening: Sequence[int], rows: Sequence[Sequence[int]]) -> list[ChunkKey]:
        """Keys of documents as they are in this context: each behind the opening and the documents before it."""
        before = list(opening)
        keys = []
        for ids in rows:
            keys.append(content_key(self.spec, ids, lead_ids=before, salt=self._salt))
            before += ids
        return keys

    def _store_in_context(
        self,
        rows: Sequence[Sequence[int]],
        keys: Sequence[ChunkKey],
        start: int,
        blended: BlendedContext,
        spent_s: float,
    ) -> None:
        """Stores documents that were computed in full behind all before, from position `start` on, where the store has
        room.
        """
        token_s = spent_s / max(1, sum(map(len, rows)))
        before = None
        for ids, key in zip(rows, keys, strict=True):
            stop = start + len(ids)
            keys_here, values_here = (each[:, :, start:stop].cpu() for each in (blended.keys, blended.values))
            chunk = KVChunk(self.spec, torch.tensor(list(ids)), torch.arange(start, stop), keys_here, values_here)
            with suppress(TierError):  # the answer does not depend on it; the store has counted the fault
                self.store.put(key, chunk, after=before, recompute_s=token_s * len(ids))
            start, before = stop, key

    def _compute_missing(self, missing: Mapping[ChunkKey, Sequence[int]], held: dict[ChunkKey, KVChunk]) -> None:
        """Compute, hold for this request, and store where the store has room."""
        for key, chunk, spent_s in self._prefill.documents(missing):
            self._choice.observe_prefill(len(chunk), len(self.lead_ids) + len(chunk) / 2, spent_s)
            held[key] = chunk
            with suppress(TierError):  # held, so the answer is safe; the store has counted the fault
                self.store.put(key, chunk, recompute_s=spent_s)

    def _compute_opening(self, key: ChunkKey, opening: Sequence[int], held: dict[ChunkKey, KVChunk]) -> None:
        """As `_compute_missing`, of what a chat of its own begins with."""
        began_s = time.perf_counter()
        held[key] = self._prefill.alone(opening)
        with suppress(TierError):
            self.store.put(key, held[key], recompute_s=time.perf_counter() - began_s)

    @property
    def _lead(self) -> KVChunk:
        """KV of the lead tokens: the same in front of everything, so it never needs the store."""
        if self.spec not in self._leads:
            self._leads = {self.spec: self._prefill.lead()}
        return self._leads[self.spec]

    def assemble(self, documents: Iterable[Document], question: str) -> tuple[dict[str, Tensor], DynamicCache]:
        """Inputs and a fused cache for the stock `generate`: `model.generate(**inputs, past_key_values=cache)`, from
        transformers 5.24 on also `cache=cache`.

        The cache holds the documents; `generate` computes the question, in full, and the answer.

        Parameters
        ----------
        documents : in the order in which the model shall read them; those not stored yet are computed.
        question : what follows the documents, prompt template included.

        Returns
        -------
        tuple : `{"input_ids": [1, S + Q], "attention_mask": [1, S + Q]}` and the cache of the first S tokens.

        Raises
        ------
        ValueError : no documents, an empty one, no question, or more tokens than the model's context.
        """
        encoded, question_ids = self._encode_all(documents), self.encode_question(question)
        if not question_ids:
            raise ValueError("question is empty; at least one token must follow the documents")
        total = len(self.lead_ids) + sum(map(len, encoded)) + len(question_ids)
        if total > self.layers.max_tokens:
            raise ValueError(
                f"documents and question have {total} tokens, the model's context {self.layers.max_tokens}; "
                "give fewer or shorter documents"
            )
        return self.as_inputs(self.fuse(encoded, question_ids=question_ids), question_ids)

    def as_inputs(self, context: FusedContext, question_ids: TokenIds) -> tuple[dict[str, Tensor], DynamicCache]:
        """What `generate` takes, from a fused context and the tokens that follow it."""
        ids = token_ids(question_ids, "question_ids", vocabulary=self._vocabulary)
        # Layer by layer as the attention modules work: a `DynamicCache` made from the configuration would keep a window
        # only, if the configuration names one that the model ignores.
        blended, windows = context.blended, self.layers.window_tokens
        cache = DynamicCache(
            [
                (k[None], v[None]) if window is None else (k[None], v[None], torch.tensor(window))
                for k, v, window in zip(blended.keys, blended.values, windows, strict=True)
            ]
        )
        input_ids = torch.cat((context.token_ids, torch.tensor(ids)))[None].to(self.layers.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, cache

    def answer(self, documents: Iterable[Document], question: str, *, max_new_tokens: int = 64) -> str:
        """Greedy answer to `question` over `documents`, whatever the model's `generation_config` says about sampling,
        beams and caches; see `assemble` for errors, and `KEPT` for what it does decide.
        """
        max_new_tokens = positive_count(max_new_tokens, "max_new_tokens")
        inputs, cache = self.assemble(documents, question)
        call = generation_call(self.model, self._tokenization.tokenizer, {}, max_new_tokens=max_new_tokens)
        output = call.run(self.model, cache, call.criteria, **inputs)
        return self._tokenization.decode(output[0, inputs["input_ids"].shape[1] :].tolist())

    # ---------------------------------------------------------------------------------------------- retrieve

    def session(
        self,
        retrieval: Retrieval,
        *,
        history: Sequence[TokenIds] | None = None,
        documents: Iterable[Document] | None = None,
        blender: Blender | None = None,
    ) -> Session:
        """A conversation decoded with retrieval, over one sequence or several; to be closed.

        Parameters
        ----------
        history : token ids said before, of each sequence, for instance `Session.token_ids` of another process. What
            the store has of them is not computed again; after `Session.save`, that is all.
        documents : what one sequence begins with, fused as by `assemble`; the first prompt follows them. Their index is
            built here.
        blender : how they are fused, if not as by the connector's.

        Raises
        ------
        UncertifiedError : `retrieval` is approximate and has no certificate for this model.
        SpecMismatchError : its profile was made for another model.
        ValueError : a method's parameters do not fit, a sequence is longer than the model's context, or there are both
            history and documents.
        """
        has_history, has_documents = (
            given is not None and not (isinstance(given, list | tuple) and not given) for given in (history, documents)
        )
        if has_history and has_documents:
            raise ValueError("there are both history and documents; expected one of them")
        encoded = self._encode_all(documents) if has_documents else []
        total = len(self.lead_ids) + sum(map(len, encoded))
        if total >= self.layers.max_tokens:
            raise ValueError(f"documents have {total} tokens, the model's context {self.layers.max_tokens}; give fewer")
        self.layers.refresh()
        session = Session(
            self.model,
            self._planner.plan(retrieval),
            self._tokenization,
            lead_ids=self.lead_ids,
            max_tokens=self.layers.max_tokens,
            vocabulary=self._vocabulary,
            is_length_bound=self.layers.is_length_bound,
        )
        try:
            if has_history and history is not None:
                session.resume(history)
            if encoded:
                self._start_with(session, encoded, blender or self.blender)
        except BaseException:
            session.close()
            raise
        return session

    def _start_with(self, session: Session, documents: Sequence[Sequence[int]], blender: Blender) -> None:
        context = self.fuse(documents, blender=blender)
        # Two choosers of the user's own may bear one name: what they chose must not lie under one key.
        chooser = next((name for name, known in CHOOSERS.items() if known is blender.chooser), uuid4().hex)
        corrected = "" if blender.correction is None else f" {blender.correction.fingerprint}"
        way = f"fused {blender.recompute_ratio} {blender.spread_ratio} {blender.check_layer} {chooser}{corrected}"
        keys = [self._key_of(ids).hex() for ids in documents]
        session.start_with(context.token_ids, context.blended.keys, context.blended.values, f"{way} {keys}")

    def generate(
        self,
        prompts: Prompts,
        *,
        retrieval: Retrieval,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Generated:
        """One turn of a `session`: prompts are computed densely, answers decoded with retrieval; greedy by default.

        Parameters
        ----------
        prompts : one, or one for each sequence: a text, behind the lead tokens, or token ids as they are.
        options : for `model.generate`, see `Session.generate`.
        """
        with self.session(retrieval) as session:
            return session.generate(prompts, max_new_tokens=max_new_tokens, **options)


def _expect(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is of type {type(value).__name__}; expected {kind.__name__}")
