"""The transformers connector: stock `generate` over a fused cache says what it says over plain text."""

import errno
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from kvloom.blend.blender import Blender
from kvloom.blend.choosers import no_tokens
from kvloom.connectors.hf.connector import Precomputed, TransformersConnector
from kvloom.connectors.hf.generation import cache_argument
from kvloom.connectors.hf.prefill import Prefill
from kvloom.core import ChunkKey, EncodedChunk, KVChunk, Tier
from kvloom.errors import EngineError, KVLoomError, TierFullError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ..support.damage import flip, overwrite, stored_at
from ..support.faulty import LONG_S, FaultyTier, device_error, eventually
from ..support.models import (
    CONFIGS,
    DOCUMENTS,
    QUESTION,
    ROPES,
    VARIANTS,
    WINDOW_TOKENS,
    make_model,
    make_tokenizer,
    make_variant,
    prefill,
)

FULL = Blender(recompute_ratio=1.0)


def connect(
    model: PreTrainedModel,
    *tiers: Tier,
    bos: bool = True,
    blender: Blender = FULL,
    **options: object,
) -> TransformersConnector:
    store = KVStore(tiers or [HostTier(None)])
    return TransformersConnector(model, make_tokenizer(bos=bos), store, blender=blender, model_id="m", **options)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama")


@pytest.fixture
def rag(model: PreTrainedModel) -> Iterator[TransformersConnector]:
    connector = connect(model)
    yield connector
    assert connector.store.check() == []
    connector.store.close()


def plain_ids(rag: TransformersConnector, documents: Sequence[str], question: str = QUESTION) -> list[int]:
    """Token ids of the whole prompt, made here by hand."""
    tokenizer = make_tokenizer(bos=False)
    pieces = [tokenizer(document + "\n").input_ids for document in documents] + [tokenizer(question).input_ids]
    return [*rag.lead_ids, *(token for piece in pieces for token in piece)]


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], cache: DynamicCache | None) -> tuple[list[int], Tensor]:
    """Ten greedy tokens and their logits `[10, V]`."""
    out = model.generate(
        **inputs,
        **{cache_argument(): cache},
        max_new_tokens=10,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits).float()


def assert_answers_as_plain(
    rag: TransformersConnector, documents: Sequence[str] = DOCUMENTS, question: str = QUESTION
) -> None:
    inputs, cache = rag.assemble(documents, question)
    expected_ids = torch.tensor([plain_ids(rag, documents, question)])
    assert torch.equal(inputs["input_ids"], expected_ids)
    tokens, logits = generate(rag.model, inputs, cache)
    plain = {"input_ids": expected_ids, "attention_mask": torch.ones_like(expected_ids)}
    expected_tokens, expected_logits = generate(rag.model, plain, None)
    assert tokens == expected_tokens
    assert float((logits - expected_logits).abs().max()) < 1e-4
    assert float(expected_logits.std()) > 0.5  # so that the bound above says something


def fused(rag: TransformersConnector, documents: Sequence[str] = DOCUMENTS) -> tuple[Tensor, Tensor]:
    context = rag.fuse([rag.encode_document(document) for document in documents])
    return context.blended.keys, context.blended.values


