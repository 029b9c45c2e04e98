"""Load or compute in transformers: a slow tier is left alone, and what is said is the same."""

import random
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.hf.load_choice import Choice, LoadChoice
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import CHUNK_TOKENS, Retrieval

from ..support.models import make_model, make_tokenizer

SLOW_S = 0.3  # many times what a tiny model takes for a document
DENSE = Retrieval(budget_ratio=1.0, break_even_tokens=0)


class SlowTier(HostTier):
    """A tier whose every read takes `delay_s`."""

    delay_s = SLOW_S

    def get(self, *arguments: Any) -> Any:
        time.sleep(self.delay_s)
        return super().get(*arguments)

    def get_layers(self, *arguments: Any) -> Any:
        time.sleep(self.delay_s)
        return super().get_layers(*arguments)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", max_position_embeddings=4096)


Connect = Callable[..., TransformersConnector]


@pytest.fixture
def connect(model: PreTrainedModel) -> Connect:
    def make(store: KVStore, ratio: float = 0.0, **options: Any) -> TransformersConnector:
        options = {"model_id": "m", "load_or_recompute": "auto", "allow_uncertified": True, **options}
        return TransformersConnector(model, make_tokenizer(bos=True), store, Blender(recompute_ratio=ratio), **options)

    return make


def rows(count: int, *, tokens: int = 64, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(8, 100) for _ in range(tokens)] for _ in range(count)]


def test_a_chunk_is_loaded_until_both_costs_are_known() -> None:
    now = [0.0]
    choice = LoadChoice("auto", clock=lambda: now[0])
    assert choice.decide("disk", 1000, 64, 0) == Choice(True, "untried")
    for _ in range(3):
        choice.observe_load("disk", 1000, 1.0)
        choice.observe_load("host", 1000, 0.001)
        choice.observe_prefill(4, 2, 100.0)  # too few tokens to say anything
    assert choice.decide("disk", 1000, 64, 0) == Choice(True, "untried")
    for _ in range(3):
        choice.observe_prefill(64, 32, 0.1)
    assert choice.decide("disk", 1000, 64, 0) == Choice(False, "slow tier")
    assert choice.decide("host", 1000, 64, 0) == Choice(True, "loads")
    assert choice.decide("disk", 100, 640, 0) == Choice(True, "loads"), "fewer bytes, more tokens"
    now[0] = 99.0
    assert not choice.decide("disk", 1000, 64, 0).loads
    now[0] = 101.0  # a hundred times what a chunk takes
    assert choice.decide("disk", 1000, 64, 0) == Choice(True, "trial")
    assert choice.decide("disk", 1000, 64, 0) == Choice(False, "slow tier"), "one at a time"
    for _ in range(12):
        choice.observe_load("disk", 1000, 0.001)
    assert choice.decide("disk", 1000, 64, 0) == Choice(True, "loads"), "it has become fast"


def test_always_loads(connect: Connect) -> None:
    choice = LoadChoice()
    for _ in range(5):
        choice.observe_load("disk", 1000, 9.0)
        choice.observe_prefill(64, 32, 0.1)
    assert choice.decide("disk", 1000, 64, 0) == Choice(True, "always") and not choice.decides
    with (
        KVStore([HostTier(None)]) as store,
        pytest.raises(ValueError, match="'sometimes'; expected one of auto, always"),
    ):
        connect(store, load_or_recompute="sometimes")


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_documents_of_a_slow_tier_are_computed(connect: Connect, ratio: float) -> None:
    """The context is what it is when they are loaded, and the ratio what it was."""
    with KVStore([SlowTier(None)]) as store:
        rag = connect(store, ratio)
        documents, others = rows(3), rows(4, seed=1)
        rag.fuse(others)  # computes them: what that takes is known
        loading = connect(store, ratio, load_or_recompute="always")
        loaded = loading.fuse(documents) and loading.fuse(documents)
        assert set(loaded.decisions) == {"always"} and loaded.computed_tokens == loaded.blended.computed_tokens
        for _ in range(3 if ratio == 1.0 else 1):  # at ratio 1 the first document alone is read
            assert set(rag.fuse(documents).decisions) == {"untried"}
        found = rag.fuse(documents)
        assert found.decisions == ("slow tier",) * (1 if ratio == 1.0 else 3)
        assert found.is_exact == loaded.is_exact == (ratio == 1.0)
        assert found.blended.computed_tokens == loaded.blended.computed_tokens
        assert found.blended.candidates == loaded.blended.candidates
        assert found.computed_tokens == found.blended.computed_tokens + 64 * len(found.decisions)
        torch.testing.assert_close(found.blended.keys, loaded.blended.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.blended.values, loaded.blended.values, rtol=1e-4, atol=1e-4)
        assert store.stats().pinned == 0


