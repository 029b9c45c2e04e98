"""Fused documents decoded with retrieval: the index is built from the fused keys, wherever the documents stand."""

from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.blend.choosers import Chooser
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.registry import METHODS
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_tokenizer
from ..support.retrieval_fakes import FAKES, MeansSelector, make_codebooks, maker
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


def test_fully_recomputed_and_fully_attended_is_stock(model: PreTrainedModel) -> None:
    rag = connect(model, 1.0)
    with rag.session(Retrieval("means", **{**SOME, "budget_ratio": 1.0}), documents=LONG) as session:
        (tokens,) = session.generate(QUESTION, max_new_tokens=12).token_ids
    pieces = [make_tokenizer(bos=False)(f"{document}\n").input_ids for document in LONG]
    ids = [
        *rag.lead_ids,
        *(token for piece in pieces for token in piece),
        *make_tokenizer(bos=False)(QUESTION).input_ids,
    ]
    assert list(tokens) == stock(model, ids, 12)[0]


@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 0, 3)])
def test_the_index_is_that_of_the_fused_keys(model: PreTrainedModel, ratio: float, order: Sequence[int]) -> None:
    """Whether the documents were computed before or not, and recomputed tokens are indexed as they are now."""
    documents, retrieval = [LONG[i] for i in order], Retrieval("means", **SOME)
    answers = []
    for precomputed in (False, True):
        rag = connect(model, ratio)
        if precomputed:
            rag.precompute(LONG)
        with rag.session(retrieval, documents=documents) as session:
            context = rag.fuse([rag.encode_document(document) for document in documents])
            answers.append(session.generate(QUESTION, max_new_tokens=12).token_ids[0])
            fused = session.sequences[0]
            again = MeansSelector(fused.plan.shapes[0], start=16)
            again.add(context.blended.keys[2][:, 16 : fused.stop], context.blended.values[2][:, 16 : fused.stop])
            indexed = fused.index.layers[2]
            assert isinstance(indexed, MeansSelector) and fused.stop >= 512
            assert torch.equal(again._means, indexed._means[:, : again._means.shape[1]])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", ["landmarks", "vq", "exact"])
def test_methods_serve_documents_wherever_they_stand(model: PreTrainedModel, method: str) -> None:
    rag = connect(model, 0.3)
    retrieval = Retrieval(method, profile=make_codebooks(rag.spec) if method == "vq" else None, **SOME)
    first: list[tuple[int, ...]] = []
    for documents in (LONG, LONG[::-1], LONG):
        with rag.session(retrieval, documents=documents) as session:
            out = session.generate(QUESTION, max_new_tokens=12)
            assert out.explanations[0].startswith(f"{method}: ")
            assert (out.counts[0].rebuilt_chunks, out.counts[0].lost_chunks) == (0, 0)
            first.append(out.token_ids[0])
    assert first[0] == first[2]


def test_a_fused_context_is_not_stored_as_its_text(model: PreTrainedModel) -> None:
    rag = connect(model, 0.3)
    with rag.session(Retrieval("means", **SOME), documents=LONG) as session:
        session.generate(QUESTION, max_new_tokens=2)
        (ids,) = session.token_ids
        keys = [session.sequences[0].key_of(i) for i in range(2)]
    assert all(key in rag.store for key in keys)
    assert not any(key in rag.store for key in prefix_keys(rag.spec, ids, chunk_tokens=256))
    with rag.session(Retrieval("means", **SOME), documents=LONG[::-1]) as session:
        assert session.sequences[0].key_of(0) not in keys


def test_documents_and_history_exclude_each_other(model: PreTrainedModel) -> None:
    rag = connect(model, 0.3)
    with pytest.raises(ValueError, match="both history and documents"):
        rag.session(Retrieval("exact", **SOME), history=[[1, 2]], documents=LONG)
    with pytest.raises(ValueError, match="the model's context 4096; give fewer"):
        rag.session(Retrieval("exact", **SOME), documents=LONG * 9)


def test_choosers_of_one_name_do_not_share_keys(model: PreTrainedModel) -> None:
    """Fused KV depends on which tokens were recomputed."""

    def take(count: int) -> Chooser:
        return lambda tokens, _: torch.arange(count, device=tokens.positions.device)

    rag, keys = connect(model, 0.3), []
    for chooser in (take(0), take(40)):
        with rag.session(Retrieval("means", **SOME), documents=LONG, blender=Blender(0.3, chooser=chooser)) as session:
            keys.append(session.sequences[0].key_of(0))
    assert keys[0] != keys[1]
