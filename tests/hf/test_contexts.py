"""Contexts that begin as earlier ones did, and several questions in one batch."""

import pytest
import torch
from transformers import PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.answering import Generation, Prompt, Sampling, answer_together
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.hf.prefill import Prefill
from kvloom.connectors.identity.requests import chunk_salt
from kvloom.core import ChunkKey
from kvloom.kvstore.keys import content_key
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.models import DOCUMENTS, QUESTION, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


def connect(model: PreTrainedModel, ratio: float, store: KVStore | None = None) -> TransformersConnector:
    return TransformersConnector(
        model,
        make_tokenizer(bos=True),
        store or KVStore([HostTier(None)]),
        Blender(recompute_ratio=ratio),
        model_id="m",
        reuse_contexts=True,
    )


def test_a_context_that_begins_as_another_did_is_exact_as_far_as_that(model: PreTrainedModel) -> None:
    store = KVStore([HostTier(None)])
    exact, fusing = connect(model, 1.0, store), connect(model, 0.0, store)
    rows = [exact.encode_document(text) for text in DOCUMENTS]
    whole = exact.fuse(rows)
    assert whole.is_exact and whole.exact_documents == 0
    again = exact.fuse(rows)
    assert again.exact_documents == 4 and again.computed_tokens == 0 and again.stored_s > 0
    assert torch.equal(again.blended.keys, whole.blended.keys)
    assert torch.equal(again.blended.values, whole.blended.values)
    mixed = fusing.fuse([rows[0], rows[1], rows[3]])  # the last document was never third
    assert mixed.exact_documents == 2 and not mixed.is_exact
    shared = sum(map(len, rows[:2])) + len(exact.lead_ids)
    assert torch.equal(mixed.blended.keys[:, :, :shared], whole.blended.keys[:, :, :shared])
    assert fusing.fuse(rows).is_exact  # all four stand as they did


def test_nothing_but_the_same_beginning_is_taken_for_it(model: PreTrainedModel) -> None:
    store = KVStore([HostTier(None)])
    exact, fusing = connect(model, 1.0, store), connect(model, 0.0, store)
    rows = [exact.encode_document(text) for text in DOCUMENTS]
    exact.fuse(rows)
    assert fusing.fuse([rows[1], rows[0], rows[2]]).exact_documents <= 1
    is_stored = exact.stored_contexts(rows)
    assert is_stored([0, 1, 2]) and not is_stored([1, 0])
    other = TransformersConnector(
        model, make_tokenizer(bos=True), store, model_id="m", salt=b"another tenant", reuse_contexts=True
    )
    assert not other.stored_contexts(rows)([0, 1])


def test_full_prefill_computes_no_document_twice(model: PreTrainedModel) -> None:
    """At ratio 1, documents behind the first are computed in context only."""
    rag = connect(model, 1.0)
    rows = [rag.encode_document(text) for text in DOCUMENTS]
    context = rag.fuse(rows)
    assert context.computed_tokens <= sum(map(len, rows))
    assert rag.key_of(rows[0]) in rag.store and rag.key_of(rows[1]) not in rag.store


