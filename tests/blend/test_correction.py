"""Corrections of documents that were computed alone: what they do, what they leave alone, whom they serve."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import pytest
import torch
from torch import Tensor

from kvloom.blend.blender import Blender
from kvloom.blend.choosers import CHOOSERS
from kvloom.blend.correction import BIASES, PLACES, WEIGHTS, Correction, place_of
from kvloom.blend.method import FUSION, FusionMethod, certified_fusion
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.certificate_gate import CertificateGate
from kvloom.calibration.model_profile import Profile
from kvloom.certify.correction_fit import document_contexts, fit_correction, learn_correction
from kvloom.connectors.hf.model import TransformersModel
from kvloom.connectors.hf.prefill import Prefill
from kvloom.connectors.identity.requests import lead_of, natural_lead
from kvloom.core import KVSpec
from kvloom.errors import SpecMismatchError
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.models import load_model
from kvloom.evaluation.passages import CHECK, TUNE, load_heldout
from kvloom.evaluation.windows import token_windows

from ..support.models import VARIANTS, make_model, make_variant
from .test_blender import make_case, random_chunks

MODEL = TransformersModel(make_model("llama"), model_id="m")
SPEC = MODEL.spec
BUNDLED = TransformersModel(load_model(BUNDLED_MODEL)[0], model_id="m")


def make_tensors(spec: KVSpec = SPEC, *, seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    width, shape = spec.head_dim + spec.value_dim, (spec.num_layers, spec.num_kv_heads)
    found = {
        WEIGHTS: 0.1 * torch.randn(*shape, width, width, generator=drawn),
        BIASES: 0.1 * torch.randn(*shape, PLACES, width, generator=drawn),
    }
    for tensor in found.values():
        tensor[0] = 0.0
    return found


def make_correction(spec: KVSpec = SPEC) -> Correction:
    found = Correction.from_profile(Profile(spec, make_tensors(spec)))
    assert found is not None
    return found


def test_places_of_tokens() -> None:
    assert place_of(torch.tensor([0, 1, 2, 3, 4, 255, 256, 9000])).tolist() == [0, 1, 2, 2, 3, 8, 9, 9]
    assert int(place_of(torch.tensor([10**6]))) == PLACES - 1


def test_it_adds_what_the_map_says_before_rotation() -> None:
    correction, tensors = make_correction(), make_tensors()
    drawn = torch.Generator().manual_seed(1)
    shape = (SPEC.num_layers, SPEC.num_kv_heads, 5)
    plain = torch.randn(*shape, SPEC.head_dim, generator=drawn)
    values = torch.randn(*shape, SPEC.value_dim, generator=drawn)
    positions, offsets = torch.arange(30, 35), torch.arange(5)
    keys, new = correction.apply(SPEC.shift(plain, positions), values, positions, offsets)
    for layer in range(SPEC.num_layers):
        for head in range(SPEC.num_kv_heads):
            for token in range(5):
                given = torch.cat((plain[layer, head, token], values[layer, head, token]))
                change = given @ tensors[WEIGHTS][layer, head] + tensors[BIASES][layer, head, place_of(offsets[token])]
                of_key, of_value = change.split((SPEC.head_dim, SPEC.value_dim))
                moved = SPEC.shift((plain[layer, head, token] + of_key)[None, None, None], positions[token : token + 1])
                assert torch.allclose(keys[layer, head, token], moved[0, 0, 0], atol=1e-5)
                assert torch.allclose(new[layer, head, token], values[layer, head, token] + of_value, atol=1e-5)
    one, other = correction.apply(keys[2:3], new[2:3], positions, offsets, first_layer=2)
    whole = correction.apply(keys, new, positions, offsets)
    assert torch.equal(one[0], whole[0][2]) and torch.equal(other[0], whole[1][2])
    first = correction.apply(keys[:1], new[:1], positions, offsets)
    assert first[0] is not None and torch.equal(first[0], keys[:1]) and torch.equal(first[1], new[:1])


def test_precision_is_that_of_the_cache() -> None:
    keys = torch.randn(SPEC.num_layers, SPEC.num_kv_heads, 3, SPEC.head_dim, dtype=torch.bfloat16)
    found = make_correction().apply(keys, keys.clone(), torch.arange(3), torch.arange(3))
    assert [each.dtype for each in found] == [torch.bfloat16] * 2


def test_maps_are_copied_to_a_device_once() -> None:
    correction, keys = make_correction(), torch.randn(SPEC.num_layers, SPEC.num_kv_heads, 3, SPEC.head_dim)
    device = torch.device("meta")
    assert correction._maps(device)[0].device == device and correction._maps(device)[0] is correction._maps(device)[0]
    before = correction.apply(keys, keys, torch.arange(3), torch.arange(3))
    other = replace(correction, weights=2.0 * correction.weights)
    after = other.apply(keys, keys, torch.arange(3), torch.arange(3))
    assert not torch.allclose(before[0], after[0], atol=1e-3), "another correction has maps of its own"


def test_a_rank_corrects_its_own_heads() -> None:
    profile, whole = Profile(SPEC, make_tensors()), make_correction()
    keys = torch.randn(SPEC.num_layers, SPEC.num_kv_heads, 4, SPEC.head_dim)
    expected = whole.apply(keys, keys, torch.arange(4), torch.arange(4))
    for rank in range(2):
        of_rank = Correction.from_profile(profile, replace(SPEC, num_kv_heads=1, shard=(rank, 2)))
        assert of_rank is not None and of_rank.fingerprint == whole.fingerprint
        mine = keys[:, rank : rank + 1]
        for found, of_all in zip(of_rank.apply(mine, mine, torch.arange(4), torch.arange(4)), expected, strict=True):
            assert torch.allclose(found, of_all[:, rank : rank + 1], atol=1e-6)


def test_profiles_without_one_and_of_other_models() -> None:
    assert Correction.from_profile(Profile(SPEC, {})) is None
    with pytest.raises(SpecMismatchError, match="was made for m"):
        Correction.from_profile(Profile(SPEC, make_tensors()), replace(SPEC, model_id="other"))


# ----------------------------------------------------------------------------------------------------------- fusion


def test_a_fusion_that_computes_everything_is_exact_all_the_same() -> None:
    case = make_case(make_model("llama"))
    plain, corrected = (case.blend(Blender(1.0, correction=each)) for each in (None, make_correction(case.model.spec)))
    assert torch.equal(plain.keys, corrected.keys) and torch.equal(plain.values, corrected.values)


def test_what_is_exact_stays_and_the_rest_is_corrected() -> None:
    case = make_case(make_model("llama"))
    correction, exact = make_correction(case.model.spec), case.exact_tokens
    context = case.blend(Blender(0.0, CHOOSERS["none"], correction=correction))
    assert torch.equal(context.keys[:, :, :exact], case.naive.keys[:, :, :exact])
    positions = torch.arange(len(case.token_ids))
    starts = torch.tensor(case.starts)
    offsets = positions - starts[torch.searchsorted(starts, positions, right=True) - 1]
    behind = slice(exact, None)
    keys, values = correction.apply(
        case.naive.keys[:, :, behind], case.naive.values[:, :, behind], positions[behind], offsets[behind]
    )
    assert torch.allclose(context.keys[:, :, behind], keys, atol=1e-6)
    assert torch.allclose(context.values[:, :, behind], values, atol=1e-6)
    assert not torch.allclose(context.keys[1:, :, behind], case.naive.keys[1:, :, behind], atol=1e-2)


def test_a_correction_of_another_model_is_refused() -> None:
    """Its shapes fit: nothing else would tell."""
    case = make_case(make_model("llama"))
    other = make_correction(replace(case.model.spec, model_id="other"))
    with pytest.raises(SpecMismatchError, match="was fitted to other, the model is m; make a profile"):
        case.blend(Blender(0.2, correction=other))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="correction is a str"):
        Blender(correction="x")  # type: ignore[arg-type]
    correction = make_correction()
    with pytest.raises(ValueError, match="the method's correction is None"):
        FusionMethod(0.2).blender_with(correction)
    with pytest.raises(ValueError, match="the one given None"):
        _ = FusionMethod(0.2, correction=correction.fingerprint).blender
    with pytest.raises(ValueError, match="at least two documents"):
        fit_correction(MODEL, [[[5, 6, 7]]], lead_ids=[0])


def test_certificates_name_it() -> None:
    correction = make_correction()
    plain, corrected = FusionMethod(0.3), FusionMethod(0.1, correction=correction.fingerprint)
    assert "correction" not in plain.parameters and corrected.parameters["correction"] == correction.fingerprint
    assert corrected.blender_with(correction).correction is correction
    made = tuple(
        Certificate(SPEC, FUSION, method.parameters, {"record_loss": Figure(0.0, 0.0, 0.01, "", 0.05)})
        for method in (plain, corrected)
    )
    gate = CertificateGate(made)
    assert certified_fusion(gate, SPEC) == plain, "the correction is not at hand"
    assert certified_fusion(gate, SPEC, correction="another") == plain
    assert certified_fusion(gate, SPEC, correction=correction.fingerprint) == corrected


# -------------------------------------------------------------------------------------------------------------- fit


def test_contexts_hold_documents_of_different_windows() -> None:
    windows = [list(range(1000 * n, 1000 * n + 900)) for n in range(4)]
    contexts = document_contexts(windows)
    assert len(contexts) == 4 and contexts == document_contexts(windows) != document_contexts(windows, seed=1)
    pieces = [piece for documents in contexts for piece in documents]
    found = sorted(chain.from_iterable(pieces))
    assert len(found) == len(set(found)) > 0.8 * 3600 and max(map(len, pieces)) <= 384
    assert any(len({piece[0] // 1000 for piece in documents}) > 1 for documents in contexts)
    assert document_contexts([[1] * 70]) == [], "no second document"


def test_it_is_learned_behind_the_lead_of_windows() -> None:
    _, tokenizer = load_model(BUNDLED_MODEL)
    windows = token_windows(tokenizer, ["\n".join(load_heldout(TUNE))], sequences=2, tokens=300)
    lead = len(lead_of(tokenizer))
    assert lead and all(window[:lead] == list(lead_of(tokenizer)) for window in windows)
    told: list[int] = []
    found = learn_correction(BUNDLED, tokenizer, windows, advance=told.append)
    assert sum(told) == sum(map(len, windows))
    contexts = document_contexts([window[lead:] for window in windows])
    expected = fit_correction(BUNDLED, contexts, lead_ids=natural_lead(tokenizer))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    told.clear()
    assert learn_correction(BUNDLED, tokenizer, [windows[0][:80]], advance=told.append) == {} and sum(told) == 80


def off(model: TransformersModel, documents: Sequence[Sequence[int]], correction: Correction | None) -> float:
    """Squared distance of the second and later documents to what they are in their context."""
    lead = [0]
    prefill = Prefill(model, lead_ids=lead, pack_tokens=1)
    whole = prefill.alone([*lead, *chain.from_iterable(documents)])
    starts = list(accumulate(map(len, documents), initial=len(lead)))
    found = 0.0
    for start, chunk in list(zip(starts, prefill.behind_lead(documents), strict=False))[1:]:
        positions = torch.arange(start, start + len(chunk))
        keys, values = model.spec.shift(chunk.keys, positions - chunk.positions), chunk.values
        if correction is not None:
            keys, values = correction.apply(keys, values, positions, torch.arange(len(chunk)))
        place = slice(start, start + len(chunk))
        found += float((keys - whole.keys[:, :, place]).square().sum())
        found += float((values - whole.values[:, :, place]).square().sum())
    return found


def test_a_fit_brings_other_texts_nearer_to_their_context() -> None:
    layers, (_, tokenizer) = BUNDLED, load_model(BUNDLED_MODEL)
    told: list[int] = []
    learned, other = (
        document_contexts([w[1:] for w in token_windows(tokenizer, ["\n".join(load_heldout(split))], sequences=4)])
        for split in (TUNE, CHECK)
    )
    tensors = fit_correction(layers, learned, lead_ids=[0], advance=told.append)
    assert told == [sum(map(len, documents)) for documents in learned]
    assert not tensors[WEIGHTS][0].any() and not tensors[BIASES][0].any()
    correction = Correction.from_profile(Profile(layers.spec, tensors))
    before, after = (off(layers, other[0], each) for each in (None, correction))
    assert after < 0.9 * before


def test_keys_are_moved_half_way() -> None:
    contexts = [random_chunks(), random_chunks(seed=4)]
    half, whole = (
        fit_correction(MODEL, contexts, lead_ids=[0]),
        fit_correction(MODEL, contexts, lead_ids=[0], keys_ratio=1.0),
    )
    for name in (WEIGHTS, BIASES):
        keys, values = half[name].split((SPEC.head_dim, SPEC.value_dim), dim=-1)
        all_keys, all_values = whole[name].split((SPEC.head_dim, SPEC.value_dim), dim=-1)
        assert bool(all_keys[1:].any()) and torch.equal(keys, 0.5 * all_keys) and torch.equal(values, all_values)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_fit_to_every_kind_of_layer(variant: str) -> None:
    model = TransformersModel(make_variant(variant), model_id="m")
    tensors = fit_correction(model, [random_chunks(), random_chunks(seed=4)], lead_ids=[0])
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
    spec = model.spec
    keys, values = (
        torch.randn(spec.num_layers, spec.num_kv_heads, 3, width) for width in (spec.head_dim, spec.value_dim)
    )
    correction = Correction.from_profile(Profile(model.spec, tensors))
    assert correction is not None
    found = correction.apply(keys, values, torch.arange(3), torch.arange(3))
    assert found[0].shape == keys.shape and found[1].shape == values.shape
