"""The catalog of a corpus: what it costs to ask whether a text is still there."""

import sqlite3
import time
from pathlib import Path

from kvloom.rag.catalog import Catalog, StoredDocument


def document(name: str) -> StoredDocument:
    return StoredDocument(name, name.encode(), "", "", "", {}, time.time(), None, False)


def test_a_text_is_found_without_reading_all_passages(tmp_path: Path) -> None:
    path = tmp_path / "corpus.sqlite"
    Catalog(path).close()
    with sqlite3.connect(path) as older:  # as an earlier release left it
        older.execute("DROP INDEX passages_by_text")
    catalog = Catalog(path)
    texts = [f"Passage {i:05} of the same length; it ends like a few of the others: {i % 500:04}." for i in range(5000)]
    catalog.replace(document("all"), [(i, i + 1, text) for i, text in enumerate(texts)], None)
    catalog.replace(
        document("odd"), [(0, 1, "with a \0 zero, and more"), (1, 2, "with a \0 zero, and less"), (2, 3, "")], None
    )
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    catalog._database.set_progress_handler(count, 10)
    try:
        assert all(catalog.has_text(text) for text in texts[::500])
        for there in ("with a \0 zero, and more", ""):
            assert catalog.has_text(there)
        for absent in (texts[0].replace("00000", "99999"), "with a \0 zero, and some", "Passage", "\0"):
            assert not catalog.has_text(absent)
    finally:
        catalog._database.set_progress_handler(None, 0)
    assert (
        0 < steps < 1000
    )  # ten instructions of SQLite's machine each; reading all texts once takes 1,500 of these steps
    catalog.close()