def same(a: Sequence[Tensor], b: Sequence[Tensor], *, atol: float = 1e-5) -> bool:
    return all(torch.allclose(x, y, atol=atol, rtol=1e-5) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_ratio_one_generates_what_plain_text_does(architecture: str, bos: bool) -> None:
    rag = connect(make_model(architecture), bos=bos)
    assert rag.lead_ids == ((0,) if bos else ())
    rag.precompute(DOCUMENTS)
    assert_answers_as_plain(rag)


@pytest.mark.parametrize("rope", ROPES)
def test_ratio_one_with_every_rope(rope: str) -> None:
    assert_answers_as_plain(connect(make_model("qwen3", rope=rope), bos=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_ratio_one_with_every_variant(variant: str) -> None:
    """Windows included: the context is longer, and the cache that `generate` gets keeps `window - 1` tokens only."""
    rag = connect(make_variant(variant))
    assert_answers_as_plain(rag)
    if "window" in variant:
        _, cache = rag.assemble(DOCUMENTS, QUESTION)
        kept = [layer.keys.shape[2] for layer in cache.layers]
        total = cache.get_seq_length()
        assert total > 5 * WINDOW_TOKENS
        assert kept == [WINDOW_TOKENS - 1 if window else total for window in rag.layers.window_tokens]
        assert WINDOW_TOKENS - 1 in kept


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("llama", {"sliding_window": WINDOW_TOKENS}),
        ("llama", {"sliding_window": WINDOW_TOKENS, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("llama", {"attention_chunk_size": WINDOW_TOKENS, "layer_types": ["chunked_attention"] * 4}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": WINDOW_TOKENS}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": WINDOW_TOKENS, "max_window_layers": 0}),
        ("mistral", {"sliding_window": WINDOW_TOKENS}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": WINDOW_TOKENS,
                "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            },
        ),
    ],
    ids=["ignored", "ignored, mixed", "ignored, chunked", "off", "off in qwen3", "on", "mixed"],
)
def test_the_cache_keeps_what_the_attention_modules_attend_to(architecture: str, config: dict[str, object]) -> None:
    """Whatever else stands in the configuration: plain forwards, without any cache, are the truth."""
    rag = connect(make_model(architecture, **config))
    inputs, cache = rag.assemble(DOCUMENTS, QUESTION)
    total = cache.get_seq_length()
    assert total > 5 * WINDOW_TOKENS
    kept = [layer.keys.shape[2] for layer in cache.layers]
    assert kept == [WINDOW_TOKENS - 1 if window else total for window in rag.layers.window_tokens]
    ids, tokens = inputs["input_ids"], []
    with torch.no_grad():
        for _ in range(8):
            tokens.append(int(rag.model(ids, use_cache=False).logits[0, -1].argmax()))
            ids = torch.cat((ids, torch.tensor([[tokens[-1]]])), dim=1)
    assert generate(rag.model, inputs, cache)[0][:8] == tokens
    expected = rag.tokenizer.decode(tokens, skip_special_tokens=True)
    assert rag.answer(DOCUMENTS, QUESTION, max_new_tokens=8) == expected
    exact = Retrieval("exact", budget_ratio=1.0, break_even_tokens=0)
    assert list(rag.generate(inputs, retrieval=exact, max_new_tokens=8).token_ids[0]) == tokens


@pytest.mark.parametrize("ratio", [0.0, 0.15, 1.0])
def test_one_document_is_exact_at_any_ratio(model: PreTrainedModel, ratio: float) -> None:
    rag = connect(model, blender=Blender(recompute_ratio=ratio))
    rag.precompute(DOCUMENTS)
    assert_answers_as_plain(rag, DOCUMENTS[:1])


def test_lead_and_first_document_are_never_recomputed(model: PreTrainedModel) -> None:
    for rag in (connect(model), connect(model, bos=False)):
        encoded = [rag.encode_document(document) for document in DOCUMENTS]
        alone, all_four = rag.fuse(encoded[:1]).blended, rag.fuse(encoded).blended
        assert alone.candidates == 0 and alone.attended_tokens == (0, 0, 0, 0)
        assert all_four.candidates == sum(map(len, encoded[1:])) == all_four.attended_tokens[0]


def test_ratios_below_one_are_an_approximation(model: PreTrainedModel) -> None:
    """Not the exact path under another name; and better than nothing."""
    rag = connect(model)
    expected = fused(rag)
    errors = []
    for ratio in (0.0, 0.5):
        rag.blender = Blender(recompute_ratio=ratio)
        errors.append(sum(float((a - b).norm()) for a, b in zip(fused(rag), expected, strict=True)))
    assert errors[0] > errors[1] > 1.0


def test_documents_in_another_order_and_again(rag: TransformersConnector) -> None:
    rag.precompute(DOCUMENTS)
    assert_answers_as_plain(rag, DOCUMENTS[::-1])
    assert_answers_as_plain(rag, [DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[2]])
    assert rag.store.stats().misses == {}


@pytest.mark.parametrize("ratio", [0.0, 0.3])
def test_the_question_is_computed_in_full(model: PreTrainedModel, ratio: float) -> None:
    """Logits of every question token are the model's own over the fused cache; regression of a suffix length of 1."""
    rag = connect(model, blender=Blender(recompute_ratio=ratio))
    documents = [rag.encode_document(document) for document in DOCUMENTS]
    answers = []
    for question in (QUESTION, "Who writes down every ship?"):
        ids = make_tokenizer(bos=False)(question).input_ids
        blended = rag.fuse(documents, question_ids=ids).blended
        keys, values = blended.keys, blended.values
        inputs, cache = rag.assemble(DOCUMENTS, question)
        assert len(ids) > 3 and cache.get_seq_length() == keys.shape[2] == inputs["input_ids"].shape[1] - len(ids)
        pairs = [(k[None].clone(), v[None].clone()) for k, v in zip(keys, values, strict=True)]
        with torch.no_grad():
            expected = model(torch.tensor([ids]), **{cache_argument(): DynamicCache(pairs)}).logits[0]
            found = model(torch.tensor([ids]), **{cache_argument(): cache}).logits[0]
        assert torch.allclose(found, expected, atol=1e-5)
        answers.append(found[-1])
    assert float((answers[0] - answers[1]).abs().max()) > 0.1


def test_the_question_has_a_say_in_what_is_recomputed(model: PreTrainedModel) -> None:
    rag = connect(model, blender=Blender(recompute_ratio=0.3))
    documents = [rag.encode_document(document) for document in DOCUMENTS]
    fresh = [
        rag.fuse(documents, question_ids=question).blended.fresh[-1].tolist()
        for question in (None, rag.encode_question(QUESTION), torch.tensor(rag.encode_question("Why? Why? Why?")))
    ]
    assert fresh[0] != fresh[1] != fresh[2] and len({len(each) for each in fresh}) == 1
    with pytest.raises(ValueError, match="question_ids has token id"):
        rag.fuse(documents, question_ids=[10**6])


def test_no_lead_warns(model: PreTrainedModel, caplog: pytest.LogCaptureFixture) -> None:
    connect(model)
    assert not caplog.records
    connect(model, bos=False)
    assert "behind no lead tokens" in caplog.text


def test_question_of_one_token(rag: TransformersConnector) -> None:
    assert_answers_as_plain(rag, question="?")


def test_answer_is_the_decoded_generation(rag: TransformersConnector) -> None:
    tokens, _ = generate(rag.model, *rag.assemble(DOCUMENTS, QUESTION))
    assert rag.answer(DOCUMENTS, QUESTION, max_new_tokens=10) == rag.tokenizer.decode(tokens, skip_special_tokens=True)


def test_generate_takes_the_cache_by_every_name_that_it_has(rag: TransformersConnector) -> None:
    """`past_key_values`, and from transformers 5.24 on `cache`, without a warning for the newer one."""
    newest, expected = cache_argument(), rag.answer(DOCUMENTS, QUESTION, max_new_tokens=6)
    for name in {"past_key_values", newest}:
        inputs, cache = rag.assemble(DOCUMENTS, QUESTION)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if name == newest else "ignore")
            output = rag.model.generate(**inputs, **{name: cache}, max_new_tokens=6, do_sample=False, pad_token_id=0)
        new = output[0, inputs["input_ids"].shape[1] :]
        assert rag.tokenizer.decode(new, skip_special_tokens=True) == expected


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_callers_modes_do_not_matter(model: PreTrainedModel, mode: type) -> None:
    expected = fused(connect(model, blender=Blender(recompute_ratio=0.3)))
    with mode():
        rag = connect(model, blender=Blender(recompute_ratio=0.3))
        assert same(fused(rag), expected)
        assert_answers_as_plain(connect(model))
    assert same(fused(rag), expected)


@pytest.mark.parametrize("architecture", CONFIGS)
def test_bfloat16(architecture: str) -> None:
    model = make_model(architecture).to(torch.bfloat16)
    rag = connect(model)
    inputs, cache = rag.assemble(DOCUMENTS, QUESTION)
    assert rag.spec.dtype == torch.bfloat16 and cache.layers[0].keys.dtype == torch.bfloat16
    _, logits = generate(model, inputs, cache)
    _, expected = generate(model, inputs, None)
    assert float(torch.cosine_similarity(logits[0], expected[0], dim=0)) > 0.99


# --------------------------------------------------------------------------------------------------- precompute


def test_precompute_skips_dedups_and_counts(rag: TransformersConnector) -> None:
    lengths = [len(rag.encode_document(document)) for document in DOCUMENTS]
    assert rag.precompute([DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]]) == Precomputed(2, 0, sum(lengths[:2]))
    assert rag.precompute(DOCUMENTS, progress=True) == Precomputed(2, 2, sum(lengths[2:]))
    assert rag.precompute(DOCUMENTS) == Precomputed(0, 4, 0)
    assert rag.store.stats().tiers[0].puts == 4


