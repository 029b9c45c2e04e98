"""A corpus of documents: what is added, changed, found, ordered and answered."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.rag.answers import Answer
from kvloom.rag.corpus import Corpus

from ..support.models import DOCUMENTS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return make_tokenizer(bos=True)


@pytest.fixture
def corpus(tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[Corpus]:
    with Corpus(tmp_path / "corpus", model, tokenizer, passage_tokens=64, recompute_ratio=0.3) as made:
        yield made


def test_unchanged_documents_cost_nothing_and_changed_ones_are_computed_again(corpus: Corpus) -> None:
    first = corpus.add(DOCUMENTS, ids=["a", "b", "c", "d"])
    assert first.added == ("a", "b", "c", "d") and first.computed_tokens > 50
    again = corpus.add(DOCUMENTS, ids=["a", "b", "c", "d"])
    assert again.unchanged == ("a", "b", "c", "d") and again.computed_tokens == 0
    old = corpus._keys_of([DOCUMENTS[0]])[0]
    assert old in corpus.connector.store
    changed = corpus.add(["The harbour is closed today."], ids=["a"])
    assert changed.updated == ("a",) and changed.computed_tokens > 0
    assert old not in corpus.connector.store  # nobody reads it any more
    assert [passage.text for passage in corpus.passages(["a"])] == ["The harbour is closed today."]
    assert not corpus.search("ship cargo arrival", passages=1)


def test_a_text_that_two_documents_share_stays_until_both_are_gone(corpus: Corpus) -> None:
    corpus.add([DOCUMENTS[0], DOCUMENTS[0]], ids=["one", "two"])
    key = corpus._keys_of([DOCUMENTS[0]])[0]
    assert corpus.remove(["one"]) == 1 and key in corpus.connector.store
    assert corpus.remove(["two", "never there"]) == 1 and key not in corpus.connector.store


def test_search_finds_by_words_in_any_form(corpus: Corpus) -> None:
    corpus.add(DOCUMENTS, ids=["harbour", "alice", "loom", "falcon"])
    assert corpus.search("Which ships are entering?")[0].document_id == "harbour"
    assert corpus.search("What is woven?")[0].document_id == "loom"
    found = corpus.search('"quoted" OR NEAR(bees) AND honey*')  # a question is text, no query language
    assert found[0].document_id == "alice"
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert corpus.search("zeppelin") == []


def test_an_answer_names_its_sources_and_what_was_reused(corpus: Corpus) -> None:
    corpus.add(DOCUMENTS)
    answer = corpus.ask("What is the code of Falcon?", passages=2, max_new_tokens=6)
    assert {source.text for source in answer.sources} >= {DOCUMENTS[3]}
    documents = answer.usage.reused_tokens + answer.usage.recomputed_tokens
    assert answer.usage.reused_tokens > 0.3 * documents
    pieces = list(corpus.stream("What is the code of Falcon?", passages=2, max_new_tokens=6))
    last = pieces.pop()
    assert isinstance(last, Answer) and last.text == answer.text
    assert "".join(str(piece) for piece in pieces).strip() == answer.text


def test_a_stream_that_is_left_ends(corpus: Corpus) -> None:
    corpus.add(DOCUMENTS)
    for _ in corpus.stream("What is the code of Falcon?", max_new_tokens=64):
        break
    assert corpus.ask("Who keeps bees?", max_new_tokens=4).sources  # the model is free again


def test_an_asynchronous_stream_may_be_cancelled_at_any_piece(corpus: Corpus) -> None:
    """A reader that waits for the next piece when it is cancelled leaves nothing running."""
    corpus.add(DOCUMENTS)
    expected = corpus.ask("What is the code of Falcon?", max_new_tokens=6).text

    async def whole() -> str:
        return "".join(
            [
                each
                async for each in corpus.astream("What is the code of Falcon?", max_new_tokens=6)
                if isinstance(each, str)
            ]
        )

    async def cancelled() -> None:
        async for _ in corpus.astream("What is the code of Falcon?", max_new_tokens=400):
            await asyncio.sleep(0)

    async def leave(after_s: float) -> None:
        task = asyncio.create_task(cancelled())
        await asyncio.sleep(after_s)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert asyncio.run(whole()).strip() == expected
    for after_s in (0.0, 0.05, 0.2):
        asyncio.run(leave(after_s))
    assert corpus.ask("What is the code of Falcon?", max_new_tokens=6).text == expected


def test_many_questions_as_one_by_one(corpus: Corpus) -> None:
    corpus.add(DOCUMENTS)
    questions = ["What is the code of Falcon?", "Who keeps bees?", "What does a loom hold in place while one weaves?"]
    alone = [corpus.ask(question, passages=2, max_new_tokens=8) for question in questions]
    together = corpus.answer_many(questions, passages=2, max_new_tokens=8)
    assert [each.text for each in together] == [each.text for each in alone]
    assert [each.sources for each in together] == [each.sources for each in alone]


def test_passages_stand_first_as_they_stood_before(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with Corpus(tmp_path, model, tokenizer, recompute_ratio=1.0) as corpus:
        corpus.add(DOCUMENTS)
        found = [corpus.passages([each.id])[0] for each in corpus.documents()]
        first = corpus.ask("Why?", sources=found[:3], max_new_tokens=2)
        mixed = [found[3], found[2], found[1], found[0]]
        again = corpus.ask("Why?", sources=mixed, max_new_tokens=2)
        assert again.sources == (*first.sources, found[3])
        assert again.usage.reused_tokens > again.usage.recomputed_tokens > 0
        plain = corpus.ask("Why?", sources=[*mixed[::-1][:2], found[3]], order_for_reuse=False, max_new_tokens=2)
        assert plain.sources == (found[0], found[1], found[3])
        assert first.is_exact and again.is_exact


def test_everything_is_there_after_a_restart(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with Corpus(tmp_path, model, tokenizer) as corpus:
        corpus.add(DOCUMENTS, pin=True)
        answer = corpus.ask("Who keeps bees?", max_new_tokens=6)
    with Corpus(tmp_path, model, tokenizer) as corpus:
        assert len(corpus.documents()) == 4 and corpus.precompute() == 0
        assert corpus.connector.store.stats().pinned == 4
        assert corpus.ask("Who keeps bees?", max_new_tokens=6).text == answer.text


def test_documents_expire(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus.add([DOCUMENTS[0]], ttl_s=60.0)
    corpus.add([DOCUMENTS[1]])
    key = corpus._keys_of([DOCUMENTS[0]])[0]
    now = __import__("time").time()
    monkeypatch.setattr("kvloom.rag.corpus.time.time", lambda: now + 61)
    assert [each.expires_at_s for each in corpus.documents()] == [None]
    assert key not in corpus.connector.store and corpus.search("ship") == []


def test_pins_are_let_go(corpus: Corpus) -> None:
    corpus.add(DOCUMENTS, ids=list("abcd"))
    assert corpus.connector.store.stats().pinned == 0
    corpus.pin(["a", "b"])
    assert corpus.connector.store.stats().pinned == 2
    corpus.pin(["a"], pinned=False)
    corpus.remove(["b"])
    assert corpus.connector.store.stats().pinned == 0
    with pytest.raises(KeyError, match="no document 'z'"):
        corpus.pin(["z"])


def by_letters(texts: Sequence[str]) -> list[list[float]]:
    return [[1.0 + text.lower().count(letter) for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]


def test_an_embedding_finds_what_words_do_not(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    with Corpus(tmp_path, model, tokenizer, embedding=by_letters) as corpus:
        corpus.add(DOCUMENTS, ids=list("abcd"))
        assert len(corpus.search("zzz", passages=4)) == 4
        assert corpus.search(DOCUMENTS[2])[0].document_id == "c"
    with pytest.raises(ValueError, match="made with another embedding"):
        Corpus(tmp_path, model, tokenizer, embedding=lambda texts: np.array(by_letters(texts))[:, ::-1])
    with pytest.raises(ValueError, match=r"gave an array \[1\] for 1 texts"):
        Corpus(tmp_path / "other", model, tokenizer, embedding=lambda _: [1.0])  # type: ignore[list-item, return-value]


def test_vectors_follow_every_change(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Those of this process and of another one that has the same corpus open."""
    store = KVStore([HostTier(None)])
    with (
        Corpus(tmp_path, model, tokenizer, store=store, embedding=by_letters) as corpus,
        Corpus(tmp_path, model, tokenizer, store=store, embedding=by_letters) as other,
    ):
        corpus.add(DOCUMENTS[:2], ids=["a", "b"])
        assert {each.document_id for each in corpus.nearest("x", passages=9)} == {"a", "b"}
        other.add(DOCUMENTS[2:3], ids=["c"])
        assert {each.document_id for each in corpus.nearest("x", passages=9)} == {"a", "b", "c"}
        corpus.remove(["a"])
        assert {each.document_id for each in corpus.nearest("x", passages=9)} == {"b", "c"}
        assert {each.document_id for each in other.nearest("x", passages=9)} == {"b", "c"}
        corpus.remove(["b", "c"])
        assert corpus.nearest("x", passages=9) == []


