"""`kvloom certify --fusion`: which ratio is certified, what is measured, and for whom it speaks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.blend.certified_ratio import FUSION, certified_ratio, choosing_once, parameters_of_fusion
from kvloom.calibration.certificate import Certificate, Figure
from kvloom.calibration.certificate_gate import CertificateGate
from kvloom.certify.fusion import smallest_passing
from kvloom.connectors.identity.weights import folder_name
from kvloom.core import KVSpec, RopeSpec
from kvloom.evaluation.environment import BUNDLED_MODEL

from .test_certify import run

SPEC = KVSpec("model", 2, 2, 8, torch.float32, RopeSpec((1.0, 0.5, 0.25, 0.1)))
PASSED, FAILED = Figure(0.0, -0.01, 0.01, "share", 0.05), Figure(0.0, -0.1, 0.1, "share", 0.05)


@pytest.mark.parametrize(
    ("passed", "index"),
    [("yyyy", 0), ("nyyy", 1), ("nnny", 3), ("nnnn", 3), ("ynyy", 2), ("yyyn", 3), ("y", 0)],
)
def test_ratios_are_judged_from_the_largest_down(passed: str, index: int) -> None:
    """A small one that passes by luck, below one that does not, is not certified."""
    assert smallest_passing([letter == "y" for letter in passed]) == index


def permitted(*certificates: Certificate, spec: KVSpec = SPEC, check_layer: int = 1) -> float:
    return certified_ratio(CertificateGate(certificates), spec, check_layer=check_layer)


def test_what_a_certificate_permits() -> None:
    good = Certificate(SPEC, FUSION, parameters_of_fusion(0.15), {"alias_loss": PASSED})
    assert permitted() == 1.0
    assert permitted(good) == permitted(Certificate.from_json(good.to_json())) == 0.15
    assert permitted(good, check_layer=2) == 1.0, "tokens chosen elsewhere are other tokens"
    assert permitted(good, spec=replace(SPEC, num_kv_heads=SPEC.num_kv_heads // 2, shard=(1, 2))) == 0.15
    assert permitted(good, spec=replace(SPEC, model_id="another")) == 1.0
    for other in (
        {"figures": {"alias_loss": FAILED}},
        {"figures": {}},
        {"codec": "nuq4"},
        {"parameters": {**good.parameters, "select": "random"}},
        {"parameters": {**good.parameters, "ratio": [0.15]}},
        {"parameters": {**good.parameters, "ratio": 1.5}},
    ):
        assert permitted(replace(good, **other)) == 1.0
        assert permitted(replace(good, **other), good, replace(good, parameters=parameters_of_fusion(0.3))) == 0.15


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    """Three trials prove nothing within 5 points; with a limit that they can prove, the smallest ratio is written."""
    out = tmp_path / "fusion.json"
    small = ("--trials", 3, "--context-tokens", 256, "--tasks", "needle", "--ratios", "0.2,0.6")
    assert run("certify", "reference", "--fusion", *small, "-o", out) == 1
    assert not Certificate.load(out).passed
    assert run("certify", "reference", "--fusion", *small, "-o", out, "--max-task-loss", 1.0) == 0
    certificate = Certificate.load(out)
    assert permitted(certificate, spec=certificate.spec) == 0.2
    assert certificate.model_id == folder_name(BUNDLED_MODEL), "as a server of the folder has it"
    assert set(json.loads(out.read_text())["conditions"]["losses"]) == {"0.2", "0.6"}
    assert run("certify", "reference", "--fusion", "--codec", "raw") == 2
    assert run("certify", "reference", "--fusion", "--ratios", "1.5") == 2


def test_tokens_are_chosen_once() -> None:
    blender = choosing_once(0.3)
    assert {blender.layer_ratio(layer, 12) for layer in range(1, 11)} == {0.3}
