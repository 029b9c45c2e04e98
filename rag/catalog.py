"""What a corpus holds: documents, their passages, and the index that finds passages by words, in one SQLite file."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_VERSION = 1
_SCHEMA = """
CREATE TABLE documents (
    id TEXT PRIMARY KEY, digest BLOB NOT NULL, source TEXT NOT NULL, source_state TEXT NOT NULL, title TEXT NOT NULL,
    metadata TEXT NOT NULL, added_at_s REAL NOT NULL, expires_at_s REAL, is_pinned INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE passages (
    number INTEGER PRIMARY KEY, document_id TEXT NOT NULL, start INTEGER NOT NULL, stop INTEGER NOT NULL,
    text TEXT NOT NULL, vector BLOB
);
CREATE TABLE facts (name TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE INDEX passages_of ON passages (document_id, start);
CREATE VIRTUAL TABLE words USING fts5(
    text, content='passages', content_rowid='number', tokenize='porter unicode61 remove_diacritics 2'
);
CREATE TRIGGER passage_added AFTER INSERT ON passages BEGIN
    INSERT INTO words(rowid, text) VALUES (new.number, new.text);
END;
CREATE TRIGGER passage_removed AFTER DELETE ON passages BEGIN
    INSERT INTO words(words, rowid, text) VALUES ('delete', old.number, old.text);
END;
"""
# Made in older files, too. Passages of equal length that end alike are few. A query says `+text`, or SQLite puts the
# value into these terms and reads all passages.
_INDEX_OF_TEXTS = "CREATE INDEX IF NOT EXISTS passages_by_text ON passages (length(text), substr(text, -32))"
_DOCUMENT = "id, digest, source, source_state, title, metadata, added_at_s, expires_at_s, is_pinned"


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document of a corpus.

    Attributes
    ----------
    digest : of text, title and metadata: an unchanged document is not computed again.
    source : file that it was read from; empty for a text.
    source_state : size and time of change of that file when it was read.
    added_at_s : Unix time of the last change.
    expires_at_s : Unix time from which it counts as removed; None for never.
    """

    id: str
    digest: bytes
    source: str
    source_state: str
    title: str
    metadata: Mapping[str, Any]
    added_at_s: float
    expires_at_s: float | None
    is_pinned: bool


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, as the model reads it.

    Attributes
    ----------
    number : names it in its corpus, until its document changes.
    start, stop : its characters in the document.
    text : what the model reads: a title line, if the document has a title, and the characters.
    score : how well it fits the question that it was found for; comparable within one search only.
    """

    number: int
    document_id: str
    start: int
    stop: int
    text: str
    title: str = ""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    score: float = 0.0


class Catalog:
    """Documents and passages in an SQLite file. Every method may be called from any thread and process.

    Words are matched by SQLite's FTS5: BM25 over stemmed words without accents.

    Raises
    ------
    ValueError : the file was written by another version, or is no catalog.
    """

    def __init__(self, path: Path) -> None:
        self._lock = threading.RLock()
        self._vectors: tuple[tuple[int, int], list[int], NDArray[np.float32]] | None = None
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30.0)
        try:
            self._database.execute("PRAGMA journal_mode = WAL")
            with self._writing():
                (version,) = self._database.execute("PRAGMA user_version").fetchone()
                if version == 0:
                    for statement in _statements(_SCHEMA):
                        self._database.execute(statement)
                    self._database.execute(f"PRAGMA user_version = {_VERSION}")
                elif version != _VERSION:
                    raise ValueError(f"{path} has version {version}; this release of kvloom reads version {_VERSION}")
                self._database.execute(_INDEX_OF_TEXTS)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise ValueError(f"{path} is no catalog of a corpus: {error}; delete it to begin anew") from error
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        with self._lock:
            self._database.close()

    # --------------------------------------------------------------------------------------------- documents

    def document(self, document_id: str) -> StoredDocument | None:
        rows = self._documents("WHERE id = ?", (document_id,))
        return rows[0] if rows else None

    def documents(self) -> list[StoredDocument]:
        """All of them, in order of their ids."""
        return self._documents("ORDER BY id", ())

    def expired(self, now_s: float) -> list[StoredDocument]:
        return self._documents("WHERE expires_at_s IS NOT NULL AND expires_at_s <= ? ORDER BY id", (now_s,))

    def replace(
        self,
        document: StoredDocument,
        passages: Sequence[tuple[int, int, str]],
        vectors: NDArray[np.float32] | None,
    ) -> None:
        """Puts a document in place of what has its id: passages (start, stop, text) and their vectors `[P, E]`."""
        with self._writing():
            self._database.execute("DELETE FROM passages WHERE document_id = ?", (document.id,))
            self._database.execute(
                f"INSERT OR REPLACE INTO documents ({_DOCUMENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                _row(document),
            )
            self._database.executemany(
                "INSERT INTO passages (document_id, start, stop, text, vector) VALUES (?, ?, ?, ?, ?)",
                [
                    (document.id, start, stop, text, None if vectors is None else vectors[i].tobytes())
                    for i, (start, stop, text) in enumerate(passages)
                ],
            )

    def update(self, document: StoredDocument) -> None:
        """Changes what is known of a document whose passages stay."""
        with self._writing():
            self._database.execute(
                f"INSERT OR REPLACE INTO documents ({_DOCUMENT}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                _row(document),
            )

    def remove(self, document_id: str) -> bool:
        """Whether it was there."""
        with self._writing():
            self._database.execute("DELETE FROM passages WHERE document_id = ?", (document_id,))
            return self._database.execute("DELETE FROM documents WHERE id = ?", (document_id,)).rowcount > 0

    # ---------------------------------------------------------------------------------------------- passages

    def passages(self, document_ids: Iterable[str] | None = None) -> list[Passage]:
        """Passages of some documents, or of all, in order of document and place."""
        if document_ids is None:
            return self._passages("ORDER BY p.document_id, p.start", ())
        return [
            passage
            for document_id in document_ids
            for passage in self._passages("WHERE p.document_id = ? ORDER BY p.start", (document_id,))
        ]

    def has_text(self, text: str) -> bool:
        """Whether a passage reads exactly like this: passages of the same text share a chunk."""
        with self._lock:
            rows = self._database.execute(
                "SELECT 1 FROM passages WHERE length(text) = length(?1) AND substr(text, -32) = substr(?1, -32) "
                "AND +text = ?1 LIMIT 1",
                (text,),
            ).fetchall()
        return bool(rows)

    def match(self, words: Sequence[str], limit: int) -> list[tuple[int, float]]:
        """Passages with any of the words, best first: number and BM25 score (larger is better)."""
        if not words:
            return []
        query = " OR ".join('"' + word.replace('"', '""') + '"' for word in words)
        with self._lock:
            rows = self._database.execute(
                "SELECT rowid, -bm25(words) FROM words WHERE words MATCH ? ORDER BY bm25(words), rowid LIMIT ?",
                (query, limit),
            ).fetchall()
        return [(int(number), float(score)) for number, score in rows]

    def fact(self, name: str) -> bytes | None:
        """What is remembered of the corpus as a whole."""
        with self._lock:
            row = self._database.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else bytes(row[0])

    def remember(self, name: str, value: bytes) -> None:
        with self._writing():
            self._database.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def vectors(self) -> tuple[list[int], NDArray[np.float32]]:
        """Numbers of passages that have a vector, and the vectors `[P, E]`; read again when the file has changed."""
        with self._lock:
            (by_others,) = self._database.execute("PRAGMA data_version").fetchone()
            state = (by_others, self._database.total_changes)
            if self._vectors is None or self._vectors[0] != state:
                rows = self._database.execute(
                    "SELECT number, vector FROM passages WHERE vector IS NOT NULL ORDER BY number"
                ).fetchall()
                found = np.frombuffer(b"".join(vector for _, vector in rows), np.float32)
                self._vectors = state, [number for number, _ in rows], found.reshape(len(rows), -1 if rows else 0)
            return self._vectors[1], self._vectors[2]

    def by_number(self, numbers: Sequence[int]) -> dict[int, Passage]:
        marks = ",".join("?" * len(numbers))
        return {each.number: each for each in self._passages(f"WHERE p.number IN ({marks})", tuple(numbers))}

    # -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")

    def _documents(self, rest: str, values: tuple[object, ...]) -> list[StoredDocument]:
        with self._lock:
            rows = self._database.execute(f"SELECT {_DOCUMENT} FROM documents {rest}", values).fetchall()  # noqa: S608
        return [
            StoredDocument(name, digest, source, state, title, json.loads(metadata), added_s, expires_s, bool(pinned))
            for name, digest, source, state, title, metadata, added_s, expires_s, pinned in rows
        ]

    def _passages(self, rest: str, values: tuple[object, ...]) -> list[Passage]:
        with self._lock:
            rows = self._database.execute(
                "SELECT p.number, p.document_id, p.start, p.stop, p.text, d.title, d.source, d.metadata "  # noqa: S608
                f"FROM passages p JOIN documents d ON d.id = p.document_id {rest}",
                values,
            ).fetchall()
        return [
            Passage(number, document_id, start, stop, text, title, source, json.loads(metadata))
            for number, document_id, start, stop, text, title, source, metadata in rows
        ]


def _row(document: StoredDocument) -> tuple[object, ...]:
    return (
        document.id, document.digest, document.source, document.source_state, document.title,
        json.dumps(dict(document.metadata), sort_keys=True), document.added_at_s, document.expires_at_s,
        document.is_pinned,
    )  # fmt: skip


def _statements(script: str) -> Iterator[str]:
    """Statements of a script; `executescript` would end the transaction."""
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