@pytest.mark.parametrize(
    ("documents", "options", "message"),
    [
        ("one text", {}, "expected a list of documents"),
        (["", "a"], {}, r"documents\[0\] is empty"),
        (["a", "b"], {"ids": ["x"]}, "ids has 1 entries for 2 documents"),
        (["a", "b"], {"ids": ["x", "x"]}, "'x' is given twice"),
        (["a"], {"ids": [""]}, "expected a text"),
        (["a"], {"ttl_s": 0.0}, "ttl_s is 0.0"),
        (["a"], {"metadata": [{"x": object()}]}, "no JSON object"),
    ],
)
def test_bad_documents_are_refused_whole(
    corpus: Corpus, documents: list[str], options: dict[str, object], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        corpus.add(documents, **options)  # type: ignore[arg-type]
    assert corpus.documents() == []


def test_bad_questions(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match="question is empty"):
        corpus.ask(" ")
    with pytest.raises(LookupError, match="no passage fits"):
        corpus.ask("Why?")
    corpus.add(DOCUMENTS)
    with pytest.raises(ValueError, match="passages is 0"):
        corpus.ask("Why?", passages=0)
    with pytest.raises(ValueError, match="leaves no room"):
        corpus.ask("harbour " * 600)
    assert len(corpus.ask("harbour " * 190, passages=4, max_new_tokens=2).sources) < 4


def test_a_folder_that_holds_something_else(
    tmp_path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "corpus.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match="no catalog of a corpus"):
        Corpus(tmp_path, model, tokenizer, store=KVStore([HostTier(None)]))
    with pytest.raises(ValueError, match="no model in"):
        Corpus(tmp_path / "x", tmp_path)
    with pytest.raises(TypeError, match="tokenizer is missing"):
        Corpus(tmp_path / "x", model)
