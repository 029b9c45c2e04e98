"""Fused documents decoded with retrieval: their indexes come with them, and answer as if made anew."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.registry import METHODS
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_tokenizer
from ..support.retrieval_fakes import FAKES, CodesSelector, make_codebooks, maker
from .test_retrieval import make, stock

pytestmark = pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")

LONG = [" ".join([text] * 6) for text in DOCUMENTS]
SOME = {"budget_ratio": 0.05, "window_tokens": 16, "break_even_tokens": 0}


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAKES:
        monkeypatch.setitem(METHODS, name, maker(name))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


def connect(model: PreTrainedModel, ratio: float, *, bos: bool = True) -> TransformersConnector:
    store, blender = KVStore([HostTier(None)]), Blender(recompute_ratio=ratio)
    return TransformersConnector(model, make_tokenizer(bos=bos), store, blender, model_id="m", allow_uncertified=True)


def answered(rag: TransformersConnector, documents: Sequence[str], retrieval: Retrieval) -> tuple[list[int], int, int]:
    """Twelve tokens, and how many of the index's were taken and computed."""
    with rag.session(retrieval, documents=documents) as session:
        assert session.fused_index is not None
        found = session.generate(QUESTION, max_new_tokens=12).token_ids[0]
        return list(found), session.fused_index.taken, session.fused_index.computed


def test_fully_recomputed_and_fully_attended_is_stock(model: PreTrainedModel) -> None:
    rag = connect(model, 1.0)
    tokens, _, _ = answered(rag, LONG, Retrieval("codes", **{**SOME, "budget_ratio": 1.0}))
    text = "".join(f"{document}\n" for document in LONG)
    pieces = [make_tokenizer(bos=False)(f"{document}\n").input_ids for document in LONG]
    ids = [
        *rag.lead_ids,
        *(token for piece in pieces for token in piece),
        *make_tokenizer(bos=False)(QUESTION).input_ids,
    ]
    assert text and tokens == stock(model, ids, 12)[0]


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3)])
def test_codes_of_documents_serve_where_they_are_placed(
    model: PreTrainedModel, ratio: float, order: Sequence[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as without any stored index; what was recomputed is coded anew, and nothing else."""
    documents, retrieval = [LONG[i] for i in order], Retrieval("codes", **SOME)
    plain = connect(model, ratio)
    plain.precompute(LONG)
    expected, taken, computed = answered(plain, documents, retrieval)
    assert taken == 0 and computed > 4 * 500
    rag = connect(model, ratio)
    rag.precompute(LONG, retrieval=retrieval)
    recoded: list[int] = []
    recode = CodesSelector.recode

    def watched(self: CodesSelector, positions: Tensor, keys: Tensor) -> None:
        recoded.append(len(positions))
        recode(self, positions, keys)

    monkeypatch.setattr(CodesSelector, "recode", watched)
    with rag.session(retrieval, documents=documents) as session:
        index = session.fused_index
        assert index is not None and (index.taken, index.computed) == (computed - 4, 4)  # the lead token's
        context = rag.fuse([rag.encode_document(document) for document in documents])
        assert sum(recoded) == sum(map(len, context.blended.fresh))
        assert bool(sum(recoded)) is (ratio > 0)
        assert list(session.generate(QUESTION, max_new_tokens=12).token_ids[0]) == expected
        fused = session._contexts[0]
        again = CodesSelector(fused.plan.shapes[0], start=16)
        again.add(context.blended.keys[2][:, 16 : fused.stop], context.blended.values[2][:, 16 : fused.stop])
        assert torch.equal(again._signs, fused.index.layers[2]._signs[:, : len(again)])


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_vector_quantised_documents_serve_where_they_are_placed(model: PreTrainedModel, ratio: float) -> None:
    plain, rag = connect(model, ratio), connect(model, ratio)
    retrieval = Retrieval("vq", profile=make_codebooks(rag.spec), **SOME)
    rag.precompute(LONG, retrieval=retrieval)
    expected, taken, computed = answered(plain, LONG[::-1], retrieval)
    assert taken == 0
    assert answered(rag, LONG[::-1], retrieval) == (expected, computed - 4, 4)


def test_landmarks_move_by_multiples_of_their_runs(model: PreTrainedModel) -> None:
    """Without a BOS, and with documents that end where a run does; of others, what stands elsewhere is indexed anew."""
    rag, plain = connect(model, 0.3, bos=False), connect(model, 0.3, bos=False)
    texts = [f"{text} and {'so ' * n}on." for text in LONG for n in range(12)]
    even = [text for text in texts if not len(rag.encode_document(text)) % 8][:4]
    odd = next(text for text in texts if len(rag.encode_document(text)) % 8)
    assert len(even) == 4
    retrieval = Retrieval("landmarks", **SOME)
    rag.precompute([*even, odd], retrieval=retrieval)
    for documents, share in ((even[::-1], 1.0), ([even[0], odd, even[1], even[2]], 0.5)):
        expected, taken, _ = answered(plain, documents, retrieval)
        assert taken == 0
        found, taken, computed = answered(rag, documents, retrieval)
        assert found == expected
        assert (computed == 0) if share == 1.0 else (0.2 < taken / (taken + computed) < 0.8)


def test_what_cannot_be_moved_is_indexed_anew(model: PreTrainedModel) -> None:
    retrieval = Retrieval("means", **SOME)
    plain, rag = connect(model, 0.3), connect(model, 0.3)
    with pytest.raises(RuntimeError, match="unflatten"):  # of documents whose length is no multiple of 8
        rag.precompute(LONG, retrieval=retrieval)
    retrieval = Retrieval("exact", **SOME)
    rag = connect(model, 0.3)
    rag.precompute(LONG, retrieval=retrieval)
    assert answered(rag, LONG, retrieval) == answered(plain, LONG, retrieval)
    assert answered(rag, LONG, retrieval)[1:] == (0, 0)


def test_an_index_is_added_to_documents_stored_before(model: PreTrainedModel) -> None:
    rag, retrieval = connect(model, 0.3), Retrieval("codes", **SOME)
    rag.precompute(LONG)
    assert rag.precompute(LONG, retrieval=retrieval).computed == 0
    key = rag.key_of(rag.encode_document(LONG[0]))
    (name,) = rag.store.get(key).extras
    assert name.startswith("codes:") and name.endswith(":all:signs")
    puts = rag.store.stats().puts["stored"]
    rag.precompute(LONG, retrieval=retrieval)
    assert rag.store.stats().puts["stored"] == puts


def test_a_fused_context_is_not_stored_as_its_text(model: PreTrainedModel) -> None:
    rag = connect(model, 0.3)
    with rag.session(Retrieval("codes", **SOME), documents=LONG) as session:
        session.generate(QUESTION, max_new_tokens=2)
        (ids,) = session.token_ids
        keys = [session._contexts[0].key_of(i) for i in range(2)]
    assert all(key in rag.store for key in keys)
    assert not any(key in rag.store for key in prefix_keys(rag.spec, ids, chunk_tokens=256))
    with rag.session(Retrieval("codes", **SOME), documents=LONG[::-1]) as session:
        assert session._contexts[0].key_of(0) not in keys


def test_documents_and_history_exclude_each_other(model: PreTrainedModel) -> None:
    rag = connect(model, 0.3)
    with pytest.raises(ValueError, match="both history and documents"):
        rag.session(Retrieval("exact", **SOME), history=[[1, 2]], documents=LONG)
    with pytest.raises(ValueError, match="the model's context 4096; give fewer"):
        rag.session(Retrieval("exact", **SOME), documents=LONG * 9)
