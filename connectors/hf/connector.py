"""Hugging Face transformers: precompute documents once, fuse any of them into a cache that `model.generate` accepts."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
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

from ...blend.attention import causal_attention
from ...blend.blender import BlendedContext, Blender
from ...blend.choosers import CHOOSERS
from ...calibration.certificate import Certificate
from ...core import ChunkKey, KVChunk, KVSpec
from ...errors import TierError
from ...kvstore.keys import content_key
from ...kvstore.store import KVStore
from ...retrieval.settings import Retrieval
from ..identity.requests import chunk_salt, lead_of
from .identity import unwrapped
from .model import TransformersModel
from .retrieval.decoding import Decoding
from .retrieval.session import Generated, Prompt, Session
from .source import LostChunksError, StoreSource


@dataclass(frozen=True, slots=True)
class Precomputed:
    """What `precompute` did: documents computed, documents already stored, tokens computed."""

    computed: int
    stored: int
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class FusedContext:
    """A fused context: its token ids (`[S]`, lead and documents) and what the blender made of them."""

    token_ids: Tensor
    blended: BlendedContext


class TransformersConnector:
    """kvloom inside a RAG pipeline built on transformers.

    Every document is one content chunk, computed alone behind the lead tokens (a BOS, whose KV is dropped again) and
    placed anywhere later. The question is always computed in full, by the model itself, over the fused cache.

    Parameters
    ----------
    model, tokenizer : a Hugging Face causal language model (Llama, Mistral, Qwen2 or Qwen3) and its tokenizer. The
        model may change, and adapters may come and go: every method looks which KV it would compute now, see
        `ModelIdentity`.
    store : where chunks live.
    blender : how they are fused; None for `Blender()`.
    model_id : names the weights as they are now; None for the name of the model's folder if it holds them, and
        otherwise one made of their values.
    lead_ids : tokens in front of every context; None for the BOS if the tokenizer puts one in front of a text.
    salt : the tenant's secret, part of every key.
    separator : ends every document that does not end with it.
    pack_tokens : documents are packed into forwards of about this many tokens.
    certificates : what makes approximate retrieval usable, see `kvloom certify --retrieval`.
    allow_uncertified : use it without a certificate all the same; warns every time.

    Raises
    ------
    EngineError : the model is of a kind that cannot be fused.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        store: KVStore,
        blender: Blender | None = None,
        *,
        model_id: str | None = None,
        lead_ids: Sequence[int] | None = None,
        salt: bytes = b"",
        separator: str = "\n",
        pack_tokens: int = 4096,
        certificates: Sequence[Certificate] = (),
        allow_uncertified: bool = False,
    ) -> None:
        if pack_tokens < 1:
            raise ValueError(f"pack_tokens is {pack_tokens}; expected at least 1")
        self.model = unwrapped(model).eval()
        self.tokenizer = tokenizer
        self.store = store
        self.blender = blender or Blender()
        self.layers = TransformersModel(self.model, model_id=model_id)
        self._salt = chunk_salt(tenant=salt)
        self._separator = separator
        self._pack_tokens = pack_tokens
        self._decoding = Decoding(
            self.layers, store, self.layers.device, self._salt, certificates, allow_uncertified=allow_uncertified
        )
        self.lead_ids = lead_of(tokenizer) if lead_ids is None else tuple(lead_ids)
        # A separator with special tokens is put behind a document as tokens; plain text may merge with the document's.
        end_ids = self.encode_question(separator)
        self._special_end = [] if set(end_ids).isdisjoint(tokenizer.all_special_ids) else end_ids
        self._leads: dict[KVSpec, KVChunk] = {}

    @property
    def spec(self) -> KVSpec:
        """Of the KV that the model computed in the last call."""
        return self.layers.spec

    # ------------------------------------------------------------------------------------------------ tokens

    def encode_document(self, document: str) -> list[int]:
        """Token ids of one document, ended by the separator, without BOS.

        A document is data: what looks like a special token in it is plain text (in the separator and the question,
        which are the application's own, it is not).

        Raises
        ------
        ValueError : the document is empty, or longer than the model's context.
        """
        if not document.strip():
            raise ValueError("a document is empty; leave it out")
        if not self._special_end and not document.endswith(self._separator):
            document += self._separator
        ids: list[int] = self.tokenizer(
            document, add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids
        ids += self._special_end
        if len(ids) + len(self.lead_ids) >= self.layers.max_tokens:
            raise ValueError(
                f"a document has {len(ids)} tokens, the model's context {self.layers.max_tokens}; split it: "
                f"{document.strip()[:40]!r}..."
            )
        return ids

    def encode_question(self, text: str) -> list[int]:
        """Token ids of what follows the documents, without BOS."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids

    def key_of(self, token_ids: Sequence[int]) -> ChunkKey:
        """Key under which the store holds a document of these tokens."""
        self.layers.refresh()
        return self._key_of(token_ids)

    def _key_of(self, token_ids: Sequence[int]) -> ChunkKey:
        return content_key(self.spec, token_ids, lead_ids=self.lead_ids, salt=self._salt)

    # ---------------------------------------------------------------------------------------------- retrieve

    def session(
        self,
        retrieval: Retrieval,
        *,
        history: Sequence[Sequence[int]] = (),
        documents: Sequence[str] = (),
        blender: Blender | None = None,
    ) -> Session:
        """A conversation decoded with retrieval, over one sequence or several; to be closed.

        Parameters
        ----------
        history : token ids said before, of each sequence, for instance `Session.token_ids` of another process. What
            the store has of them is not computed again; after `Session.save`, that is all.
        documents : texts that one sequence begins with, fused as by `assemble`; the first prompt follows them. Their
            index is built here.
        blender : how they are fused, if not as by the connector's.

        Raises
        ------
        UncertifiedError : `retrieval` is approximate and has no certificate for this model.
        SpecMismatchError : its profile was made for another model.
        ValueError : a method's parameters do not fit, a sequence is longer than the model's context, or there are both
            history and documents.
        """
        if history and documents:
            raise ValueError("there are both history and documents; expected one of them")
        self.layers.refresh()
        session = Session(
            self.model,
            self._decoding.plan(retrieval),
            encode=lambda text, is_first: [*(self.lead_ids if is_first else ()), *self.encode_question(text)],
            decode=lambda ids: str(self.tokenizer.decode(list(ids), skip_special_tokens=True)),
            max_tokens=self.layers.max_tokens,
            history=history,
        )
        if documents:
            self._begin_with(session, [self.encode_document(text) for text in documents], blender or self.blender)
        return session

    def _begin_with(self, session: Session, documents: Sequence[Sequence[int]], blender: Blender) -> None:
        total = len(self.lead_ids) + sum(map(len, documents))
        if total >= self.layers.max_tokens:
            raise ValueError(f"documents have {total} tokens, the model's context {self.layers.max_tokens}; give fewer")
        context = self.fuse(documents, blender=blender)
        # Two choosers of the user's own may bear one name: what they chose must not lie under one key.
        chooser = next((name for name, known in CHOOSERS.items() if known is blender.chooser), uuid4().hex)
        way = f"fused {blender.recompute_ratio} {blender.spread_ratio} {chooser}"
        keys = [self._key_of(ids).hex() for ids in documents]
        session.begin_with(context.token_ids, context.blended.keys, context.blended.values, f"{way} {keys}")

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        retrieval: Retrieval,
        max_new_tokens: int = 64,
        **options: Any,
    ) -> Generated:
        """One turn of a `session`: prompts are computed densely, answers decoded with retrieval; greedy by default.

        Parameters
        ----------
        prompts : one, or one for each sequence: a text, behind the lead tokens, or token ids as they are.
        options : for `model.generate`.
        """
        with self.session(retrieval) as session:
            return session.generate(prompts, max_new_tokens=max_new_tokens, **options)

    # -------------------------------------------------------------------------------------------- precompute

    def precompute(self, documents: Sequence[str], *, progress: bool = False) -> Precomputed:
        """Compute and store the KV of documents that are not stored yet, many in one forward.

        Parameters
        ----------
        documents : texts; equal ones are computed once.
        progress : show a progress bar.

        Raises
        ------
        ValueError : no documents, an empty one, or one longer than the model's context.
        TierError : no tier can hold a chunk.
        """
        if not documents:
            raise ValueError("documents is empty; give at least one text")
        self.layers.refresh()
        by_key = {self._key_of(ids): ids for ids in map(self.encode_document, documents)}
        todo = {key: ids for key, ids in by_key.items() if key not in self.store}
        with Progress(disable=not progress, transient=True) as bar:
            task = bar.add_task("precomputing documents", total=sum(map(len, todo.values())))
            for key, chunk, spent_s in self._computed(todo):
                self.store.put(key, chunk, recompute_s=spent_s)
                bar.advance(task, len(chunk))
        return Precomputed(len(todo), len(by_key) - len(todo), sum(map(len, todo.values())))

    def _computed(self, documents: Mapping[ChunkKey, Sequence[int]]) -> Iterator[tuple[ChunkKey, KVChunk, float]]:
        """Key, KV and its share, by tokens, of the seconds that its pack took."""
        for pack in self._packs(documents):
            began_s = time.perf_counter()
            chunks = self._compute(list(pack.values()))
            token_s = (time.perf_counter() - began_s) / sum(map(len, chunks))
            for key, chunk in zip(pack, chunks, strict=True):
                yield key, chunk, token_s * len(chunk)

    def _packs(self, documents: Mapping[ChunkKey, Sequence[int]]) -> Iterator[dict[ChunkKey, Sequence[int]]]:
        pack: dict[ChunkKey, Sequence[int]] = {}
        tokens = 0
        for key, ids in documents.items():
            if pack and tokens + len(ids) > self._pack_tokens:
                yield pack
                pack, tokens = {}, 0
            pack[key] = ids
            tokens += len(ids) + len(self.lead_ids)
        if pack:
            yield pack

    def compute(self, documents: Sequence[Sequence[int]]) -> list[KVChunk]:
        """KV of token sequences, each alone behind the lead tokens (whose KV is left out), in one packed forward."""
        self.layers.refresh()
        return self._compute(documents)

    def _compute(self, documents: Sequence[Sequence[int]]) -> list[KVChunk]:
        return self._prefill([(*self.lead_ids, *ids) for ids in documents], skip=len(self.lead_ids))

    @torch.no_grad()
    def _prefill(self, sequences: Sequence[Sequence[int]], *, skip: int) -> list[KVChunk]:
        """KV of packed sequences without their first `skip` tokens.

        Every sequence attends to itself alone: a block-diagonal mask, without computing the blocks that it masks out.
        """
        spec, layers, device = self.spec, self.layers, self.layers.device
        bounds = list(pairwise(accumulate(map(len, sequences), initial=0)))
        positions = torch.cat([torch.arange(b - a, device=device) for a, b in bounds])
        hidden = layers.embed(torch.tensor(list(chain.from_iterable(sequences)), device=device))
        keys, values = [], []
        for layer in range(spec.num_layers):
            q, k, v = layers.qkv(layer, hidden, positions)
            keys.append(k.cpu())
            values.append(v.cpu())
            if layer + 1 < spec.num_layers:
                alone = [
                    causal_attention(
                        q[:, a:b],
                        k[:, a:b],
                        v[:, a:b],
                        positions[a:b],
                        scale=layers.scale,
                        window_tokens=layers.window_tokens[layer],
                    )
                    for a, b in bounds
                ]
                hidden = layers.finish(layer, hidden, torch.cat(alone, dim=1))
        all_keys, all_values = torch.stack(keys), torch.stack(values)
        return [
            KVChunk(
                spec,
                torch.tensor(ids[skip:], dtype=torch.int64),
                torch.arange(skip, b - a),
                all_keys[:, :, a + skip : b],
                all_values[:, :, a + skip : b],
            )
            for ids, (a, b) in zip(sequences, bounds, strict=True)
        ]

    # -------------------------------------------------------------------------------------------------- fuse

    def fuse(self, documents: Sequence[Sequence[int]], *, blender: Blender | None = None) -> FusedContext:
        """KV of documents (token ids) in this order, behind the lead tokens; what is not stored is computed and stored.

        Chunks that turn out corrupt, gone or too slow while they are read are computed again and the fusion starts
        over, so that a damaged store costs time, never the answer.
        """
        self.layers.refresh()
        blender = blender or self.blender
        by_key = {self._key_of(ids): ids for ids in documents}
        held: dict[ChunkKey, KVChunk] = {}
        keys, chunks = [self._key_of(ids) for ids in documents], list(documents)
        if self.lead_ids:
            keys.insert(0, content_key(self.spec, self.lead_ids, salt=self._salt))
            chunks.insert(0, self.lead_ids)
            held[keys[0]] = self._lead
        token_ids = torch.tensor(list(chain.from_iterable(chunks)))
        starts = list(accumulate(map(len, chunks[:-1]), initial=0))
        with self.store.pinned(list(by_key)):
            self._compute_missing({key: ids for key, ids in by_key.items() if key not in self.store}, held)
            while True:
                try:
                    blended = blender.blend(
                        self.layers,
                        token_ids,
                        starts,
                        StoreSource(self.store, keys, starts, len(token_ids), held),
                        exact_tokens=len(self.lead_ids) + len(documents[0]),
                        device=self.layers.device,
                    )
                except LostChunksError as lost:
                    self._compute_missing({key: by_key[key] for key in lost.keys}, held)
                else:
                    return FusedContext(token_ids, blended)

    def _compute_missing(self, missing: Mapping[ChunkKey, Sequence[int]], held: dict[ChunkKey, KVChunk]) -> None:
        """Compute, hold for this request, and store where the store has room."""
        for key, chunk, spent_s in self._computed(missing):
            held[key] = chunk
            with suppress(TierError):  # held, so the answer is safe; the store has counted the fault
                self.store.put(key, chunk, recompute_s=spent_s)

    @property
    def _lead(self) -> KVChunk:
        """KV of the lead tokens themselves: the same in front of everything, so it never needs the store."""
        if self.spec not in self._leads:
            self._leads = {self.spec: self._prefill([self.lead_ids], skip=0)[0]}
        return self._leads[self.spec]

    def assemble(self, documents: Sequence[str], question: str) -> tuple[dict[str, Tensor], DynamicCache]:
        """Inputs and a fused cache for the stock `model.generate(**inputs, past_key_values=cache)`.

        The cache holds the documents; `generate` computes the question, in full, and the answer.

        Parameters
        ----------
        documents : texts in the order in which the model shall read them; those not stored yet are computed.
        question : what follows the documents, prompt template included.

        Returns
        -------
        tuple : `{"input_ids": [1, S + Q], "attention_mask": [1, S + Q]}` and the cache of the first S tokens.

        Raises
        ------
        ValueError : no documents, an empty one, no question, or more tokens than the model's context.
        """
        if not documents:
            raise ValueError("documents is empty; give at least one text")
        question_ids = self.encode_question(question)
        if not question_ids:
            raise ValueError("question is empty; at least one token must follow the documents")
        encoded = [self.encode_document(document) for document in documents]
        total = len(self.lead_ids) + sum(map(len, encoded)) + len(question_ids)
        if total > self.layers.max_tokens:
            raise ValueError(
                f"documents and question have {total} tokens, the model's context {self.layers.max_tokens}; "
                "give fewer or shorter documents"
            )
        return self.as_inputs(self.fuse(encoded), question_ids)

    def as_inputs(self, context: FusedContext, question_ids: Sequence[int]) -> tuple[dict[str, Tensor], DynamicCache]:
        """What `generate` takes, from a fused context and the tokens that follow it."""
        blended = context.blended
        pairs = [(k[None], v[None]) for k, v in zip(blended.keys, blended.values, strict=True)]
        cache = DynamicCache(pairs, config=self.model.config)
        input_ids = torch.cat((context.token_ids, torch.tensor(question_ids)))[None].to(self.layers.device)
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}, cache

    def answer(self, documents: Sequence[str], question: str, *, max_new_tokens: int = 64) -> str:
        """Greedy answer to `question` over `documents`; see `assemble` for errors."""
        inputs, cache = self.assemble(documents, question)
        output = self.model.generate(**inputs, past_key_values=cache, max_new_tokens=max_new_tokens, do_sample=False)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
