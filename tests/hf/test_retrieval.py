"""Decoding with retrieval in transformers: what the budget covers is exact, what is stored is found again."""

import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from kvloom.calibration.certificate import Certificate, Figure
from kvloom.connectors.break_even import NEVER, crossing
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.connectors.hf.retrieval import session as hf_session
from kvloom.connectors.hf.retrieval.attention import IMPLEMENTATION, with_retrieval
from kvloom.connectors.hf.retrieval.session import Session
from kvloom.core import LayerAttention, Tier
from kvloom.errors import (
    EngineError,
    JudgedWithoutTasksWarning,
    SpecMismatchError,
    UncertifiedError,
    UncertifiedWarning,
)
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.registry import METHODS
from kvloom.retrieval.settings import CHUNK_TOKENS, Retrieval

from ..support.damage import flip
from ..support.lossy import CoarseCodec
from ..support.models import CONFIGS, make_model, make_tokenizer, make_variant
from ..support.retrieval_fakes import FAKES, LearningSelector, MeansSelector, StatefulSelector, make_codebooks, maker

pytestmark = pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")

ALL = {"budget_ratio": 1.0, "break_even_tokens": 0}
SOME = {"budget_ratio": 0.05, "break_even_tokens": 0}


@pytest.fixture(autouse=True, scope="module")
def methods() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in FAKES:
            patch.setitem(METHODS, name, maker(name))
        yield


def make(architecture: str = "llama", **config: object) -> PreTrainedModel:
    return make_model(architecture, **{"max_position_embeddings": 4096, **config})


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make()


def connect(model: PreTrainedModel, *tiers: Tier, **options: object) -> TransformersConnector:
    store = KVStore(tiers or [HostTier(None)])
    settings = {"model_id": "m", "allow_uncertified": True, **options}
    return TransformersConnector(model, make_tokenizer(bos=True), store, **settings)


@pytest.fixture
def rag(model: PreTrainedModel) -> Iterator[TransformersConnector]:
    connector = connect(model)
    yield connector
    assert connector.store.check() == []
    assert connector.store.stats().pinned == 0
    connector.store.close()


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 500, (length,), generator=random).tolist() for length in lengths]


class Logits:
    """A logits processor that changes nothing and remembers."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.clone())
        return scores


def stock(model: PreTrainedModel, ids: Sequence[int], count: int = 12, **options: object) -> tuple[list[int], Tensor]:
    """What the model's own `generate` says, and its logits `[count, V]`."""
    logits = Logits()
    settings = {"do_sample": False, "logits_processor": LogitsProcessorList([logits]), "pad_token_id": 0, **options}
    asked = torch.tensor([list(ids)])
    out = model.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=count, **settings)
    return out[0, len(ids) :].tolist(), torch.cat(logits.seen)


def ask(
    rag: TransformersConnector, asked: object, retrieval: Retrieval, count: int = 12
) -> tuple[list[list[int]], Tensor]:
    """New tokens of each row, and logits `[count, B, V]`."""
    logits = Logits()
    options = {"logits_processor": LogitsProcessorList([logits])}
    out = rag.generate(asked, retrieval=retrieval, max_new_tokens=count, **options)
    return [list(ids) for ids in out.token_ids], torch.stack(logits.seen)


def assert_as_stock(rag: TransformersConnector, asked: list[list[int]], retrieval: Retrieval, count: int = 12) -> None:
    tokens, logits = ask(rag, asked, retrieval, count)
    for row, ids in enumerate(asked):
        expected, expected_logits = stock(rag.model, ids, count)
        assert tokens[row] == expected
        assert float((logits[:, row] - expected_logits).abs().max()) < 1e-4
        assert float(expected_logits.std()) > 0.5  # so that the bound above says something


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_budget_of_everything_is_stock_generate(architecture: str) -> None:
    assert_as_stock(connect(make(architecture)), prompts(900, 420, 30), Retrieval("exact", **ALL))


@pytest.mark.parametrize("kv_heads", [1, 4], ids=["one group", "no groups"])
@pytest.mark.parametrize("method", ["random", "landmarks", "factor", "landmarks+factor", "quantized"])
def test_other_heads_and_methods(kv_heads: int, method: str) -> None:
    assert_as_stock(connect(make(num_key_value_heads=kv_heads)), prompts(700, 350), Retrieval(method, **ALL))