def test_a_fast_tier_is_loaded_from(connect: Connect) -> None:
    with KVStore([HostTier(None)]) as store:
        rag = connect(store)
        documents = rows(4, tokens=512)
        assert set(rag.fuse(documents).decisions) == {"nothing stored"}
        for _ in range(3):
            found = rag.fuse(documents)
        assert set(found.decisions) == {"loads"} and found.computed_tokens == 0


def test_documents_in_their_context(connect: Connect) -> None:
    """At ratio 1 they are computed instead; below, only the first is, as the others would be fused."""
    with KVStore([SlowTier(None)]) as store:
        exact, fusing = (connect(store, ratio, reuse_contexts=True) for ratio in (1.0, 0.0))
        documents = rows(3)
        whole = exact.fuse(documents)
        for rag in (exact, fusing):
            rag._choice = exact._choice
        for _ in range(4):
            exact._choice.observe_prefill(64, 32, 0.001)
            exact._choice.observe_load("host", 64 * exact.spec.token_bytes, SLOW_S)
        found = exact.fuse(documents)
        assert found.exact_documents == 0 and found.is_exact and "slow tier" in found.decisions
        torch.testing.assert_close(found.blended.keys, whole.blended.keys, rtol=1e-4, atol=1e-4)
        found = fusing.fuse(documents)
        assert found.exact_documents == 3 and found.is_exact and found.decisions == ()
        found = fusing.fuse([documents[0], *rows(1, seed=5)])
        assert found.exact_documents == 0 and found.decisions[0] == "slow tier"
        begin = len(fusing.lead_ids) + 64
        torch.testing.assert_close(
            found.blended.keys[:, :, :begin], whole.blended.keys[:, :, :begin], rtol=1e-4, atol=1e-4
        )


def test_a_conversation_goes_on_as_if_it_were_loaded(connect: Connect) -> None:
    (history,) = rows(1, tokens=9 * CHUNK_TOKENS + 9)  # in three slices, so that it is known what computing takes
    tier = SlowTier(None)
    tier.delay_s = 0.0
    with KVStore([tier]) as store:
        rag = connect(store)
        with rag.session(DENSE) as session:
            first = session.generate(history, max_new_tokens=4)
            expected = session.generate([5, 6, 7], max_new_tokens=8).token_ids
        tier.delay_s = 1.0
        said = [*history, *first.token_ids[0]]
        counts = []
        for _ in range(2):
            with rag.session(DENSE, history=[said]) as session:
                assert session.generate([5, 6, 7], max_new_tokens=8).token_ids == expected
                counts.append(session.sequences[0].counts)
        assert store.stats().pinned == 0
    # Three chunks are loaded; by then it is known what loading takes, too.
    assert counts[0].reused_tokens == 3 * CHUNK_TOKENS and counts[0].decision == "slow tier"
    assert counts[1].reused_tokens == 0 and counts[1].decision == "slow tier"
    assert counts[1].computed_hits >= counts[0].computed_hits + 3 * CHUNK_TOKENS


def test_a_saved_conversation_is_always_loaded(connect: Connect) -> None:
    """Its index comes with it, and what was decoded with retrieval is not computed as it was in one pass."""
    (history,) = rows(1, tokens=5 * CHUNK_TOKENS + 9)
    with KVStore([SlowTier(None)]) as store:
        rag = connect(store)
        with rag.session(DENSE) as session:
            session.generate(history, max_new_tokens=4)
            session.save()
            said = session.token_ids
        for _ in range(2):
            with rag.session(DENSE, history=said) as session:
                counts = session.sequences[0].counts
                assert counts.computed_tokens == 0 and counts.decision == ""