def test_a_lost_document_of_a_context_is_computed_again(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rag = connect(model, 1.0)
    rows = [rag.encode_document(text) for text in DOCUMENTS]
    whole = rag.fuse(rows)
    unreadable: set[ChunkKey] = {rag._context_keys(rag.lead_ids, rows)[2]}
    read = KVStore.read

    def losing(self: KVStore, key: ChunkKey, *args: object, **options: object) -> object:
        return None if key in unreadable else read(self, key, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(KVStore, "read", losing)
    again = rag.fuse(rows)
    assert again.exact_documents == 2
    assert torch.allclose(again.blended.keys, whole.blended.keys, atol=1e-5)
    assert torch.allclose(again.blended.values, whole.blended.values, atol=1e-5)


@pytest.mark.parametrize("reuses", [False, True])
def test_an_opening_stands_in_place_of_the_lead(model: PreTrainedModel, reuses: bool) -> None:
    """At ratio 1 the context is a plain prompt's; below, the first document is no longer exact, and never taken so."""
    rag = TransformersConnector(
        model,
        make_tokenizer(bos=True),
        KVStore([HostTier(None)]),
        Blender(recompute_ratio=1.0),
        model_id="m",
        reuse_contexts=reuses,
    )
    rows = [rag.encode_document(text) for text in DOCUMENTS[:3]]
    opening = [*rag.lead_ids, *rag.encode_question("A harbour, in brief.")]
    rag.precompute(DOCUMENTS)
    for _ in range(2):  # the second time from what the first has stored
        whole = rag.fuse(rows, opening_ids=opening)
        ids = torch.tensor([[*opening, *(token for row in rows for token in row)]])
        assert torch.equal(whole.token_ids, ids[0]) and whole.is_exact
        with torch.no_grad():
            expected = model(ids, use_cache=True).past_key_values
        for layer in range(len(whole.blended.keys)):
            assert torch.allclose(whole.blended.keys[layer], expected.layers[layer].keys[0], atol=1e-4)
    assert whole.exact_documents == (3 if reuses else 0)
    fused = rag.fuse(rows[::-1], opening_ids=opening, blender=Blender(recompute_ratio=0.0))
    assert fused.blended.candidates == sum(map(len, rows)) and not fused.is_exact
    same = rag.fuse(rows[:1], opening_ids=rag.lead_ids)
    assert same.exact_documents == 1 and same.blended.candidates == 0


def test_an_opening_is_computed_once(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for another connector, and anew when the store has lost it."""
    store = KVStore([HostTier(None)])
    computed: list[list[int]] = []
    alone = Prefill.alone
    monkeypatch.setattr(Prefill, "alone", lambda self, ids: (computed.append(list(ids)), alone(self, ids))[1])
    first, other = connect(model, 0.0, store), connect(model, 0.0, store)
    rows = [first.encode_document(text) for text in DOCUMENTS]
    opening = [*first.lead_ids, *first.encode_question("A harbour, in brief.")]
    whole = first.fuse(rows, opening_ids=opening)
    again, elsewhere = first.fuse(rows, opening_ids=opening), other.fuse(rows, opening_ids=opening)
    assert computed.count(opening) == 1
    for each in (again, elsewhere):
        assert torch.equal(each.blended.keys, whole.blended.keys)
        assert torch.equal(each.blended.values, whole.blended.values)
    key = content_key(first.spec, opening, salt=chunk_salt())
    assert store.delete(key)
    assert torch.equal(first.fuse(rows, opening_ids=opening).blended.keys, whole.blended.keys)
    assert computed.count(opening) == 2 and key in store


@pytest.mark.parametrize("ratio", [0.3, 1.0])
@pytest.mark.parametrize("bos", [True, False])
def test_together_as_one_by_one(model: PreTrainedModel, ratio: float, bos: bool) -> None:
    rag = TransformersConnector(
        model, make_tokenizer(bos=bos), KVStore([HostTier(None)]), Blender(recompute_ratio=ratio), model_id="m"
    )
    asked = [
        (DOCUMENTS[:1], "Why?"),
        (DOCUMENTS, QUESTION),
        (DOCUMENTS[2:], "Where does her brother sell the honey, and on which day of the week?"),
        (DOCUMENTS[::-1], "And the loom?"),
    ]

    def generations() -> list[Generation]:
        return [
            Generation(lambda: rag, documents, Prompt(f"\n{question}"), Sampling(5 + 4 * i))
            for i, (documents, question) in enumerate(asked)
        ]

    alone, together = generations(), generations()
    expected = [each.run() for each in alone]
    assert answer_together(together) == expected
    assert len(set(expected)) > 1
    for one, other in zip(alone, together, strict=True):
        assert (one.finish, one.usage.prompt_tokens, one.usage.completion_tokens) == (
            other.finish,
            other.usage.prompt_tokens,
            other.usage.completion_tokens,
        )
    assert answer_together(generations(), batch_tokens=1) == expected  # a batch of one each


def test_together_with_windows_as_one_by_one() -> None:
    model = make_model("mistral", sliding_window=16)
    rag = connect(model, 1.0)
    asked = [(DOCUMENTS, QUESTION), (DOCUMENTS[:2], "Why?")]
    generations = [Generation(lambda: rag, documents, Prompt(q), Sampling(6)) for documents, q in asked]
    expected = [Generation(lambda: rag, documents, Prompt(q), Sampling(6)).run() for documents, q in asked]
    assert answer_together(generations) == expected


def test_together_is_greedy(model: PreTrainedModel) -> None:
    rag = connect(model, 1.0)
    with pytest.raises(ValueError, match=r"temperature is 0\.5"):
        answer_together([Generation(lambda: rag, DOCUMENTS, Prompt("?"), Sampling(4, temperature=0.5))])
    assert answer_together([]) == []
