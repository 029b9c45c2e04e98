"""A corpus: documents that are kept, searched, and answered from over KV that was computed once."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from blake3 import blake3

from ..blend.blender import Blender
from ..connectors.hf.answering import Generation, Sampling, answer_together
from ..connectors.hf.connector import TransformersConnector
from ..connectors.hf.documents import document_text
from ..connectors.hf.loading import load_model
from ..connectors.hf.prompts import positive_count
from ..core import ChunkKey
from ..kvstore.store import KVStore
from ..kvstore.tiers.disk.tier import DiskTier
from ..kvstore.tiers.host import HostTier
from .answers import INSTRUCTIONS, Added, Answer, question_prompt
from .catalog import Catalog, Passage, StoredDocument
from .files import Skipped, files_in, read_file, state_of
from .ordering import order_for_reuse
from .pieces import pieces_async, pieces_of
from .searching import Embedding, embedded, nearest, packaged_embedding, search
from .splitting import Splitter

_PROBE = "kvloom: which embedding is this?"


class Corpus:
    """Documents in a folder of their own, computed once, in any order in a context, also after a restart.

    Every method may be called from several threads; the model answers one question at a time.

    Parameters
    ----------
    folder : holds the catalog and, unless `store` is given, the KV cache. Made if it is not there.
    model : a model of transformers, or the folder of one.
    tokenizer : its tokenizer; None for the one in the model's folder.
    store : where KV lives; None for host memory and a disk tier in `folder`. Closed by its owner.
    recompute_ratio : share of the passages' tokens that is computed anew in each context. 1 is exact: a full prefill,
        less the passages that stand at the beginning as they did before. None for what `Blender` does by default.
    passage_tokens : the most tokens of a passage.
    embedding : finds passages by meaning, too: a function from texts to vectors, or `"wordllama"`, whose model comes
        with its package. Without one, passages are found by words (BM25).
    instructions : what the model is told behind the passages, if it has a chat template.
    host_bytes, disk_bytes : sizes of the tiers that are made here.

    Attributes
    ----------
    connector : the model with its store.
    embedding : the function from texts to vectors, if there is one.

    Raises
    ------
    ValueError : there is no usable model, or the folder belongs to something else.
    EngineError : the model cannot be fused.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Any,
        tokenizer: Any = None,
        *,
        store: KVStore | None = None,
        recompute_ratio: float | None = None,
        passage_tokens: int = 256,
        embedding: Embedding | str | None = None,
        instructions: str = INSTRUCTIONS,
        host_bytes: int = 1 << 30,
        disk_bytes: int = 20 << 30,
    ) -> None:
        self.folder = Path(folder).expanduser()
        if isinstance(model, str | Path):
            model, loaded = load_model(Path(model).expanduser())
            tokenizer = tokenizer or loaded
        elif tokenizer is None:
            raise TypeError("tokenizer is missing; give the model's tokenizer, or the model as a folder")
        self.embedding = packaged_embedding(embedding) if isinstance(embedding, str) else embedding
        self._instructions = instructions
        self._splitter = Splitter(tokenizer, passage_tokens)
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as undo:
            self._catalog = Catalog(self.folder / "corpus.sqlite")
            undo.callback(self._catalog.close)
            if store is None:
                store = KVStore([HostTier(host_bytes), DiskTier(self.folder / "kv", disk_bytes)])
                undo.callback(store.close)
            blender = Blender() if recompute_ratio is None else Blender(recompute_ratio=recompute_ratio)
            self.connector = TransformersConnector(model, tokenizer, store, blender, reuse_contexts=True)
            self._check_embedding()
            self._pins: dict[str, ExitStack] = {}
            undo.callback(self._unpin_all)
            self._undo = undo.pop_all()
        self._answering = threading.Lock()
        self._changing = threading.Lock()
        for document in self._catalog.documents():
            if document.is_pinned:
                self._pin(document.id)

    def close(self) -> None:
        """Closes the catalog, and the store if it was made here."""
        self._undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------------------------------------- documents

    def add(
        self,
        documents: Iterable[Any],
        *,
        ids: Sequence[str] | None = None,
        titles: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        ttl_s: float | None = None,
        pin: bool = False,
        whole: bool = False,
        precompute: bool = True,
        progress: bool = False,
    ) -> Added:
        """Adds documents, or puts them in place of those with the same id; what is unchanged costs nothing.

        Parameters
        ----------
        documents : texts, or objects of a RAG framework that have one.
        ids : of the documents; None takes the `id` of a framework's document, otherwise a name made of the text.
        titles : stand in front of every passage of a document.
        metadata : JSON objects that come back with each passage; None takes those of a framework's documents.
        ttl_s : seconds after which the documents are removed.
        pin : keep their KV in the store, whatever else is read, as long as the corpus is open.
        whole : make one passage of each document, however long.
        precompute : compute their KV now, not when a question first needs it.
        progress : show a progress bar.

        Raises
        ------
        TypeError, ValueError : a document is empty or none, an id is given twice, or a length does not fit; nothing is
            added then.
        """
        if isinstance(documents, str | bytes):
            raise TypeError("documents is one text; expected a list of documents")
        given = list(documents)
        for name, others in (("ids", ids), ("titles", titles), ("metadata", metadata)):
            if others is not None and len(others) != len(given):
                raise ValueError(f"{name} has {len(others)} entries for {len(given)} documents")
        if ttl_s is not None and not 0 < ttl_s < float("inf"):
            raise ValueError(f"ttl_s is {ttl_s}; expected seconds above 0")
        texts = [document_text(document, f"documents[{i}]") for i, document in enumerate(given)]
        known = [metadata[i] if metadata is not None else _metadata_of(document) for i, document in enumerate(given)]
        names = [
            ids[i] if ids is not None else _id_of(document) or blake3(text.encode()).hexdigest(length=12)
            for i, (document, text) in enumerate(zip(given, texts, strict=True))
        ]
        if ids is None:  # equal texts without a name are one document
            unique = {name: i for i, name in reversed(list(enumerate(names)))}
            chosen = sorted(unique.values())
        else:
            chosen = list(range(len(names)))
        if wrong := [name for name in names if not isinstance(name, str) or not name]:
            raise ValueError(f"an id is {wrong[0]!r}; expected a text")
        if len({names[i] for i in chosen}) < len(chosen):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"id {twice!r} is given twice")
        expires_at_s = None if ttl_s is None else time.time() + ttl_s
        prepared = [
            _document(
                names[i], texts[i], title=titles[i] if titles else "", metadata=known[i], expires_at_s=expires_at_s,
                is_pinned=pin,
            )
            for i in chosen
        ]  # fmt: skip
        with self._changing:
            return self._put(
                [(document, texts[i], False) for document, i in zip(prepared, chosen, strict=True)],
                whole=whole,
                precompute=precompute,
                progress=progress,
            )

    def add_files(
        self, *paths: str | Path, ttl_s: float | None = None, pin: bool | None = None, precompute: bool = True,
        progress: bool = False, forget_missing: bool = False,
    ) -> Added:  # fmt: skip
        """Adds files (text, Markdown, HTML, PDF) and all files below folders; their paths are their ids.

        A file that has not changed is not read. What holds no text is left out, and `skipped` says why.

        Parameters
        ----------
        pin : as for `add`; None leaves documents that are there as they are.
        forget_missing : also remove documents whose files below `paths` are no longer there.

        Raises
        ------
        FileNotFoundError : a path does not exist.
        """
        if not paths:
            raise ValueError("paths is empty; give at least one file or folder")
        roots = [Path(path).expanduser().resolve() for path in paths]
        expires_at_s = None if ttl_s is None else time.time() + ttl_s
        skipped: list[Skipped] = []
        changed: list[tuple[StoredDocument, str, bool]] = []
        unchanged: list[str] = []
        seen: set[str] = set()
        for path in dict.fromkeys(files_in(roots)):
            name = str(path)
            try:
                state = state_of(path)
            except OSError as error:
                skipped.append(Skipped(path, error.strerror or str(error)))
                continue
            held = self._catalog.document(name)
            if held is not None and held.source_state == state:
                seen.add(name)
                unchanged.append(name)
                if ttl_s is not None:
                    self._catalog.update(replace(held, expires_at_s=expires_at_s))
                if pin is not None and held.is_pinned != pin:
                    self.pin([name], pinned=pin)
                continue
            found = read_file(path)
            if isinstance(found, Skipped):
                skipped.append(found)
                continue
            seen.add(name)
            document = _document(
                name, found.text, title=found.title, metadata={}, expires_at_s=expires_at_s,
                is_pinned=bool(held and held.is_pinned) if pin is None else pin, source=name, source_state=state,
            )  # fmt: skip
            changed.append((document, found.text, found.is_markdown))
        with self._changing:
            added = self._put(changed, precompute=precompute, progress=progress)
            gone: list[str] = []
            if forget_missing:
                gone = [
                    document.id
                    for document in self._catalog.documents()
                    if document.source and document.id not in seen and _is_below(Path(document.source), roots)
                ]
                self._remove(gone)
        return replace(
            added,
            unchanged=(*unchanged, *added.unchanged),
            removed=tuple(gone),
            skipped=tuple(skipped),
        )

    def remove(self, ids: Iterable[str]) -> int:
        """Removes documents and their KV; how many there were. Unknown ids are passed over."""
        if isinstance(ids, str):
            raise TypeError("ids is one text; expected a list of ids")
        with self._changing:
            return self._remove(ids)

    def documents(self) -> list[StoredDocument]:
        """All documents, in order of their ids."""
        self._forget_expired()
        return self._catalog.documents()

    def passages(self, ids: Iterable[str] | None = None) -> list[Passage]:
        """Passages of some documents, or of all."""
        self._forget_expired()
        return self._catalog.passages(ids)

    def stale(self) -> list[str]:
        """Ids of documents whose files have changed or are gone; `add_files` reads them again."""
        return [each.id for each in self._catalog.documents() if each.source and not _is_fresh(each)]

    def pin(self, ids: Iterable[str], *, pinned: bool = True) -> None:
        """Keeps the KV of documents in the store as long as the corpus is open, or lets it go again.

        Raises
        ------
        KeyError : there is no such document.
        """
        with self._changing:
            for document_id in ids:
                document = self._catalog.document(document_id)
                if document is None:
                    raise KeyError(f"there is no document {document_id!r}")
                self._catalog.update(replace(document, is_pinned=pinned))
                self._unpin(document_id)
                if pinned:
                    self._pin(document_id)

    def precompute(self, *, progress: bool = False) -> int:
        """Computes the KV of passages that the store does not have; how many tokens that took."""
        texts = [passage.text for passage in self._catalog.passages()]
        if not texts:
            return 0
        with self._answering:
            return self.connector.precompute(texts, progress=progress).tokens

    # ---------------------------------------------------------------------------------------------- questions

    def search(self, question: str, *, passages: int = 5) -> list[Passage]:
        """The passages that fit a question best, best first."""
        _expect_question(question)
        self._forget_expired()
        return search(self._catalog, question, positive_count(passages, "passages"), self.embedding)

    def nearest(self, text: str, *, passages: int = 5) -> list[Passage]:
        """The passages whose vectors are nearest to a text's, with the cosine as score.

        Raises
        ------
        ValueError : the corpus has no embedding.
        """
        if self.embedding is None:
            raise ValueError("the corpus has no embedding; open it with one")
        self._forget_expired()
        return nearest(self._catalog, text, positive_count(passages, "passages"), self.embedding)

    def ordered(self, passages: Sequence[Passage]) -> list[Passage]:
        """Passages in the order that reuses most, see `order_for_reuse`."""
        return [passages[i] for i in self.order_of([each.text for each in passages])]

    def order_of(self, texts: Sequence[str]) -> list[int]:
        """Indices of texts in the order that reuses most: first a run that is stored as one context's beginning."""
        return self._order_of([self.connector.encode_document(text) for text in texts])

    def _order_of(self, rows: Sequence[Sequence[int]]) -> list[int]:
        if len(rows) < 2:
            return list(range(len(rows)))
        ordered, run = order_for_reuse(range(len(rows)), self.connector.stored_contexts(rows), lambda i: len(rows[i]))
        return ordered if run > 1 else list(range(len(rows)))

    def ask(
        self,
        question: str,
        *,
        passages: int = 5,
        max_new_tokens: int = 128,
        sources: Sequence[Passage] | None = None,
        order_for_reuse: bool = True,
    ) -> Answer:
        """The model's greedy answer over the passages that fit best.

        Parameters
        ----------
        passages : how many; fewer if the model's context is too short for them.
        sources : the passages themselves, in this order, if they were found in another way.
        order_for_reuse : put passages first whose KV in this context is stored; False keeps the order of relevance.

        Raises
        ------
        ValueError : the question is empty, or longer than the model's context.
        LookupError : no passage fits the question.
        """
        generation, chosen = self._generation(
            question,
            passages=passages,
            max_new_tokens=max_new_tokens,
            sources=sources,
            order_for_reuse=order_for_reuse,
        )
        return _answer(self.run(generation), generation, chosen)

    def run(self, generation: Generation) -> str:
        """The answer that a generation makes, as soon as the model is free."""
        with self._answering:
            return generation.run()

    def answer_many(
        self, questions: Sequence[str], *, passages: int = 5, max_new_tokens: int = 128, order_for_reuse: bool = True
    ) -> list[Answer]:
        """Answers to several questions, each over its own passages, decoded in batches; each is what `ask` gives.

        Raises
        ------
        TypeError, ValueError, LookupError : as `ask`; nothing is answered then.
        """
        if isinstance(questions, str):
            raise TypeError("questions is one text; expected a list of questions")
        prepared = [
            self._generation(
                question, passages=passages, max_new_tokens=max_new_tokens, order_for_reuse=order_for_reuse
            )
            for question in questions
        ]
        with self._answering:
            texts = answer_together([generation for generation, _ in prepared])
        return [_answer(text, *made) for text, made in zip(texts, prepared, strict=True)]

    def stream(self, question: str, **options: Any) -> Iterator[str | Answer]:
        """Pieces of the answer as they come, and at the end the `Answer`; options as for `ask`.

        Leaving the loop early ends the computation at the next token.
        """
        generation, chosen = self._generation(question, **options)
        text = ""
        for piece in pieces_of(generation, self.run):
            text += piece
            yield piece
        yield _answer(text, generation, chosen)

    async def astream(self, question: str, **options: Any) -> AsyncIterator[str | Answer]:
        """`stream` without blocking the event loop."""
        generation, chosen = await asyncio.to_thread(self._generation, question, **options)
        text = ""
        async for piece in pieces_async(generation, self.run):
            text += piece
            yield piece
        yield _answer(text, generation, chosen)

    # -------------------------------------------------------------------------------------------------------

    def _generation(
        self,
        question: str,
        *,
        passages: int = 5,
        max_new_tokens: int = 128,
        sources: Sequence[Passage] | None = None,
        order_for_reuse: bool = True,
    ) -> tuple[Generation, list[Passage]]:
        """What answers a question, and the passages in the order in which the model reads them; see `ask`."""
        found = list(sources) if sources is not None else self.search(question, passages=passages)
        _expect_question(question)
        if not found:
            raise LookupError(f"no passage fits the question {question!r}; add documents, or ask with other words")
        prompt = question_prompt(self.connector.tokenizer, question, self._instructions)
        around = len(self.connector.encode_question(prompt.before + prompt.text)) + len(self.connector.lead_ids)
        room = self.connector.layers.max_tokens - around - 1
        chosen: list[Passage] = []
        rows: list[list[int]] = []
        for passage in found:
            row = self.connector.encode_document(passage.text)
            room -= len(row)
            if room < 0:
                break
            chosen.append(passage)
            rows.append(row)
        if not chosen:
            raise ValueError(f"the question has {around} tokens, which leaves no room for a passage")
        if order_for_reuse:
            chosen = [chosen[i] for i in self._order_of(rows)]
        stop = () if getattr(self.connector.tokenizer, "chat_template", None) else ("\n",)
        sampling = Sampling(positive_count(max_new_tokens, "max_new_tokens"), stop=stop)
        texts = [passage.text for passage in chosen]
        return Generation(lambda: self.connector, texts, prompt, sampling), chosen

    def _put(
        self,
        documents: Sequence[tuple[StoredDocument, str, bool]],
        *,
        whole: bool = False,
        precompute: bool,
        progress: bool,
    ) -> Added:
        """Splits, embeds and stores documents that differ from what is held."""
        added: list[str] = []
        updated: list[str] = []
        unchanged: list[str] = []
        texts: list[str] = []
        for document, text, is_markdown in documents:
            held = self._catalog.document(document.id)
            if held is not None and held.digest == document.digest:
                unchanged.append(document.id)
                self._catalog.update(replace(document, added_at_s=held.added_at_s))
                continue
            bounds = [(0, len(text))] if whole else self._splitter.split(text, is_markdown=is_markdown)
            heading = f"{document.title}\n" if document.title else ""
            passages = [(start, stop, heading + text[start:stop]) for start, stop in bounds]
            for _, _, passage in passages:
                self.connector.encode_document(passage)  # refused here, before anything is changed
            vectors = None
            if self.embedding is not None:
                vectors = embedded(self.embedding, [passage for _, _, passage in passages])
            before = self._texts_of(document.id)
            self._unpin(document.id)
            self._catalog.replace(document, passages, vectors)
            self._drop_chunks(before)
            (added if held is None else updated).append(document.id)
            texts += [passage for _, _, passage in passages]
        computed = 0
        if precompute and texts:
            with self._answering:
                computed = self.connector.precompute(texts, progress=progress).tokens
        for document, _, _ in documents:
            self._unpin(document.id)
            if document.is_pinned:
                self._pin(document.id)
        return Added(tuple(added), tuple(updated), tuple(unchanged), (), len(texts), computed)

    def _remove(self, ids: Iterable[str]) -> int:
        count = 0
        for document_id in ids:
            texts = self._texts_of(document_id)
            self._unpin(document_id)
            if self._catalog.remove(document_id):
                count += 1
                self._drop_chunks(texts)
        return count

    def _forget_expired(self) -> None:
        if expired := self._catalog.expired(time.time()):
            with self._changing:
                self._remove([document.id for document in expired])

    def _texts_of(self, document_id: str) -> list[str]:
        return [passage.text for passage in self._catalog.passages([document_id])]

    def _drop_chunks(self, texts: Iterable[str]) -> None:
        """Deletes the KV of texts that no passage has any more."""
        for key in self._keys_of([text for text in texts if not self._catalog.has_text(text)]):
            self.connector.store.delete(key)

    def _keys_of(self, texts: Sequence[str]) -> list[ChunkKey]:
        return self.connector.keys_of([self.connector.encode_document(text) for text in texts]) if texts else []

    def _pin(self, document_id: str) -> None:
        stack = self._pins.setdefault(document_id, ExitStack())
        if keys := self._keys_of(self._texts_of(document_id)):
            stack.enter_context(self.connector.store.pinned(keys))

    def _unpin(self, document_id: str) -> None:
        if stack := self._pins.pop(document_id, None):
            stack.close()

    def _unpin_all(self) -> None:
        for document_id in list(self._pins):
            self._unpin(document_id)

    def _check_embedding(self) -> None:
        """Vectors of another embedding would find the wrong passages without an error."""
        if self.embedding is None:
            return
        probe = embedded(self.embedding, [_PROBE])[0]
        held = self._catalog.fact("embedding")
        if held is None:
            if self._catalog.documents():
                raise ValueError(
                    f"the corpus in {self.folder} was made without an embedding; open it without one, or make it anew"
                )
            self._catalog.remember("embedding", probe.tobytes())
            return
        known = np.frombuffer(held, np.float32)
        if known.shape != probe.shape or float(known @ probe) < 0.999:
            raise ValueError(f"the corpus in {self.folder} was made with another embedding; give that one")


