"""Arguments of the wrong kind: accepted where that is natural, otherwise one line that names argument and document."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding, PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import Precomputed, TransformersConnector
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_model, make_tokenizer

EXACT = Retrieval("exact", budget_ratio=1.0, break_even_tokens=0)


@dataclass
class LangChainDocument:
    page_content: str
    metadata: dict[str, str]

    def __iter__(self) -> object:  # as pydantic's models have it
        return iter(vars(self).items())


@dataclass
class HaystackDocument:
    content: str | None


class LlamaIndexNode:
    def __init__(self, text: str) -> None:
        self.text = text

    def get_content(self) -> str:
        return self.text


class NodeWithScore:
    def __init__(self, text: str) -> None:
        self.node, self.score = LlamaIndexNode(text), 0.5

    def get_content(self) -> str:
        return self.node.get_content()


FRAMEWORKS: dict[str, Callable[[str], object]] = {
    "LangChain": lambda text: LangChainDocument(text, {"source": "x"}),
    "Haystack": HaystackDocument,
    "LlamaIndex": LlamaIndexNode,
    "LlamaIndex, found": NodeWithScore,
    "numpy": np.str_,
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", max_position_embeddings=1024)


@pytest.fixture
def rag(model: PreTrainedModel) -> TransformersConnector:
    return TransformersConnector(
        model, make_tokenizer(bos=True), KVStore([HostTier(None)]), Blender(1.0), model_id="m", allow_uncertified=True
    )


@pytest.mark.parametrize("kind", FRAMEWORKS)
def test_documents_of_frameworks(rag: TransformersConnector, kind: str) -> None:
    documents = [FRAMEWORKS[kind](text) for text in DOCUMENTS]
    assert rag.precompute(documents).computed == len(DOCUMENTS)
    assert rag.precompute(DOCUMENTS) == Precomputed(0, len(DOCUMENTS), 0)
    expected = rag.answer(DOCUMENTS, QUESTION, max_new_tokens=6)
    assert rag.answer(documents, QUESTION, max_new_tokens=6) == expected
    assert rag.encode_document(documents[0]) == rag.encode_document(DOCUMENTS[0])
    with rag.session(EXACT, documents=documents) as one, rag.session(EXACT, documents=DOCUMENTS) as two:
        assert one.token_ids == two.token_ids


@pytest.mark.parametrize(
    "kind", [tuple, iter, np.array, lambda texts: dict(enumerate(texts)).values(), lambda texts: (t for t in texts)]
)
def test_ordered_collections_of_documents(rag: TransformersConnector, kind: Callable[[object], object]) -> None:
    assert rag.precompute(kind(DOCUMENTS)).computed == len(DOCUMENTS)
    inputs, _ = rag.assemble(kind(DOCUMENTS), QUESTION)
    assert torch.equal(inputs["input_ids"], rag.assemble(DOCUMENTS, QUESTION)[0]["input_ids"])


ONE = DOCUMENTS[0]
WRONG_DOCUMENTS: dict[str, tuple[object, str]] = {
    "text": (ONE, "documents is one document, the str 'The harbour master"),
    "bytes": (ONE.encode(), "documents is one document, the bytes b'The harbour master"),
    "framework's": (LangChainDocument(ONE, {}), "documents is one document, of type LangChainDocument"),
    "none": (None, "documents is None; expected a list of documents"),
    "number": (7, "documents is the int 7; expected a list"),
    "mapping": ({"a": ONE}, "documents is of type dict; expected a list of documents, in the order of the context"),
    "set": ({ONE}, "documents is of type set; expected a list of documents, in the order of the context"),
    "none in it": ([ONE, None], r"documents\[1\] is None; expected a text \(str\)"),
    "bytes in it": ([ONE, b"x"], r"documents\[1\] is the bytes b'x'; expected a text"),
    "nan in it": ([ONE, float("nan")], r"documents\[1\] is the float nan; expected a text"),
    "list in it": ([[ONE], ONE], r"documents\[0\] is of type list; expected a text"),
    "mapping in it": ([ONE, {"text": ONE}], r"documents\[1\] is of type dict; expected a text"),
    "path in it": ([Path("a.txt")], r"documents\[0\] is of type PosixPath; expected a text"),
    "tensor": (torch.arange(5), r"documents\[0\] is of type Tensor; expected a text"),
    "class": ([LlamaIndexNode], r"documents\[0\] is of type type; expected a text"),
    "empty framework's": ([HaystackDocument(None)], r"documents\[0\] is of type HaystackDocument; expected a text"),
    "blank framework's": ([ONE, HaystackDocument(" ")], r"documents\[1\] is empty; leave it out"),
    "surrogate": ([ONE, "a\ud83dz"], r"documents\[1\] has a lone surrogate, '\\ud83d', at character 1; replace it"),
    "no text": ([SimpleNamespace(text=3)], r"documents\[0\] is of type SimpleNamespace; expected a text"),
    "empty": ([], "documents is empty; give at least one text"),
}


@pytest.mark.parametrize("name", WRONG_DOCUMENTS)
def test_what_are_no_documents(rag: TransformersConnector, name: str) -> None:
    documents, words = WRONG_DOCUMENTS[name]
    calls: list[Callable[[], object]] = [
        lambda: rag.precompute(documents),
        lambda: rag.assemble(documents, QUESTION),
        lambda: rag.answer(documents, QUESTION),
    ]
    if documents not in (None, []):  # a session may have none
        calls.append(lambda: rag.session(EXACT, documents=documents))
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert rag.store.stats().puts == {} and rag.store.stats().pinned == 0


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (None, "question is None; expected a text"),
        (b"Who?", "question is the bytes b'Who\\?'; expected a text"),
        (["Who?"], "question is of type list; expected a text"),
        ("", "question is empty"),
        ("\udc00Who?", r"question has a lone surrogate, '\\udc00', at character 0"),
    ],
)
def test_what_is_no_question(rag: TransformersConnector, question: object, words: str) -> None:
    for call in (rag.assemble, rag.answer):
        with pytest.raises((TypeError, ValueError), match=words):
            call(DOCUMENTS, question)


@pytest.mark.parametrize("count", [0, -1, None, 2.5, True, "8", torch.tensor(2.0)])
def test_what_is_no_number_of_tokens(rag: TransformersConnector, count: object) -> None:
    calls = (
        lambda: rag.answer(DOCUMENTS, QUESTION, max_new_tokens=count),
        lambda: rag.generate(QUESTION, retrieval=EXACT, max_new_tokens=count),
    )
    for call in calls:
        with pytest.raises((TypeError, ValueError), match=r"max_new_tokens is .*; expected"):
            call()


@pytest.mark.parametrize("count", [np.int64(3), torch.tensor(3)])
def test_numbers_of_other_libraries(rag: TransformersConnector, count: object) -> None:
    assert len(rag.generate([[1, 2, 3]], retrieval=EXACT, max_new_tokens=count).token_ids[0]) == 3


# ------------------------------------------------------------------------------------------------------ prompts

IDS = [[5, 6, 7, 8], [9, 10, 11, 12]]
ONE_PROMPT: dict[str, object] = {
    "list": IDS[0],
    "tuple": tuple(IDS[0]),
    "tensor": torch.tensor(IDS[0]),
    "row of a tensor": torch.tensor(IDS[:1]),
    "32 bits": torch.tensor(IDS[0], dtype=torch.int32),
    "array": np.array(IDS[0]),
    "array's numbers": list(np.array(IDS[0])),
    "tensor's numbers": list(torch.tensor(IDS[0])),
    "tokenizer's output": BatchEncoding({"input_ids": torch.tensor(IDS[:1]), "attention_mask": torch.ones(1, 4)}),
    "tokenizer's lists": {"input_ids": IDS[0], "attention_mask": [1, 1, 1, 1]},
    "list of a tensor": [torch.tensor(IDS[0])],
}
TWO_PROMPTS: dict[str, object] = {
    "lists": IDS,
    "tensor": torch.tensor(IDS),
    "array": np.array(IDS),
    "tensors": [torch.tensor(row) for row in IDS],
    "tokenizer's output": {"input_ids": IDS, "attention_mask": [[1] * 4] * 2},
    "padded": BatchEncoding(
        {
            "input_ids": torch.tensor([[0, 0, *IDS[0]], [*IDS[1], 3, 3]]),
            "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]),
        }
    ),
}


@pytest.mark.parametrize("kind", ONE_PROMPT)
def test_one_prompt(rag: TransformersConnector, kind: str) -> None:
    with rag.session(EXACT) as session:
        out = session.generate(ONE_PROMPT[kind], max_new_tokens=3)
        assert session.token_ids == [IDS[0] + list(out.token_ids[0])]
    assert out.token_ids == rag.generate(IDS[0], retrieval=EXACT, max_new_tokens=3).token_ids


@pytest.mark.parametrize("kind", TWO_PROMPTS)
def test_two_prompts(rag: TransformersConnector, kind: str) -> None:
    with rag.session(EXACT) as session:
        out = session.generate(TWO_PROMPTS[kind], max_new_tokens=3)
        assert session.token_ids == [IDS[0] + list(out.token_ids[0]), IDS[1] + list(out.token_ids[1])]
    with rag.session(EXACT, history=TWO_PROMPTS[kind] if isinstance(TWO_PROMPTS[kind], list) else IDS) as session:
        assert session.token_ids == IDS


def test_texts_and_ids_side_by_side(rag: TransformersConnector) -> None:
    with rag.session(EXACT) as session:
        session.generate([QUESTION, IDS[0]], max_new_tokens=1)
        assert [row[:-1] for row in session.token_ids] == [[0, *rag.encode_question(QUESTION)], IDS[0]]


WRONG_PROMPTS: dict[str, tuple[object, str]] = {
    "none": (None, "prompts is of type NoneType; expected texts or token ids"),
    "bytes": (b"Who?", "prompts is of type bytes; expected texts or token ids"),
    "number": (5, "prompts is of type int; expected texts or token ids"),
    "none in it": ([IDS[0], None], r"prompts\[1\] is of type NoneType; expected token ids or a text"),
    "none among ids": ([[5, None]], r"prompts\[0\] holds a NoneType; expected token ids"),
    "floats": ([[5.0, 6.0]], r"prompts\[0\] holds a float; expected token ids"),
    "truth": ([[True, False]], r"prompts\[0\] holds a bool; expected token ids"),
    "float tensor": (torch.ones(4), "prompts holds a float; expected token ids"),
    "three dimensions": (torch.zeros(1, 2, 3, dtype=torch.int64), r"prompts has shape \[1, 2, 3\]"),
    "no dimension": (torch.tensor(3), r"prompts has shape \[\]"),
    "tensor of rows": ([torch.tensor(IDS), torch.tensor(IDS)], r"prompts\[0\] has shape \[2, 4\]"),
    "unknown": ([IDS[0], [512]], r"prompts\[1\] has token id 512; the model knows ids from 0 to 511"),
    "negative": ([-1, 4], "prompts has token id -1; the model knows ids from 0 to 511"),
    "chat": ([{"role": "user", "content": "Who?"}], r"prompts\[0\] is of type dict; expected token ids or a text"),
    "chats": ([[{"role": "user", "content": "Who?"}]], r"prompts\[0\] holds a dict; .*chat template to it first"),
    "mapping": ({"text": "Who?"}, r"prompts has \['text'\]; expected input_ids, as a tokenizer gives them"),
    "surrogate": (["Who?", "a\ud800"], r"prompts\[1\] has a lone surrogate, '\\ud800', at character 1"),
    "empty": ([], "prompts is empty"),
    "empty row": ([IDS[0], []], r"prompts\[1\] is empty"),
    "empty tensor": (torch.zeros(0, dtype=torch.int64), r"prompts\[0\] is empty"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_what_is_no_prompt(rag: TransformersConnector, name: str) -> None:
    given, words = WRONG_PROMPTS[name]
    with rag.session(EXACT) as session:
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            session.generate(given, max_new_tokens=2)
        assert "\n" not in str(caught.value)
        assert session.token_ids == []
        session.generate(IDS, max_new_tokens=1)  # nothing has happened to it


def test_what_is_no_history(rag: TransformersConnector) -> None:
    for history, words in (
        ([[1, 2], [600]], r"history\[1\] has token id 600"),
        (["text"], r"history\[0\] is of type str"),
        ([[1] * 1024], r"history\[0\] has 1024 tokens, the model's context 1024; shorten it"),
        ([1, 2, 3], r"history\[0\] is of type int"),
        (7, "history is of type int; expected token ids of each sequence"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            rag.session(EXACT, history=history)
    assert rag.store.stats().pinned == 0


def test_token_ids_of_documents(rag: TransformersConnector) -> None:
    ids = rag.encode_document(ONE)
    expected = rag.key_of(ids)
    assert rag.key_of(torch.tensor(ids)) == rag.key_of(np.array(ids)) == rag.key_of(tuple(ids)) == expected
    assert torch.equal(rag.fuse([np.array(ids)]).blended.keys, rag.fuse([ids]).blended.keys)
    assert torch.equal(rag.compute([torch.tensor(ids)])[0].keys, rag.compute([ids])[0].keys)
    for call in (rag.fuse, rag.compute):
        for wrong, words in (
            ([ids, []], r"documents\[1\] is empty; give at least one token"),
            ([], "documents is empty; give at least one token"),
            ([ids, [-3]], r"documents\[1\] has token id -3"),
            ([ONE], r"documents\[0\] is of type str; expected token ids"),
            (ids, r"documents\[0\] is of type int"),
        ):
            with pytest.raises((TypeError, ValueError), match=words):
                call(wrong)
    with pytest.raises(ValueError, match="question_ids has token id 512"):
        rag.as_inputs(rag.fuse([ids]), [512])


def test_what_makes_no_connector(model: PreTrainedModel) -> None:
    store, tokenizer = KVStore([HostTier(None)]), make_tokenizer(bos=True)
    given = {"model": model, "tokenizer": tokenizer, "store": store, "model_id": "m"}
    for wrong, words in (
        ({"tokenizer": "gpt2"}, "tokenizer is of type str; expected PreTrainedTokenizerBase"),
        ({"store": [HostTier(None)]}, "store is of type list; expected ChunkStore"),
        ({"blender": 0.15}, "blender is of type float; expected Blender"),
        ({"model_id": 7}, "model_id is of type int; expected str"),
        ({"salt": "secret"}, "salt is of type str; expected bytes"),
        ({"separator": None}, "separator is None; expected a text"),
        ({"separator": "\ud800"}, "separator has a lone surrogate"),
        ({"pack_tokens": 0}, "pack_tokens is 0; expected at least 1"),
        ({"pack_tokens": "many"}, "pack_tokens is 'many'; expected an integer of at least 1"),
        ({"lead_ids": [0, 9999]}, "lead_ids has token id 9999"),
        ({"lead_ids": "<s>"}, "lead_ids is of type str; expected token ids"),
        ({"certificates": ["a.json"]}, r"certificates\[0\] is of type str; expected Certificate"),
        ({"certificates": 3}, r"certificates\[0\] is of type int; expected Certificate"),
    ):
        with pytest.raises((TypeError, ValueError), match=words) as caught:
            TransformersConnector(**{**given, **wrong})
        assert "secret" not in str(caught.value)


def test_what_is_no_retrieval(rag: TransformersConnector) -> None:
    with pytest.raises(TypeError, match="retrieval is of type str; expected a Retrieval, for instance Retrieval"):
        rag.session("landmarks")
    for wrong, words in (
        ({"method": None}, "method is None; expected a name"),
        ({"budget_ratio": "0.1"}, "budget_ratio is '0.1'; expected a number between 0 and 1"),
        ({"coverage": "0.9"}, "coverage is '0.9'; expected a number above 0"),
        ({"budget_ratio": float("nan")}, "budget_ratio is nan; expected a share between 0 and 1"),
        ({"budget_ratio": True}, "budget_ratio is True; expected a number"),
        ({"budget_tokens": 1.5}, "budget_tokens is 1.5; expected an integer"),
        ({"window_tokens": None}, "window_tokens is None; expected an integer"),
        ({"sink_tokens": 16.0}, "sink_tokens is 16.0; expected an integer"),
        ({"dense_layers": "2"}, "dense_layers is '2'; expected an integer"),
        ({"break_even_tokens": 2048.0}, "break_even_tokens is 2048.0; expected an integer"),
        ({"pooling": ["max"]}, r"pooling is \['max'\]; expected one of max, sum"),
        ({"parameters": [("a", 1)]}, "parameters is of type list; expected a mapping"),
        ({"profile": "profile.safetensors"}, "profile is of type str; expected a Profile, see Profile.load"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            Retrieval(**{"method": "exact", **wrong})
    assert Retrieval("exact", budget_ratio=np.float32(0.5), window_tokens=np.int64(64)).window_tokens == 64
