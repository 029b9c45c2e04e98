"""`kvloom ask`: a question over a folder of documents."""

from __future__ import annotations

import dataclasses
import json as json_format
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import any_path, text_paths

if TYPE_CHECKING:
    from ..rag.answers import Added, Answer
    from ..rag.catalog import Passage
    from ..rag.corpus import Corpus

_DISK_BYTES = 20 << 30
_AHEAD_PASSAGES = 64  # of at most 256 tokens: so many are computed before the first question is answered


def ask(
    documents: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            callback=lambda path: (text_paths([path]) or [path])[0],
            help="Folder of documents, or one file.",
        ),
    ],
    question: Annotated[
        str | None, typer.Argument(metavar="QUESTION", help="Left out: questions are read from the terminal.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="Local Hugging Face folder; default: KVLOOM_MODEL, else the small bundled test model."
        ),
    ] = None,
    passages: Annotated[int, typer.Option(metavar="N", min=1, help="Passages that the model reads.")] = 5,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")] = 128,
    ratio: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", min=0.0, max=1.0,
            help="Share of the passages' tokens that is computed anew; 1 is exact. Default: as the blender's.",
        ),
    ] = None,
    embedding: Annotated[
        str | None, typer.Option(metavar="NAME", help="Find passages by meaning, too: wordllama (a package).")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", callback=any_path, help="Keep KV and index here; default: ~/.cache/kvloom."),
    ] = None,
    precompute: Annotated[
        bool | None,
        typer.Option(
            "--precompute/--no-precompute",
            help=f"Compute the KV of all passages now. Default: if at most {_AHEAD_PASSAGES} are new; otherwise when a "
            "question needs them.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the answer, its sources and the usage as JSON.")] = False,
) -> None:  # fmt: skip
    """Answer a question over your documents, sources cited. What was computed once is reused by the next question."""
    from ..evaluation.environment import BUNDLED_MODEL
    from ..evaluation.models import load_model
    from ..kvstore.store import KVStore
    from ..kvstore.tiers.disk.tier import DiskTier
    from ..kvstore.tiers.host import HostTier
    from ..rag.corpus import Corpus, corpus_name

    named = model or os.environ.get("KVLOOM_MODEL")
    folder = Path(named).expanduser() if named and named != "reference" else BUNDLED_MODEL
    if folder == BUNDLED_MODEL:
        _say("using the bundled test model, which can do little; --model DIR names a real one")
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # what is wrong with a file is said below, in one line
    home = cache or _user_cache()
    home.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = load_model(folder)
    with (
        KVStore([HostTier(2 << 30), DiskTier(home / "kv", _DISK_BYTES)]) as store,
        Corpus(
            home / "corpora" / corpus_name(documents, folder, embedding),
            loaded,
            tokenizer,
            store=store,
            recompute_ratio=ratio,
            embedding=embedding,
        ) as corpus,
    ):
        added = corpus.add_files(documents, forget_missing=True, precompute=False)
        _tell_added(added)
        if precompute or (precompute is None and 0 < added.passages <= _AHEAD_PASSAGES):
            began_s = time.perf_counter()
            computed = corpus.precompute(progress=sys.stderr.isatty() and not json)
            _say(f"{computed:,} tokens computed in {time.perf_counter() - began_s:.1f} s")
        elif added.passages:
            _say(f"{added.passages:,} new passages; they are computed when a question needs them, or now: --precompute")
        if not corpus.documents():
            raise ValueError(f"there is no text in {documents}")
        if question is not None:
            _answer(corpus, question, documents, passages, max_new_tokens, json)
            return
        while (line := _next_question()) is not None:
            try:
                _answer(corpus, line, documents, passages, max_new_tokens, json)
            except (LookupError, ValueError) as error:
                _say(str(error.args[0]))


def _answer(corpus: Corpus, question: str, root: Path, passages: int, max_new_tokens: int, as_json: bool) -> None:
    from ..rag.answers import Answer

    answer: Answer | None = None
    try:
        for piece in corpus.stream(question, passages=passages, max_new_tokens=max_new_tokens):
            if isinstance(piece, Answer):
                answer = piece
            elif not as_json:
                typer.echo(piece, nl=False)
    except LookupError as error:
        raise ValueError(str(error.args[0])) from error
    if answer is None:  # the stream ended without one; its error was raised above
        return
    if as_json:
        typer.echo(json_format.dumps(_as_json(question, answer), indent=1))
        return
    typer.echo("\n\nSources:")
    for number, passage in enumerate(answer.sources, 1):
        typer.echo(f"  {number}. {_place(passage, root)}")
    usage = answer.usage
    documents = usage.reused_tokens + usage.recomputed_tokens
    exactness = "exact" if answer.is_exact else "fused: an approximation, --ratio 1 is exact"
    _say(
        f"{usage.reused_tokens:,} of {documents:,} document tokens reused ({exactness}); first token after "
        f"{usage.prompt_s:.2f} s, {usage.saved_s:.2f} s of computing saved"
    )


def _as_json(question: str, answer: Answer) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer.text,
        "finish": answer.finish,
        "is_exact": answer.is_exact,
        "usage": dataclasses.asdict(answer.usage),
        "sources": [dataclasses.asdict(passage) for passage in answer.sources],
    }


def _place(passage: Passage, root: Path) -> str:
    """Where a passage stands, as a person would say it."""
    path = Path(passage.source)
    base = root.resolve()
    shown = path.relative_to(base) if base in path.parents else path.name
    first = " ".join(passage.text.removeprefix(f"{passage.title}\n").split())
    return f"{shown}, characters {passage.start}-{passage.stop}: {first[:60]}{'...' if len(first) > 60 else ''}"


def _tell_added(added: Added) -> None:
    for skipped in added.skipped:
        _say(f"left out {skipped.path.name}: {skipped.why}")
    changes = [
        f"{len(ids)} {word}"
        for word, ids in (
            ("new", added.added), ("changed", added.updated), ("gone", added.removed), ("unchanged", added.unchanged),
        )
        if ids
    ]  # fmt: skip
    _say(f"documents: {', '.join(changes) or 'none'}")


def _next_question() -> str | None:
    """A line from the terminal; None at its end."""
    while True:
        if sys.stdin.isatty():
            typer.echo("\n? ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


def _user_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "kvloom"


def _say(text: str) -> None:
    typer.echo(text, err=True)