def corpus_name(documents: Path, model: Path, embedding: str | None) -> str:
    """A folder's name for the corpus of some documents, as one model and one embedding read them."""
    state = json.dumps([str(documents.resolve()), str(model.resolve()), embedding])
    return blake3(state.encode()).hexdigest(length=12)


def passages_of(texts: Sequence[str]) -> list[Passage]:
    """Any texts as passages, for `sources=`; those that the store has are not computed again."""
    return [Passage(0, "", 0, len(text), document_text(text, f"texts[{i}]")) for i, text in enumerate(texts)]


def _answer(text: str, generation: Generation, sources: Sequence[Passage]) -> Answer:
    return Answer(text.strip(), tuple(sources), generation.finish, generation.usage, generation.is_exact)


def _document(
    name: str,
    text: str,
    *,
    title: str,
    metadata: Mapping[str, Any],
    expires_at_s: float | None,
    is_pinned: bool,
    source: str = "",
    source_state: str = "",
) -> StoredDocument:
    try:
        state = json.dumps([text, title, dict(metadata)], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata of document {name!r} is no JSON object: {error}") from error
    digest = blake3(state.encode()).digest()
    return StoredDocument(name, digest, source, source_state, title, metadata, time.time(), expires_at_s, is_pinned)


def _metadata_of(document: Any) -> Mapping[str, Any]:
    for name in ("metadata", "meta"):
        if isinstance(found := getattr(document, name, None), Mapping):
            return found
    return {}


def _id_of(document: Any) -> str | None:
    for name in ("id", "id_", "doc_id"):
        if isinstance(found := getattr(document, name, None), str) and found:
            return found
    return None


def _expect_question(question: object) -> None:
    if not isinstance(question, str):
        raise TypeError(f"question is of type {type(question).__name__}; expected a text")
    if not question.strip():
        raise ValueError("question is empty")


def _is_below(path: Path, roots: Sequence[Path]) -> bool:
    return any(path == root or root in path.parents for root in roots)


def _is_fresh(document: StoredDocument) -> bool:
    try:
        return state_of(Path(document.source)) == document.source_state
    except OSError:
        return False
