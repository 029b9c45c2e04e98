"""`kvloom certify --fusion`: which ratio is certified, what is measured, and for whom it speaks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.blend.choosers import CHOOSERS
from kvloom.blend.correction import BIASES, PLACES, WEIGHTS
from kvloom.blend.method import EXACT, FUSION, FusionMethod, certified_fusion
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.certificate_gate import CertificateGate
from kvloom.calibration.model_profile import Profile
from kvloom.certify.fusion import smallest_passing
from kvloom.certify.fusion_method import methods_at_cost, question_ratio_of, try_methods
from kvloom.connectors.hf.model import TransformersModel
from kvloom.connectors.identity.weights import folder_name
from kvloom.core import KVSpec, RopeSpec
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.models import load_model
from kvloom.evaluation.placed import FusionBed
from kvloom.evaluation.questions import QuestionSampler

from .test_certify import run

BY_QUESTION = ("--select", "first+question")
SPEC = KVSpec("model", 2, 2, 8, torch.float32, RopeSpec((1.0, 0.5, 0.25, 0.1)))
PASSED, FAILED = Figure(0.0, -0.01, 0.01, "share", 0.05), Figure(0.0, -0.1, 0.1, "share", 0.05)


@pytest.mark.parametrize(
    ("passed", "index"),
    [("yyyy", 0), ("nyyy", 1), ("nnny", 3), ("nnnn", 3), ("ynyy", 2), ("yyyn", 3), ("y", 0)],
)
def test_ratios_are_judged_from_the_largest_down(passed: str, index: int) -> None:
    """A small one that passes by luck, below one that does not, is not certified."""
    assert smallest_passing([letter == "y" for letter in passed]) == index


def permitted(*certificates: Certificate, spec: KVSpec = SPEC, check_layer: int | None = None) -> float:
    return (certified_fusion(CertificateGate(certificates), spec, check_layer=check_layer) or EXACT).ratio


def test_what_a_certificate_permits() -> None:
    good = Certificate(SPEC, FUSION, FusionMethod(0.15).parameters, {"alias_loss": PASSED})
    assert permitted() == 1.0
    assert permitted(good) == permitted(Certificate.from_json(good.to_json())) == 0.15
    assert permitted(good, check_layer=1) == 1.0, "tokens chosen elsewhere are other tokens"
    assert permitted(good, spec=replace(SPEC, num_kv_heads=SPEC.num_kv_heads // 2, shard=(1, 2))) == 0.15
    assert permitted(good, spec=replace(SPEC, model_id="another")) == 1.0
    for other in (
        {"figures": {"alias_loss": FAILED}},
        {"figures": {}},
        {"codec": "nuq4"},
        {"parameters": {**good.parameters, "select": "random"}},
        {"parameters": {**good.parameters, "ratio": [0.15]}},
        {"parameters": {**good.parameters, "ratio": 1.5}},
        {"parameters": {**good.parameters, "check_layer": 1.5}},
        {"parameters": {**good.parameters, "more": 1}},
    ):
        assert permitted(replace(good, **other)) == 1.0
        assert permitted(replace(good, **other), good, replace(good, parameters=FusionMethod(0.3).parameters)) == 0.15


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Three trials prove nothing within 5 points; with a limit that they can prove, the smallest ratio is written."""
    out = tmp_path / "fusion.json"
    small = (
        "--trials",
        3,
        "--context-tokens",
        256,
        "--tasks",
        "needle",
        "--ratios",
        "0.2,0.6",
        "--select",
        "first+question",
    )
    assert run("certify", "reference", "--fusion", *small, *BY_QUESTION, "-o", out) == 1
    assert not Certificate.load(out).passed
    assert run("certify", "reference", "--fusion", *small, *BY_QUESTION, "-o", out, "--max-task-loss", 1.0) == 0
    certificate = Certificate.load(out)
    assert permitted(certificate, spec=certificate.spec) == 0.2
    assert certificate.model_id == folder_name(BUNDLED_MODEL), "as a server of the folder has it"
    assert set(json.loads(out.read_text())["conditions"]["losses"]) == {"0.2", "0.6"}
    assert certificate.parameters == FusionMethod(0.2, "first+question").parameters
    assert run("certify", "reference", "--fusion", "--codec", "raw") == 2
    assert run("certify", "reference", "--fusion", "--select", "guess") == 2
    assert run("certify", "reference", "--fusion", "--ratios", "1.5") == 2