@pytest.mark.parametrize("method", ["exact", "landmarks", "quantized"])
def test_a_coverage_prunes_what_any_method_chose(rag: TransformersConnector, method: str) -> None:
    """To nothing lost at all of it, to fewer tokens at less; the certificate's form and the explanation name it."""
    asked, rows = prompts(700), []
    for coverage in (None, 1.0, 0.9, 0.5):
        retrieval = Retrieval(method, budget_ratio=0.3, coverage=coverage, break_even_tokens=0)
        out = rag.generate(asked, retrieval=retrieval, max_new_tokens=6)
        rows.append((out.counts[0].chosen_tokens, out.token_ids))
        assert (f"pruned to {coverage or 0:.1%}" in out.explanations[0]) == (coverage is not None)
        assert ('"coverage"' in retrieval.form[1]) == (coverage is not None)
    fixed, all_of_it, most, half = rows
    assert fixed == all_of_it and 0 < half[0] < most[0] < fixed[0]


@pytest.mark.parametrize("variant", ["window", "window in some layers", "tied wide heads"])
def test_the_models_own_windows(variant: str) -> None:
    model = make_variant(variant)
    rag = connect(model)
    assert_as_stock(rag, prompts(480, 300), Retrieval("exact", window_tokens=16, **ALL))


def test_layers_that_stay_dense(rag: TransformersConnector) -> None:
    asked = prompts(700)
    assert_as_stock(rag, asked, Retrieval("random", **{**SOME, "dense_layers": 4}))
    exact, _ = stock(rag.model, asked[0])
    assert ask(rag, asked, Retrieval("random", **{**SOME, "dense_layers": 3}))[0] != [exact]


def test_bfloat16() -> None:
    rag = connect(make().bfloat16())
    asked = prompts(700)
    _, logits = ask(rag, asked, Retrieval("exact", **ALL), 2)
    _, expected = stock(rag.model, asked[0], 2)
    error = float((logits[:, 0] - expected).abs().max())
    assert error < 0.1 * float(expected.std())


