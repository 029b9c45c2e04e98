"""Files of every kind: what is read, and what is left out with a reason."""

from pathlib import Path

import pytest
from pypdf import PdfWriter
from transformers import PreTrainedModel

from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.rag.corpus import Corpus
from kvloom.rag.files import FileText, Skipped, read_file

from ..support.models import DOCUMENTS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


def text_of(path: Path) -> str:
    found = read_file(path)
    assert isinstance(found, FileText), found
    return found.text


def why(path: Path) -> str:
    found = read_file(path)
    assert isinstance(found, Skipped), found
    return found.why


def pdf(path: Path, text: str) -> None:
    """A PDF of one page, by hand: text in a standard font."""
    content = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    data, offsets = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    start = len(data)
    data += b"xref\n0 6\n0000000000 65535 f \n" + table
    data += b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % start
    path.write_bytes(data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_in_any_unicode(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("Der Weber heißt Jörg; 織機 ist ein Webstuhl.", encoding=encoding)
    assert text_of(path) == "Der Weber heißt Jörg; 織機 ist ein Webstuhl."


def test_text_in_an_older_encoding(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes(("Der Weber heißt Jörg und wohnt in Köln. Größe, Maß und Übung. " * 5).encode("cp1252"))
    assert "Jörg" in text_of(path) and "Köln" in text_of(path)
    path.write_bytes(("Ткацкий станок держит нити основы, пока между ними проходит уток. " * 5).encode("cp1251"))
    assert "станок" in text_of(path)
    path.write_bytes(("織機は縦糸を張り、横糸を通して布を織る機械である。" * 5).encode("shift_jis"))
    assert "織機" in text_of(path)


def test_html_without_its_scripts(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(
        "<html><head><title>The loom</title><style>p {}</style></head><body><script>var x</script>"
        "<h1>Parts</h1><p>It has a <b>warp</b>\nbeam.</p><ul><li>one</li><li>two</li></ul></body></html>"
    )
    found = read_file(path)
    assert isinstance(found, FileText) and found.title == "The loom"
    assert "Parts\n" in found.text and "It has a warp beam." in found.text and "one\ntwo" in found.text
    assert "var x" not in found.text and "The loom" not in found.text and "p {}" not in found.text


def test_pdf(tmp_path: Path) -> None:
    pdf(tmp_path / "a.pdf", "The warp beam turns slowly.")
    assert text_of(tmp_path / "a.pdf") == "The warp beam turns slowly."
    (tmp_path / "cut.pdf").write_bytes((tmp_path / "a.pdf").read_bytes()[:200])
    assert "PDF" in why(tmp_path / "cut.pdf")
    writer = PdfWriter()
    writer.add_blank_page(100, 100)
    writer.write(tmp_path / "blank.pdf")
    assert "without text" in why(tmp_path / "blank.pdf")


def test_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(100))
    (tmp_path / "blank.md").write_text(" \n\t\n")
    assert why(tmp_path / "empty.txt") == "empty"
    assert why(tmp_path / "picture.png") == "no text"
    assert why(tmp_path / "blank.md") == "no text in it"
    assert "no regular file" in why(tmp_path)


def test_a_folder_follows_its_files(tmp_path: Path, model: PreTrainedModel) -> None:
    folder = tmp_path / "docs"
    (folder / "deep").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / "a.md").write_text(f"# Harbour\n\n{DOCUMENTS[0]}\n")
    (folder / "deep" / "b.txt").write_text(DOCUMENTS[1])
    (folder / "empty.txt").touch()
    with Corpus(tmp_path / "c", model, make_tokenizer(bos=True), store=KVStore([HostTier(None)])) as corpus:
        first = corpus.add_files(folder)
        assert [Path(name).name for name in first.added] == ["a.md", "b.txt"]
        assert [(each.path.name, each.why) for each in first.skipped] == [("empty.txt", "empty")]
        assert corpus.passages()[0].text.startswith("a\n")  # the title stands in front
        again = corpus.add_files(folder)
        assert len(again.unchanged) == 2 and again.computed_tokens == 0 and corpus.stale() == []
        (folder / "a.md").write_text(DOCUMENTS[2])
        (folder / "deep" / "b.txt").unlink()
        assert [Path(name).name for name in corpus.stale()] == ["a.md", "b.txt"]
        corpus.pin([str(folder / "a.md")])
        later = corpus.add_files(folder, forget_missing=True)
        assert [Path(name).name for name in later.updated] == ["a.md"]
        assert [Path(name).name for name in later.removed] == ["b.txt"]
        assert [(Path(each.id).name, each.is_pinned) for each in corpus.documents()] == [("a.md", True)]
        with pytest.raises(FileNotFoundError, match="no file or folder"):
            corpus.add_files(folder / "nowhere")
        with pytest.raises(ValueError, match="paths is empty"):
            corpus.add_files()


def test_large_files_are_cut_at_borders(tmp_path: Path, model: PreTrainedModel) -> None:
    path = tmp_path / "large.md"
    path.write_text("\n\n".join(f"## Part {i}\n\n{DOCUMENTS[i % 4]}" for i in range(40)))
    with Corpus(
        tmp_path / "c", model, make_tokenizer(bos=True), store=KVStore([HostTier(None)]), passage_tokens=100
    ) as corpus:
        corpus.add_files(path, precompute=False)
        passages = corpus.passages()
        assert len(passages) > 10
        text = path.read_text()
        for passage in passages:
            body = passage.text.removeprefix("large\n")
            assert text[passage.start : passage.stop] == body and body.startswith("## Part")
        assert " ".join(text[p.start : p.stop] for p in passages).split() == text.split()