@pytest.mark.slow
def test_the_command_with_a_correction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = TransformersModel(load_model(None)[0], model_id=folder_name(BUNDLED_MODEL))
    spec = layers.spec
    width, heads = spec.head_dim + spec.value_dim, (spec.num_layers, spec.num_kv_heads)
    tensors = {WEIGHTS: torch.zeros(*heads, width, width), BIASES: torch.zeros(*heads, PLACES, width)}
    profile, out, bare = Profile(spec, tensors), tmp_path / "fusion.json", tmp_path / "bare.safetensors"
    profile.save(tmp_path / "profile.safetensors")
    Profile(spec, {}).save(bare)
    small = ("--trials", 2, "--context-tokens", 256, "--tasks", "needle", "--ratios", "0.5", "--max-task-loss", 1.0)
    asked = ("certify", "reference", "--fusion", *small, "--select", "deviation", "-o", out)
    assert run(*asked, "--profile", tmp_path / "profile.safetensors") == 0
    expected = FusionMethod(0.5, "deviation", correction=profile.fingerprint)
    assert Certificate.load(out).parameters == expected.parameters
    capsys.readouterr()
    assert run(*asked, "--profile", bare) == 2
    assert "holds no correction; make it anew with `kvloom calibrate`" in capsys.readouterr().err


def test_tokens_are_chosen_once() -> None:
    blender = FusionMethod(0.3, "question", 3).blender
    assert (blender.chooser, blender.check_layer) == (CHOOSERS["question"], 3)
    assert {blender.layer_ratio(layer, 12) for layer in range(1, 11)} == {0.3}


def test_methods_at_equal_cost() -> None:
    """Of 30 layers, CacheBlend at 15 % computes one for all tokens, and none of the last."""
    published = FusionMethod(0.15, "deviation", 1).cost_ratio(30)
    assert published == pytest.approx((1 + 0.15 * 28) / 30)
    later = FusionMethod(0.5, "deviation", 3).at_cost(published, 30)
    assert later is not None and later.cost_ratio(30) == pytest.approx(published, abs=1e-3) and later.ratio < 0.1
    asked = FusionMethod(0.5, "question").at_cost(published, 30, question_ratio=0.02)
    assert asked is not None and asked.cost_ratio(30, question_ratio=0.02) == pytest.approx(published, abs=1e-3)
    assert FusionMethod(0.5, "deviation", 6).at_cost(published, 30) is None, "six full layers cost more alone"


@pytest.mark.slow
def test_the_method_that_suits_the_bundled_model() -> None:
    """It binds by keys of layer 2: who looks earlier closes nothing of an alias's gap, the question all of it."""
    model, tokenizer = load_model(None)
    bed = FusionBed(model)
    questions = QuestionSampler(tokenizer, split="tune", context_tokens=512).contexts("alias", 4)
    methods = [FusionMethod(0.15, "deviation", 1), FusionMethod(0.1, "question"), FusionMethod(0.15, "deviation", 2)]
    tried = try_methods(bed, {"alias": questions}, methods)
    closed = {one.method: one.closed["alias"] for one in tried}
    assert closed[methods[1]] > 0.9 and closed[methods[2]] > 0.7 > closed[methods[0]]
    assert tried[0].mean_closed == max(closed.values())
    ratio = question_ratio_of(questions)
    cost = FusionMethod(0.15, "deviation", 1).cost_ratio(30)
    menu = methods_at_cost(cost, 30, question_ratio=ratio)
    assert {(one.select, one.check_layer) for one in menu} >= {("deviation", 2), ("values", 1), ("first+question", 1)}
    assert all(one.cost_ratio(30, question_ratio=ratio) == pytest.approx(cost, abs=1e-3) for one in menu)
