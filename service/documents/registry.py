"""Which documents tenants have registered: their text, and what became of precomputing them."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

State: TypeAlias = Literal["registered", "ready", "failed"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS documents (
    pool TEXT NOT NULL, model TEXT NOT NULL, id TEXT NOT NULL,
    text TEXT NOT NULL, tokens INTEGER NOT NULL, chunk BLOB NOT NULL,
    state TEXT NOT NULL, error TEXT NOT NULL DEFAULT '',
    created_at_s REAL NOT NULL, uses INTEGER NOT NULL DEFAULT 0, used_at_s REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (pool, model, id)
) WITHOUT ROWID
"""
_COLUMNS = "pool, model, id, text, tokens, chunk, state, error, created_at_s, uses, used_at_s"


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A registered document. `chunk`: the store's key of its KV; `uses` and `used_at_s` (Unix time) tell its heat."""

    pool: str
    model: str
    id: str
    text: str
    tokens: int
    chunk: bytes
    state: State
    error: str = ""
    created_at_s: float = 0.0
    uses: int = 0
    used_at_s: float = 0.0


class DocumentRegistry:
    """Documents in an SQLite file that its owner alone may read. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        path.touch(mode=0o600)
        self._lock = threading.Lock()
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute(_SCHEMA)

    def add(self, documents: Iterable[StoredDocument]) -> None:
        """A document that is registered already keeps its uses."""
        with self._lock, self._database:
            self._database.executemany(
                f"INSERT INTO documents ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0) "  # noqa: S608  no input
                "ON CONFLICT (pool, model, id) DO UPDATE SET text = excluded.text, tokens = excluded.tokens, "
                "chunk = excluded.chunk, state = excluded.state, error = ''",
                [(d.pool, d.model, d.id, d.text, d.tokens, d.chunk, d.state, d.error, time.time()) for d in documents],
            )

    def get(self, pool: str, model: str, document_id: str) -> StoredDocument | None:
        rows = self._select("WHERE pool = ? AND model = ? AND id = ?", (pool, model, document_id))
        return rows[0] if rows else None

    def all(self, pool: str, model: str | None = None, *, after: str = "", limit: int = 1000) -> list[StoredDocument]:
        """Documents of a tenant in order of their IDs."""
        if model is None:
            return self._select("WHERE pool = ? AND id > ? ORDER BY id LIMIT ?", (pool, after, limit))
        return self._select("WHERE pool = ? AND model = ? AND id > ? ORDER BY id LIMIT ?", (pool, model, after, limit))

    def hottest(self, limit: int, pool: str | None) -> list[StoredDocument]:
        """The most used first, of one tenant or of all."""
        order = "ORDER BY uses DESC, used_at_s DESC LIMIT ?"
        return self._select(order, (limit,)) if pool is None else self._select(f"WHERE pool = ? {order}", (pool, limit))

    def count(self, pool: str) -> int:
        with self._lock:
            row = self._database.execute("SELECT count(*) FROM documents WHERE pool = ?", (pool,)).fetchone()
        return int(row[0])

    def set_state(self, document: StoredDocument, state: State, error: str = "") -> None:
        self._change("UPDATE documents SET state = ?, error = ?", document, (state, error))

    def used(self, document: StoredDocument) -> None:
        self._change("UPDATE documents SET uses = uses + 1, used_at_s = ?", document, (time.time(),))

    def delete(self, document: StoredDocument) -> bool:
        """Whether it was there; other documents may have the same text, and so the same chunk."""
        return self._change("DELETE FROM documents", document, ())

    def is_shared(self, document: StoredDocument) -> bool:
        """Whether another document has the same chunk."""
        return bool(self._select("WHERE chunk = ? AND id <> ? LIMIT 1", (document.chunk, document.id)))

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _change(self, statement: str, document: StoredDocument, values: tuple[object, ...]) -> bool:
        with self._lock:
            cursor = self._database.execute(
                f"{statement} WHERE pool = ? AND model = ? AND id = ?",
                (*values, document.pool, document.model, document.id),
            )
            return cursor.rowcount > 0

    def _select(self, rest: str, values: tuple[object, ...]) -> list[StoredDocument]:
        with self._lock:
            rows = self._database.execute(f"SELECT {_COLUMNS} FROM documents {rest}", values).fetchall()  # noqa: S608
        return [StoredDocument(*row) for row in rows]