def test_slices_do_not_matter(rag: TransformersConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = prompts(700, 90)
    monkeypatch.setattr(hf_session, "SLICE_TOKENS", 77)
    assert_as_stock(rag, asked, Retrieval("means", **ALL))


def test_prefill_needs_no_square(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widest thing that attention is given is a slice of queries."""
    monkeypatch.setattr(hf_session, "SLICE_TOKENS", 128)
    widest = []
    from kvloom.connectors.hf.retrieval import sequence as hf_sequence

    plain = hf_sequence.layer_attention

    def watched(layer: LayerAttention, queries: Tensor, *args: Tensor) -> Tensor:
        widest.append(queries.shape[1])
        return plain(layer, queries, *args)

    monkeypatch.setattr(hf_sequence, "layer_attention", watched)
    assert_as_stock(connect(model), prompts(900), Retrieval("exact", **ALL), 2)
    assert max(widest) == 128


@pytest.mark.slow
def test_generated_tokens_leave_the_window(rag: TransformersConnector) -> None:
    asked = prompts(400, 260)
    retrieval = Retrieval("means", window_tokens=8, **ALL)
    with rag.session(retrieval) as session:
        out = session.generate(asked, max_new_tokens=140)
        for row, ids in enumerate(asked):
            assert list(out.token_ids[row]) == stock(rag.model, ids, 140)[0]
            context = session.sequences[row]
            assert context.stop == (len(ids) + 139 - 8) // CHUNK_TOKENS * CHUNK_TOKENS
            assert len(context.index.layers[0]) == context.stop - 16


# ------------------------------------------------------------------------------------------------ approximation


def test_a_step_attends_to_sinks_window_and_what_was_chosen(rag: TransformersConnector) -> None:
    """Layer by layer, by hand: the second new token of a retrieval that takes the best 40."""
    (ids,) = prompts(700)
    retrieval = Retrieval("exact", budget_ratio=0.0, budget_tokens=40, break_even_tokens=0)
    tokens, logits = ask(rag, [ids], retrieval, 2)
    layers, stop = rag.layers, 512
    with torch.no_grad():
        cached = rag.model(torch.tensor([ids])).past_key_values
        position = torch.tensor([len(ids)])
        hidden = layers.embed(torch.tensor(tokens[0][:1]))
        for layer in range(4):
            q, k, v = layers.qkv(layer, hidden, position)
            keys = torch.cat((cached.layers[layer].keys[0], k), 1)
            values = torch.cat((cached.layers[layer].values[0], v), 1)
            out = torch.empty(4, 1, 8)
            for head in range(4):
                group = (2 * (head // 2), 2 * (head // 2) + 1)
                scores = {h: (keys[h // 2] @ q[h, 0]) * layers.attention[layer].scale for h in group}
                weights = torch.stack([scores[h][16:stop].softmax(0) for h in group]).amax(0)
                seen = torch.ones(len(ids) + 1, dtype=torch.bool)
                seen[16:stop] = False
                seen[weights.topk(40).indices + 16] = True
                out[head, 0] = scores[head].masked_fill(~seen, -torch.inf).softmax(0) @ values[head // 2]
            hidden = layers.finish(layer, hidden, out)
        expected = rag.model.lm_head(rag.model.model.norm(hidden))[0]
    assert float((logits[1, 0] - expected).abs().max()) < 1e-4
    assert float((logits[1, 0] - stock(rag.model, ids, 2)[1][1]).abs().max()) > 1e-2


def test_order_in_a_batch_does_not_matter(rag: TransformersConnector) -> None:
    asked = prompts(650, 300, 900)
    retrieval = Retrieval("means", **SOME)
    tokens, _ = ask(rag, asked, retrieval)
    assert ask(rag, asked[::-1], retrieval)[0] == tokens[::-1]
    assert [ask(rag, [ids], retrieval)[0][0] for ids in asked] == tokens
    assert tokens != [stock(rag.model, ids)[0] for ids in asked]


def test_it_says_what_it_read(rag: TransformersConnector) -> None:
    out = rag.generate(prompts(900, 40), retrieval=Retrieval("means", **SOME), max_new_tokens=5)
    assert out.explanations[0] == "means: 38 of 752 tokens for each KV head, beside 16 sinks and the last 136"
    assert out.explanations[1].startswith("dense: 44 tokens fit sinks and window")
    long, short = out.counts
    assert (long.sparse_steps, long.dense_steps, short.sparse_steps, short.dense_steps) == (4, 0, 0, 4)
    assert long.chosen_tokens == 4 * 4 * 2 * 38
    assert long.read_bytes == 4 * 4 * 2 * (752 // 8) * 8 * 4


def test_an_index_learns_from_prompt_and_answer(rag: TransformersConnector) -> None:
    (ids,) = prompts(600)
    with rag.session(Retrieval("learning", window_tokens=8, **SOME)) as session:
        session.generate(ids, max_new_tokens=180)
        selector = session.sequences[0].index.layers[2]
        assert isinstance(selector, LearningSelector)
        assert selector.seen[:599] == list(range(599))
        assert len(selector) == selector.start - 16 + 752
        assert selector.seen[599:] == list(range(600, 776))
        assert selector.built == 512 - 16


# -------------------------------------------------------------------------------------------------------- store


def test_what_is_between_lies_in_the_host_tier_once(rag: TransformersConnector) -> None:
    (ids,) = prompts(900)
    with rag.session(Retrieval("means", **SOME)) as session:
        session.generate(ids, max_new_tokens=4)
        context = session.sequences[0]
        assert context.window_tokens == 16 + 900 + 3 - 768
        for index, key in enumerate(prefix_keys(rag.spec, ids, chunk_tokens=CHUNK_TOKENS)):
            stored = rag.store.get(key)
            assert stored is not None
            assert stored.keys.data_ptr() == context.chunks[index].keys.data_ptr()
        assert rag.store.stats().pinned == 3


def test_a_prompt_is_not_computed_twice(rag: TransformersConnector) -> None:
    asked = prompts(900)
    retrieval = Retrieval("means", **SOME)
    first = rag.generate(asked, retrieval=retrieval, max_new_tokens=12)
    with rag.session(retrieval) as session:
        second = session.generate(asked, max_new_tokens=12)
        selector = session.sequences[0].index.layers[1]
        assert isinstance(selector, MeansSelector) and selector.restored == 768 - 16
    assert second.token_ids == first.token_ids
    assert (first.counts[0].computed_tokens, first.counts[0].reused_tokens) == (899, 0)
    assert (second.counts[0].computed_tokens, second.counts[0].reused_tokens) == (899 - 768, 768)
    longer = [asked[0] + prompts(300, seed=1)[0]]
    assert_as_stock(rag, longer, Retrieval("means", **ALL))


def test_another_method_rebuilds_its_index_and_leaves_the_first_its_own(rag: TransformersConnector) -> None:
    asked = prompts(900)
    rag.generate(asked, retrieval=Retrieval("exact", **SOME), max_new_tokens=2)
    for rebuilt in (3, 0):
        out = rag.generate(asked, retrieval=Retrieval("means", **SOME), max_new_tokens=2)
        assert (out.counts[0].rebuilt_chunks, out.counts[0].reused_tokens) == (rebuilt, 768)


def test_approximate_chunks_are_not_served_as_exact(rag: TransformersConnector) -> None:
    (ids,) = prompts(300)
    with rag.session(Retrieval("means", window_tokens=8, **SOME)) as session:
        answer = list(session.generate(ids, max_new_tokens=230).token_ids[0])
    whole = ids + answer
    keys = prefix_keys(rag.spec, whole, chunk_tokens=CHUNK_TOKENS)
    assert [key in rag.store for key in keys] == [True, False]
    assert_as_stock(rag, [whole], Retrieval("means", **ALL))


@pytest.mark.parametrize("capacity", [0, 40_000])
def test_a_store_that_is_too_small_costs_memory_not_the_answer(model: PreTrainedModel, capacity: int) -> None:
    rag = connect(model, HostTier(capacity))
    asked = prompts(900)
    assert_as_stock(rag, asked, Retrieval("means", **ALL))
    assert rag.generate(asked, retrieval=Retrieval("means", **ALL), max_new_tokens=2).counts[0].unstored_chunks == 3


def test_a_chunk_lost_in_use_changes_nothing(rag: TransformersConnector) -> None:
    (ids,) = prompts(900)
    retrieval = Retrieval("means", **SOME)
    with rag.session(retrieval) as session:
        session.generate(ids, max_new_tokens=8)
        expected = session.generate([3, 1, 4], max_new_tokens=8).token_ids
    with rag.session(retrieval) as session:
        session.generate(ids, max_new_tokens=8)
        for key in prefix_keys(rag.spec, ids, chunk_tokens=CHUNK_TOKENS):
            assert rag.store.delete(key)
        assert session.generate([3, 1, 4], max_new_tokens=8).token_ids == expected


# ----------------------------------------------------------------------------------------------------- sessions


def test_turns_are_one_conversation(rag: TransformersConnector) -> None:
    turns = [prompts(420, 800, seed=turn) if turn == 0 else prompts(30, 260, seed=turn) for turn in range(3)]
    said: list[list[int]] = [[], []]
    with rag.session(Retrieval("means", window_tokens=32, **ALL)) as session:
        for turn in turns:
            out = session.generate(turn, max_new_tokens=10)
            for row, ids in enumerate(turn):
                said[row] += ids
                expected, _ = stock(rag.model, said[row], 10)
                assert list(out.token_ids[row]) == expected
                said[row] += expected
        assert session.token_ids == said


def test_text_in_text_out(rag: TransformersConnector) -> None:
    text = "Alice was born in a village near the river. " * 40
    out = rag.generate(text, retrieval=Retrieval("exact", **ALL), max_new_tokens=8)
    ids = [*rag.lead_ids, *make_tokenizer(bos=False)(text).input_ids]
    expected, _ = stock(rag.model, ids, 8)
    assert list(out.token_ids[0]) == expected
    assert out.texts == (make_tokenizer(bos=True).decode(expected, skip_special_tokens=True),)


def test_rows_end_on_their_own(rag: TransformersConnector) -> None:
    """The end token of one row is what it says third; the other goes on, and so does the next turn."""
    asked = prompts(500, 700)
    plain = [stock(rag.model, ids, 12)[0] for ids in asked]
    end = next(token for token in plain[0][2:] if token not in plain[1])
    with rag.session(Retrieval("means", **ALL)) as session:
        out = session.generate(asked, max_new_tokens=12, eos_token_id=end)
        assert list(out.token_ids[0]) == plain[0][: plain[0].index(end) + 1]
        assert list(out.token_ids[1]) == plain[1]
        out = session.generate(prompts(5, 6, seed=9), max_new_tokens=6)
        for row, more in enumerate(prompts(5, 6, seed=9)):
            said = asked[row] + (plain[0][: plain[0].index(end) + 1], plain[1])[row] + more
            assert list(out.token_ids[row]) == stock(rag.model, said, 6)[0]


def opened(model: PreTrainedModel, folder: Path) -> TransformersConnector:
    return connect(model, HostTier(None), DiskTier(folder))


@dataclass(frozen=True)
class Told:
    """Two turns of two rows without a break, stored, and the answers of the third."""

    folder: Path
    retrieval: Retrieval
    said: list[list[int]]
    answers: list[list[int]]


@pytest.fixture(scope="module")
def tell(model: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Told]:
    """By method; each is told once."""
    known: dict[str, Told] = {}

    def tell(method: str) -> Told:
        if method not in known:
            folder = tmp_path_factory.mktemp(method)
            rag = opened(model, folder)
            own = {
                "graph": {"parameters": {"exact_beams": 1, "Ls": 64, "keep_every": 1}},
                "vq": {"profile": make_codebooks(rag.spec)},
            }
            retrieval = Retrieval(method, window_tokens=8, **SOME, **own.get(method, {}))
            with rag.session(retrieval) as session:
                is_long = method in ("means", "stateful")  # enough for a chunk that is all decoded
                session.generate(prompts(700 if is_long else 740, 280), max_new_tokens=300 if is_long else 40)
                session.generate(prompts(40, 20, seed=1), max_new_tokens=6)
                said = session.token_ids
                session.save()
                out = session.generate(prompts(10, 12, seed=2), max_new_tokens=12)
            rag.store.close()
            known[method] = Told(folder, retrieval, said, [list(ids) for ids in out.token_ids])
        return known[method]

    return tell


def resumed(model: PreTrainedModel, told: Told, folder: Path) -> TransformersConnector:
    """A connector over a copy of what was stored."""
    shutil.copytree(told.folder, folder, dirs_exist_ok=True)
    return opened(model, folder)


def third_answers(session: Session) -> list[list[int]]:
    return [list(ids) for ids in session.generate(prompts(10, 12, seed=2), max_new_tokens=12).token_ids]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["means", "landmarks", "factor", "landmarks+factor", "graph", "sketch", "vq", "clusters"]
)
def test_resuming_is_going_on(model: PreTrainedModel, tell: Callable[[str], Told], tmp_path: Path, method: str) -> None:
    told = tell(method)
    rag = resumed(model, told, tmp_path)
    with rag.session(told.retrieval, history=told.said) as session:
        counts = [context.counts for context in session.sequences]
        assert [(c.computed_tokens, c.rebuilt_chunks, c.lost_chunks) for c in counts] == [(0, 0, 0)] * 2
        assert [c.has_index_state for c in counts] == [method in ("factor", "landmarks+factor", "graph", "sketch")] * 2
        if method == "graph":
            assert session.sequences[0].index.layers[0].graphs[0].built > 0
        assert third_answers(session) == told.answers
    rag.store.close()


@pytest.mark.slow
def test_an_index_of_the_whole_sequence_is_not_built_again(
    model: PreTrainedModel, tell: Callable[[str], Told], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tell("stateful")
    rag = resumed(model, told, tmp_path)
    for is_spoiled in (False, True):
        monkeypatch.setattr(StatefulSelector, "is_spoiled", is_spoiled)
        with rag.session(told.retrieval, history=told.said) as session:
            context = session.sequences[0]
            selector = context.index.layers[1]
            assert isinstance(selector, StatefulSelector)
            assert (len(selector), selector.restored) == (1024 - 16, 0 if is_spoiled else 1024 - 16)
            assert (context.counts.has_index_state, context.counts.computed_tokens) == (not is_spoiled, 0)
            assert third_answers(session) == told.answers
    rag.store.close()


@pytest.mark.slow
@pytest.mark.parametrize(("method", "lost"), [("means", 1), ("means", 2), ("means", 3), ("stateful", 2)])
def test_a_lost_chunk_is_computed_as_it_was(
    model: PreTrainedModel, tell: Callable[[str], Told], tmp_path: Path, method: str, lost: int
) -> None:
    """Chunk 1 of the first row is of the prompt, 2 begins there, 3 is all decoded with retrieval."""
    told = tell(method)
    rag = resumed(model, told, tmp_path)
    with rag.session(told.retrieval, history=told.said) as session:
        key = session.sequences[0].key_of(lost)
    assert rag.store.delete(key)
    with rag.session(told.retrieval, history=told.said) as session:
        counts = session.sequences[0].counts
        assert (counts.lost_chunks, counts.reused_tokens) == (1, lost * CHUNK_TOKENS)
        assert counts.computed_tokens == len(told.said[0]) - 1 - lost * CHUNK_TOKENS
        assert key in rag.store
        assert third_answers(session) == told.answers
    rag.store.close()


def test_a_flipped_byte_of_an_index_costs_time_not_the_answer(model: PreTrainedModel, tmp_path: Path) -> None:
    retrieval = Retrieval("means", **SOME)
    (ids,) = prompts(900)
    rag = opened(model, tmp_path)
    expected = rag.generate(ids, retrieval=retrieval, max_new_tokens=8).token_ids
    key = prefix_keys(rag.spec, ids, chunk_tokens=CHUNK_TOKENS)[1]
    rag.store.close()
    flip(tmp_path, key, -1)
    rag = opened(model, tmp_path)
    out = rag.generate(ids, retrieval=retrieval, max_new_tokens=8)
    assert out.token_ids == expected
    assert out.counts[0].reused_tokens == CHUNK_TOKENS
    rag.store.close()


def test_a_foreign_index_is_made_anew(rag: TransformersConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    retrieval = Retrieval("means", **SOME)
    (ids,) = prompts(900)
    plain = MeansSelector.export
    monkeypatch.setattr(
        MeansSelector, "export", lambda *args: {name: t[..., :3].clone() for name, t in plain(*args).items()}
    )
    expected = rag.generate(ids, retrieval=retrieval, max_new_tokens=8).token_ids
    monkeypatch.setattr(MeansSelector, "export", plain)
    for rebuilt in (3, 0):  # and stored as it should be
        out = rag.generate(ids, retrieval=retrieval, max_new_tokens=8)
        assert (out.token_ids, out.counts[0].rebuilt_chunks) == (expected, rebuilt)


# --------------------------------------------------------------------------------------------------- permission


def certificate(rag: TransformersConnector, retrieval: Retrieval, **conditions: object) -> Certificate:
    name, fields = retrieval.form[0], retrieval.fields
    return Certificate(rag.spec, name, fields, {"kl": Figure(0.01, 0.0, 0.02, "", 0.1)}, conditions)


def test_what_is_approximate_needs_a_certificate(model: PreTrainedModel) -> None:
    retrieval = Retrieval("means", **SOME)
    rag = connect(model, allow_uncertified=False)
    (ids,) = prompts(600)
    with pytest.raises(UncertifiedError, match="kvloom certify MODEL --retrieval means"):
        rag.generate(ids, retrieval=retrieval)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", JudgedWithoutTasksWarning)  # of this certificate: by its loss on text alone
        rag.generate(ids, retrieval=Retrieval("means", **ALL), max_new_tokens=2)
        certified = connect(model, allow_uncertified=False, certificates=[certificate(rag, retrieval)])
        certified.generate(ids, retrieval=retrieval, max_new_tokens=2)
    for other in ({"budget_ratio": 0.04}, {"window_tokens": 64}, {"parameters": {"x": 1}}, {"pooling": "sum"}):
        with pytest.raises(UncertifiedError):
            certified.session(Retrieval("means", **{**SOME, **other}))
    with pytest.warns(UncertifiedWarning, match="'means' at a budget of 5.0% is used for m without"):
        connect(model).generate(ids, retrieval=retrieval, max_new_tokens=2)


def test_below_the_break_even_attention_is_dense(model: PreTrainedModel) -> None:
    asked = prompts(600, 900)
    tokens = [stock(model, ids, 5)[0] for ids in asked]
    rag = connect(model)
    out = rag.generate(asked, retrieval=Retrieval("random", break_even_tokens=800), max_new_tokens=5)
    assert out.explanations[0] == "dense: 604 tokens are below the break-even of 800"
    assert out.explanations[1].startswith("random: ")
    assert list(out.token_ids[0]) == tokens[0]
    assert (out.counts[0].dense_steps, out.counts[1].sparse_steps) == (4, 4)


def test_a_context_may_grow_beyond_the_break_even(rag: TransformersConnector) -> None:
    (ids,) = prompts(700)
    out = rag.generate(ids, retrieval=Retrieval("means", budget_ratio=1.0, break_even_tokens=705), max_new_tokens=12)
    assert list(out.token_ids[0]) == stock(rag.model, ids, 12)[0]
    assert (out.counts[0].dense_steps, out.counts[0].sparse_steps) == (5, 6)


def test_the_break_even_is_measured_once_or_certified(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvloom.connectors.hf.retrieval import plan as hf_plan

    measured = []
    monkeypatch.setattr(hf_plan, "break_even", lambda *args: measured.append(args) or 123)
    rag = connect(model)
    retrieval = Retrieval("means")
    for _ in range(2):
        with rag.session(retrieval) as session:
            assert session.plan.break_even_tokens == 123
    assert len(measured) == 1
    certified = connect(model, certificates=[certificate(rag, retrieval, break_even_tokens=777)])
    with certified.session(retrieval) as session:
        assert session.plan.break_even_tokens == 777
    assert len(measured) == 1


def test_lines_cross_where_they_cross() -> None:
    """At 2,048, 8,192 and 32,768 tokens."""
    assert crossing([1.0], [0.5]) == 2048
    assert crossing([1.0, 4.0], [2.0, 2.0]) == 4096
    assert crossing([1.0, 4.0], [3.0, 3.5]) == 7168
    assert crossing([1.0, 2.0, 8.0], [2.0, 4.0, 4.0]) == 16384
    assert crossing([1.0, 2.0, 3.0], [2.0, 4.0, 4.0]) == 8192 + 2 * 24576  # beyond what was measured
    assert crossing([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]) == NEVER


def test_a_real_measurement_gives_a_length(rag: TransformersConnector) -> None:
    with rag.session(Retrieval("means")) as session:
        tokens = session.plan.break_even_tokens
        assert 2048 <= tokens <= NEVER and tokens % CHUNK_TOKENS == 0


# ------------------------------------------------------------------------------------------------- the engine's


def test_the_model_is_left_as_it_was(rag: TransformersConnector) -> None:
    before = rag.model.config._attn_implementation
    rag.generate(prompts(300), retrieval=Retrieval("exact", **ALL), max_new_tokens=2)
    assert rag.model.config._attn_implementation == before != IMPLEMENTATION


def test_others_get_what_sdpa_gives_meanwhile(model: PreTrainedModel) -> None:
    short, long = prompts(20, 50)
    ids = torch.tensor([[7] * 30 + short, long])
    mask = torch.tensor([[0] * 30 + [1] * 20, [1] * 50])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert torch.equal(with_retrieval(model, lambda: model.generate(ids, **options)), expected)


def test_beams_are_refused(rag: TransformersConnector) -> None:
    with rag.session(Retrieval("exact", **ALL)) as session:
        with pytest.raises(ValueError, match="num_beams is 2; a session sets it itself"):
            session.generate(prompts(300), max_new_tokens=4, num_beams=2)
        session.generate(prompts(300), max_new_tokens=4)  # nothing has happened to it


def test_attention_changed_meanwhile_is_noticed(rag: TransformersConnector) -> None:
    class Change:
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            rag.model.set_attn_implementation("sdpa")
            return scores

    with pytest.raises(EngineError, match="attention implementation was changed"):
        rag.generate(
            prompts(300), retrieval=Retrieval("exact", **ALL), logits_processor=LogitsProcessorList([Change()])
        )


def test_attention_changed_in_the_last_layer_is_noticed(rag: TransformersConnector) -> None:
    """When nothing comes behind that could stumble over it."""
    last = rag.model.model.layers[3]
    calls = []

    def change(*_: object) -> None:
        calls.append(1)
        if len(calls) == 2:  # of the slice, of the token
            rag.model.set_attn_implementation("sdpa")

    hook = last.register_forward_pre_hook(change)
    with pytest.raises(EngineError, match="layer 3 has not attended"):
        rag.generate(prompts(300), retrieval=Retrieval("exact", **ALL), max_new_tokens=1)
    hook.remove()


def test_sessions_in_threads(model: PreTrainedModel) -> None:
    asked, retrieval = prompts(500, 600, 700), Retrieval("means", **SOME)
    expected = [ask(connect(model), [ids], retrieval)[0][0] for ids in asked]
    rag = connect(model)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda ids: ask(rag, [ids], retrieval)[0][0], asked))
    assert found == expected


def test_indexing_runs_beside_the_prefill(rag: TransformersConnector, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    plain = MeansSelector.add

    def watched(self: MeansSelector, keys: Tensor, values: Tensor) -> None:
        threads.add(threading.current_thread().name.partition("_")[0])
        plain(self, keys, values)

    monkeypatch.setattr(MeansSelector, "add", watched)
    rag.generate(prompts(900), retrieval=Retrieval("means", **SOME), max_new_tokens=2)
    assert threads == {"kvloom-index"}


def test_a_lossy_store_is_what_attention_sees(model: PreTrainedModel) -> None:
    """Where the store gives back less than it was given, in every run the same."""
    codec = CoarseCodec(1 / 8)
    asked, retrieval = prompts(1500), Retrieval("means", **ALL)
    logits = []
    for _ in range(2):
        store = KVStore([HostTier(None)], codec=codec, allow_uncertified=True)
        rag = TransformersConnector(model, make_tokenizer(bos=True), store, model_id="m")
        logits.append(ask(rag, asked, retrieval, 6)[1])
    assert torch.equal(*logits)
    difference = float((logits[0][:, 0] - stock(model, asked[0], 6)[1]).abs().max())
    assert difference > 0.01
    with pytest.raises(UncertifiedError, match="the lossy codec 'coarse' may not be used for m"):
        strict = KVStore([HostTier(None)], codec=codec)
        TransformersConnector(model, make_tokenizer(bos=True), strict, model_id="m").generate(
            asked, retrieval=retrieval
        )


def test_numbers_that_are_none_are_refused() -> None:
    model = make()
    rag = connect(model)
    with torch.no_grad():
        model.model.layers[2].self_attn.k_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="keys are not finite"):
        rag.generate(prompts(600), retrieval=Retrieval("means", **SOME), max_new_tokens=4)
    with pytest.raises(EngineError, match="layer 2 gives numbers that are not finite"):
        connect(model)


def test_what_cannot_be_asked_is_refused(rag: TransformersConnector) -> None:
    retrieval = Retrieval("exact", **ALL)
    for asked, words in (([], "prompts is empty"), ([[]], r"prompts\[0\] is empty"), (prompts(4096), "4096 tokens")):
        with pytest.raises(ValueError, match=words):
            rag.generate(asked, retrieval=retrieval)
    with rag.session(retrieval) as session:
        session.generate(prompts(30), max_new_tokens=1)
        with pytest.raises(ValueError, match="2 prompts for 1 sequences"):
            session.generate(prompts(3, 4))
        session.generate(prompts(3), max_new_tokens=1)  # nothing has happened to it
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        rag.generate(prompts(3), retrieval=retrieval, max_new_tokens=0)
    for wrong, words in (
        ({"method": "psychic"}, "no retrieval method 'psychic'; known: clusters, exact"),
        ({"budget_ratio": 1.5}, "budget_ratio is 1.5"),
        ({"coverage": 0.0}, "coverage is 0.0; expected a share above 0"),
        ({"budget_tokens": -1}, "budget_tokens is -1"),
        ({"window_tokens": 0}, "window_tokens is 0"),
        ({"sink_tokens": 12}, "multiple of 8 below 256"),
        ({"sink_tokens": 256}, "multiple of 8 below 256"),
        ({"pooling": "mean"}, "pooling is 'mean'"),
        ({"break_even_tokens": -1}, "break_even_tokens is -1"),
    ):
        with pytest.raises(ValueError, match=words):
            Retrieval(**{"method": "exact", **wrong})
    with pytest.raises(ValueError, match="vq needs a profile"):
        rag.generate(prompts(30), retrieval=Retrieval("vq", **ALL))
    foreign = make_codebooks(replace(rag.spec, model_id="another"))
    with pytest.raises(SpecMismatchError, match="made for another"):
        rag.session(Retrieval("vq", profile=foreign, **ALL))
    with pytest.raises(ValueError, match=r"means does not take \{'x': 1\}"):
        rag.generate(prompts(30), retrieval=Retrieval("means", parameters={"x": 1}, **ALL))


def test_a_session_is_kept_from_failing_half_way(rag: TransformersConnector) -> None:
    session: Session
    with rag.session(Retrieval("exact", **ALL)) as session:
        session.generate(prompts(300), max_new_tokens=2)
    assert rag.store.stats().pinned == 0