def test_the_store_knows_what_documents_cost(rag: TransformersConnector) -> None:
    rag.precompute(DOCUMENTS)
    keys = [rag.key_of(rag.encode_document(document)) for document in DOCUMENTS]
    costs = [found.recompute_s for found in rag.store.explain(keys)]
    lengths = [len(rag.encode_document(document)) for document in DOCUMENTS]
    assert all(cost is not None and cost > 0 for cost in costs)
    assert [cost / costs[0] for cost in costs] == pytest.approx([length / lengths[0] for length in lengths])  # one pack


def test_a_document_cannot_smuggle_in_special_tokens(model: PreTrainedModel) -> None:
    tokenizer = make_tokenizer(bos=True)
    special = tokenizer.bos_token_id
    text = f"Before {tokenizer.bos_token} after {tokenizer.bos_token}"
    rag = connect(model)
    assert special not in rag.encode_document(text)
    assert special in rag.encode_question(text)
    separated = connect(model, separator=tokenizer.bos_token)
    ids = separated.encode_document(text)
    assert ids.count(special) == 1
    assert ids[-1] == special


def test_precompute_adds_a_missing_separator_only(rag: TransformersConnector) -> None:
    rag.precompute(DOCUMENTS[:1])
    assert rag.precompute([DOCUMENTS[0] + "\n"]) == Precomputed(0, 1, 0)


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("variant", ["wide heads", "window", "window in some layers"])
def test_packs_hold_what_the_model_computes_for_each_alone(variant: str, bos: bool) -> None:
    model = make_variant(variant)
    encoded = [connect(model, bos=bos).encode_document(document) for document in DOCUMENTS]
    for pack_tokens in (1, 60, 4096):
        rag = connect(model, bos=bos, pack_tokens=pack_tokens)
        rag.precompute(DOCUMENTS)
        for ids in encoded:
            chunk = rag.store.get(rag.key_of(ids))
            lead = len(rag.lead_ids)
            alone = prefill(model, [*rag.lead_ids, *ids])
            assert chunk is not None and chunk.token_ids.tolist() == ids
            assert chunk.positions.tolist() == list(range(lead, lead + len(ids)))
            assert same((chunk.keys, chunk.values), (alone.keys[:, :, lead:], alone.values[:, :, lead:]))


def test_packs_are_as_long_as_asked_for(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rag = connect(model)
    encoded = [rag.encode_document(document) for document in DOCUMENTS]
    lengths = list(map(len, encoded))
    packs: list[int] = []
    behind_lead = Prefill.behind_lead

    def watched(self: Prefill, documents: Sequence[Sequence[int]]) -> list[KVChunk]:
        packs.append(sum(map(len, documents)))
        return behind_lead(self, documents)

    monkeypatch.setattr(Prefill, "behind_lead", watched)
    connect(model, pack_tokens=60).precompute(DOCUMENTS)
    assert sum(packs) == sum(lengths) and 1 < len(packs) < len(lengths)
    assert all(pack <= 60 or pack in lengths for pack in packs)


def test_lead_shapes_the_chunks(model: PreTrainedModel) -> None:
    """Chunks behind different leads are different, in content and in name."""
    rag, other = connect(model), connect(model, lead_ids=[0, 5, 6])
    ids = rag.encode_document(DOCUMENTS[0])
    assert rag.key_of(ids) != other.key_of(ids)
    assert not torch.allclose(rag.compute([ids])[0].values, other.compute([ids])[0].values, atol=0.1)
    assert_answers_as_plain(other)


# --------------------------------------------------------------------------------------- stores that fall short


def key_of(rag: TransformersConnector, document: str) -> ChunkKey:
    return rag.key_of(rag.encode_document(document))


@pytest.mark.parametrize("place", [0.02, 0.4, 0.7, 1.0], ids=["header", "early layer", "late layer", "last byte"])
@pytest.mark.parametrize("reopen", [False, True], ids=["open", "reopened"])
def test_a_flipped_byte_costs_time_not_the_answer(
    model: PreTrainedModel, tmp_path: Path, reopen: bool, place: float
) -> None:
    blender = Blender(recompute_ratio=0.3)
    rag = connect(model, DiskTier(tmp_path), blender=blender)
    rag.precompute(DOCUMENTS)
    expected, answer = fused(rag), rag.answer(DOCUMENTS, QUESTION, max_new_tokens=10)
    if reopen:
        rag.store.close()
    key = key_of(rag, DOCUMENTS[2])
    flip(tmp_path, key, int(place * (stored_at(tmp_path, key)[2] - 1)))
    if reopen:
        rag = connect(model, DiskTier(tmp_path), blender=blender)
    assert rag.answer(DOCUMENTS, QUESTION, max_new_tokens=10) == answer
    assert rag.store.stats().tiers[0].corruptions == 1
    assert same(fused(rag), expected)
    assert rag.store.stats().tiers[0].corruptions == 1  # stored again, sound
    assert rag.store.check() == []
    rag.store.close()


def test_a_lost_chunk_costs_time_not_the_answer(model: PreTrainedModel, tmp_path: Path) -> None:
    rag = connect(model, DiskTier(tmp_path), blender=Blender(0.3))
    rag.precompute(DOCUMENTS)
    expected = fused(rag)
    for document in DOCUMENTS[1:3]:
        assert rag.store.delete(key_of(rag, document))
    assert same(fused(rag), expected)
    assert all(key_of(rag, document) in rag.store for document in DOCUMENTS)
    rag.store.close()


def test_all_chunks_corrupt(model: PreTrainedModel, tmp_path: Path) -> None:
    rag = connect(model, DiskTier(tmp_path), blender=Blender(0.3))
    rag.precompute(DOCUMENTS)
    expected = fused(rag)
    for document in DOCUMENTS:
        key = key_of(rag, document)
        overwrite(tmp_path, key, b"\xa5" * stored_at(tmp_path, key)[2])
    assert same(fused(rag), expected)
    assert rag.store.stats().tiers[0].corruptions == len(DOCUMENTS)
    rag.store.close()


class LayerFaults(FaultyTier):
    """From some layer on, chosen chunks cannot be read."""

    lost: frozenset[ChunkKey] = frozenset()
    layer = 0
    how = "absent"

    def get_layers(self, key: ChunkKey, start: int, stop: int) -> EncodedChunk | None:
        if key in self.lost and stop > self.layer:
            if self.how == "absent":
                return None
            if self.how == "stalled":
                self.gate.wait(LONG_S)
            raise device_error(errno.EIO)
        return super().get_layers(key, start, stop)


@pytest.mark.parametrize("how", ["absent", "failing", "stalled"])
@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_a_miss_in_the_middle_of_documents(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, how: str, layer: int, count: int
) -> None:
    """What is lost in a layer is computed again, all of it at once, and the context is that of a sound store."""
    disk, blends, blend = LayerFaults(), [], Blender.blend
    monkeypatch.setattr(Blender, "blend", lambda *args, **options: (blends.append(1), blend(*args, **options))[1])
    with KVStore([disk], timeout_s=0.3 if how == "stalled" else LONG_S) as store:
        rag = TransformersConnector(model, make_tokenizer(bos=True), store, blender=Blender(0.3), model_id="m")
        rag.precompute(DOCUMENTS)
        expected = fused(rag)
        assert model.config.num_hidden_layers == 4 and len(DOCUMENTS) >= count and len(blends) == 1
        disk.how, disk.layer = how, layer
        disk.lost = frozenset(rag.key_of(rag.encode_document(document)) for document in DOCUMENTS[:count])
        disk.gate.clear() if how == "stalled" else None
        asked = store.stats().lookups
        # while the tier stalls it takes no chunks either: what is computed again is held for the request
        assert same(fused(rag), expected)
        assert len(blends) == 3 and store.stats().lookups > asked
        assert sum(store.stats().misses.values()) >= count and not store.stats().pinned
        disk.lost = frozenset()
        disk.heal()
        assert same(fused(rag), expected)
        assert eventually(lambda: store.check() == [])


def test_what_is_computed_anyway_is_not_loaded(model: PreTrainedModel, tmp_path: Path) -> None:
    rag = connect(model, DiskTier(tmp_path), blender=Blender(1.0))
    rag.precompute(DOCUMENTS)
    assert_answers_as_plain(rag)
    assert rag.store.stats().tiers[0].hits == 2  # groups of layers of the first document, which is exact
    rag.store.close()


def test_a_missing_document_is_computed_and_stored(rag: TransformersConnector) -> None:
    rag.precompute(DOCUMENTS[:2])
    assert_answers_as_plain(rag)
    assert rag.precompute(DOCUMENTS) == Precomputed(0, 4, 0)


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_a_store_too_small_for_the_context(model: PreTrainedModel, chunks: int) -> None:
    longest = max(len(connect(model).encode_document(document)) for document in DOCUMENTS)
    rag = connect(model, HostTier(capacity_bytes=int((chunks + 0.5) * longest * connect(model).spec.token_bytes)))
    assert_answers_as_plain(rag)
    assert_answers_as_plain(rag, DOCUMENTS[::-1])
    if chunks == 0:
        with pytest.raises(TierFullError):
            rag.precompute(DOCUMENTS)
    assert rag.store.check() == []


def test_a_request_does_not_evict_what_it_reads(model: PreTrainedModel) -> None:
    rag = connect(model)
    bytes_of = [len(rag.encode_document(document)) * rag.spec.token_bytes for document in DOCUMENTS]
    rag = connect(model, HostTier(capacity_bytes=sum(bytes_of[:2]) + min(bytes_of) // 2))
    rag.precompute(DOCUMENTS[:2])
    assert_answers_as_plain(rag, [DOCUMENTS[3], *DOCUMENTS[:3]])
    stats = rag.store.stats()
    assert stats.tiers[0].evictions == 0 and stats.tiers[0].rejections == 2 and stats.misses == {}


def test_tenants_do_not_meet(model: PreTrainedModel) -> None:
    """A chunk planted under one tenant's key moves that tenant's context and no other's."""
    store = KVStore([HostTier(None)])
    naive = Blender(recompute_ratio=0.0, chooser=no_tokens)
    ours, theirs, again = (
        TransformersConnector(model, make_tokenizer(bos=True), store, blender=naive, model_id="m", salt=salt)
        for salt in (b"us", b"them", b"us")
    )
    ours.precompute(DOCUMENTS)
    assert theirs.precompute(DOCUMENTS).computed == len(DOCUMENTS) and again.precompute(DOCUMENTS).computed == 0
    expected = fused(ours)
    ids = theirs.encode_document(DOCUMENTS[1])
    chunk = theirs.compute([ids])[0]
    store.put(theirs.key_of(ids), KVChunk(chunk.spec, chunk.token_ids, chunk.positions, chunk.keys, -chunk.values))
    assert same(fused(ours), expected) and same(fused(again), expected)
    assert not same(fused(theirs), expected)


def test_threads_assemble_at_once(model: PreTrainedModel, tmp_path: Path) -> None:
    rag = connect(model, HostTier(capacity_bytes=40_000), DiskTier(tmp_path), blender=Blender(recompute_ratio=0.4))
    orders = [DOCUMENTS, DOCUMENTS[::-1], DOCUMENTS[1:], [DOCUMENTS[2], DOCUMENTS[0]]]
    expected = [fused(connect(model, blender=rag.blender), order) for order in orders]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for found, truth in zip(pool.map(lambda order: fused(rag, order), orders), expected, strict=True):
                assert same(found, truth)
    assert rag.store.check() == []
    rag.store.close()


# -------------------------------------------------------------------------------------------------- wrong input


def assert_one_line(error: BaseException) -> None:
    assert isinstance(error, KVLoomError | ValueError) and str(error) and "\n" not in str(error)


LONG = "the same words again and again " * 200


@pytest.mark.parametrize(
    ("documents", "question", "words"),
    [
        ([], QUESTION, "documents is empty"),
        (["", DOCUMENTS[0]], QUESTION, r"documents\[0\] is empty"),
        ([DOCUMENTS[0], " \n "], QUESTION, r"documents\[1\] is empty"),
        (DOCUMENTS, "", "question is empty"),
        ([DOCUMENTS[0], LONG], QUESTION, "context 512; split it"),
        (DOCUMENTS * 5, QUESTION, "context 512; give fewer"),
    ],
    ids=["no documents", "empty document", "blank document", "no question", "long document", "too many"],
)
def test_refuses_what_cannot_be_asked(
    rag: TransformersConnector, documents: Sequence[str], question: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        rag.assemble(documents, question)
    assert_one_line(caught.value)
    assert rag.store.stats().tiers[0].puts == 0


@pytest.mark.parametrize("documents", [[], [DOCUMENTS[0], ""], [DOCUMENTS[0], LONG]], ids=["none", "empty", "long"])
def test_precompute_refuses_and_stores_nothing(rag: TransformersConnector, documents: Sequence[str]) -> None:
    with pytest.raises(ValueError, match="document") as caught:
        rag.precompute(documents)
    assert_one_line(caught.value)
    assert rag.store.stats().tiers[0].puts == 0


def test_refuses_a_pack_of_nothing(model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="pack_tokens is 0"):
        connect(model, pack_tokens=0)


@pytest.mark.parametrize(
    ("refused", "words"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)), "gpt2"),
    ],
    ids=["gpt2"],
)
def test_refuses_models_that_cannot_be_fused(refused: object, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        connect(refused())
    assert_one_line(caught.value)
