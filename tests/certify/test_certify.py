"""`kvloom certify`: losses of approximate keys and values, against independent ways of computing them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from kvloom import cli
from kvloom.calibration.certificate import Certificate
from kvloom.compress.raw import RawCodec
from kvloom.compress.registry import CODECS
from kvloom.core import KVChunk
from kvloom.errors import UncertifiedError
from kvloom.evaluation.forcing import Approximation, ForcedModel, split, through_codec
from kvloom.evaluation.fused_answers import kl_divergence
from kvloom.evaluation.intervals import paired_share_difference
from kvloom.evaluation.models import load_model
from kvloom.evaluation.quality import Limits, Measurement, Trial, measure, task_trials
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.lossy import CoarseCodec
from ..support.models import make_model, make_tokenizer, make_variant, prefill

IDS = torch.tensor([0, *range(40, 100)])
COARSE = CoarseCodec(1 / 8)


class CoarseCache(DynamicCache):
    """What attention sees of keys and values is rounded, of all tokens."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        rounded = [(t / COARSE.step).round() * COARSE.step for t in (key_states, value_states)]
        found: tuple[Tensor, Tensor] = super().update(*rounded, *args, **kwargs)
        return found


def zeroed(chunk: KVChunk) -> KVChunk:
    return KVChunk(chunk.spec, chunk.token_ids, chunk.positions, chunk.keys * 0, chunk.values * 0, chunk.first_layer)


ZEROS = Approximation("zeros", {}, zeroed)


@pytest.mark.parametrize("name", ["llama", "qwen3", "window"])
def test_forced_is_the_model_with_every_key_and_value_rounded(name: str) -> None:
    model = make_variant(name) if name == "window" else make_model(name)
    forced = ForcedModel(model, model_id="m")
    with torch.no_grad():
        true = model(IDS[None], past_key_values=CoarseCache()).logits[0]
    found = forced.logits(forced.forced(IDS, through_codec(COARSE, chunk_tokens=16)))
    exact = prefill(model, IDS.tolist()).logits
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    assert float((found - exact).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen3", "window"])
def test_continued_is_the_model_behind_a_cache(name: str) -> None:
    model = make_variant(name) if name == "window" else make_model(name)
    forced = ForcedModel(model, model_id="m")
    prefix, _ = forced.prefill(IDS[:40])
    changed = through_codec(COARSE).approximate(prefix)
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(zip(changed.keys, changed.values, strict=True)):
        cache.update(keys[None], values[None], layer)
    with torch.no_grad():
        true = model(IDS[None, 40:], past_key_values=cache).logits[0]
    torch.testing.assert_close(forced.logits(forced.continued(changed, IDS[40:])), true, rtol=1e-4, atol=1e-4)


def test_compare_gives_losses_and_divergences() -> None:
    model = make_model("llama")
    forced = ForcedModel(model, model_id="m")
    exact, other = forced.prefill(IDS[:-1])[1], forced.forced(IDS[:-1], through_codec(COARSE))
    p, q = (forced.logits(hidden) for hidden in (exact, other))
    exact_loss, other_loss, kl = forced.compare(exact, other, IDS[1:])
    torch.testing.assert_close(exact_loss, torch.nn.functional.cross_entropy(p.double(), IDS[1:], reduction="none"))
    torch.testing.assert_close(other_loss, torch.nn.functional.cross_entropy(q.double(), IDS[1:], reduction="none"))
    assert kl.tolist() == pytest.approx([kl_divergence(a, b) for a, b in zip(p, q, strict=True)], abs=1e-12)


def test_split_is_a_partition() -> None:
    chunk, _ = ForcedModel(make_model("llama"), model_id="m").prefill(IDS)
    pieces = split(chunk, 25)
    assert [len(piece) for piece in pieces] == [25, 25, 11]
    assert torch.equal(torch.cat([piece.keys for piece in pieces], 2), chunk.keys)
    assert torch.equal(torch.cat([piece.positions for piece in pieces]), chunk.positions)


def windows(count: int = 6) -> list[list[int]]:
    random = torch.Generator().manual_seed(5)
    return [[0, *torch.randint(1, 500, (40,), generator=random).tolist()] for _ in range(count)]


@pytest.fixture(scope="module")
def measured() -> list[Measurement]:
    ways = [through_codec(codec) for codec in (RawCodec(), CoarseCodec(1 / 16), CoarseCodec(1 / 4))]
    return measure(ForcedModel(make_model("llama"), model_id="m"), ways, windows=windows())


def test_what_loses_nothing_measures_nothing(measured: Sequence[Measurement]) -> None:
    figures = measured[0].figures()
    assert set(figures) == {"perplexity_increase", "kl", "prefix_perplexity_increase", "prefix_kl"}
    assert all((f.value, f.low, f.high, f.passed) == (0.0, 0.0, 0.0, True) for f in figures.values())


def test_what_loses_more_measures_more(measured: Sequence[Measurement]) -> None:
    fine, rough = (one.figures() for one in measured[1:])
    for name in ("kl", "prefix_kl"):
        assert 0 < fine[name].low <= fine[name].value <= fine[name].high < rough[name].value
        assert fine[name].limit == 0.1
    limits = Limits(kl=0.05)
    assert measured[1].figures(limits)["kl"].passed and not measured[2].figures(limits)["kl"].passed
    assert rough["kl"].value > rough["prefix_kl"].value  # more is approximate


def test_a_way_that_is_not_layerwise_is_measured_behind_a_prefix() -> None:
    forced = ForcedModel(make_model("llama"), model_id="m")
    approximation = Approximation("blend", {}, zeroed, is_layerwise=False)
    (found,) = measure(forced, [approximation], windows=windows(2))
    assert set(found.figures()) == {"prefix_perplexity_increase", "prefix_kl"} and found.figures()["prefix_kl"].low > 0
    with pytest.raises(ValueError, match="blend cannot be applied layer by layer"):
        forced.forced(IDS, approximation)


# --------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([True] * 3, [True] * 3, (0.0, -0.392, 0.392)),
        ([True] * 100, [True] * 100, (0.0, -0.0192, 0.0192)),
        ([True] * 100, [True] * 90 + [False] * 10, (0.1, 0.0372, 0.1589)),
        ([False, True], [True, False], (0.0, -0.849, 0.849)),
    ],
)
def test_paired_shares(a: list[bool], b: list[bool], expected: tuple[float, float, float]) -> None:
    assert paired_share_difference(a, b) == pytest.approx(expected, abs=5e-4)
    value, low, high = paired_share_difference(b, a)
    assert (-value, -high, -low) == pytest.approx(paired_share_difference(a, b))


def test_paired_shares_refuse_other_trials() -> None:
    for a, b in (([], []), ([True], [True, False])):
        with pytest.raises(ValueError, match="expected the same number"):
            paired_share_difference(a, b)


def test_an_answer_is_what_greedy_decoding_gives() -> None:
    model = make_model("llama")
    forced = ForcedModel(model, model_id="m")
    context, question = IDS[:40], IDS[40:45]
    whole = model.generate(IDS[None, :45], max_new_tokens=3, do_sample=False)[0, 45:]
    wrong = torch.cat((whole[:2], (whole[2:] + 1) % 500))
    for answer, right in ((whole, True), (wrong, False), (whole[:1], True)):
        (found,) = measure(forced, [ZEROS], trials={"own": [Trial(context, question, answer)]})
        assert found.right["own"][0][0] is right


def test_tasks_that_the_model_does_not_know_are_left_out() -> None:
    forced, tokenizer = ForcedModel(make_model("llama"), model_id="m"), make_tokenizer(bos=True)
    trials = {"needle": task_trials(tokenizer, "needle", count=3, context_tokens=300)}
    assert trials["needle"][0].context[0] == 0 and len(trials["needle"][0].answer) > 1
    (found,) = measure(forced, [ZEROS], trials=trials, skip_unknown=True)
    assert found.right == {} and found.skipped == {"needle": 0.0} and found.figures() == {}
    (found,) = measure(forced, [ZEROS], trials=trials)
    assert found.right["needle"] == [(False, False)] * 3 and found.skipped == {}


@pytest.fixture(scope="module")
def bundled() -> tuple[PreTrainedModel, ForcedModel]:
    model, _ = load_model(None)
    return model, ForcedModel(model, model_id="reference")


def test_the_reference_model_knows_its_tasks_and_needs_its_cache(bundled: tuple[PreTrainedModel, ForcedModel]) -> None:
    _, tokenizer = load_model(None)
    trials = {"needle": task_trials(tokenizer, "needle", count=4, context_tokens=300)}
    found = measure(bundled[1], [through_codec(RawCodec()), ZEROS], trials=trials, skip_unknown=True)
    assert found[0].right["needle"] == [(True, True)] * 4
    assert found[1].right["needle"] == [(True, False)] * 4
    figure = found[1].figures()["needle_loss"]
    assert figure.value == 1.0 and figure.low > 0.1 and not figure.passed


# -------------------------------------------------------------------------------------------------- command line


def run(*args: object) -> int:
    with pytest.raises(SystemExit) as leave:
        cli.main([str(arg) for arg in args])
    return int(leave.value.code or 0)


SMALL = ("--text-windows", 3, "--text-window-tokens", 200, "--trials", 3, "--context-tokens", 256, "--tasks", "needle")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "passed"), [(1 / 8, True), (2.0, False)])
def test_command(
    step: float,
    passed: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codec, out = CoarseCodec(step), tmp_path / "cert.json"
    monkeypatch.setitem(CODECS, "coarse", lambda _: codec)
    out.write_text("what was there before")
    args = ("certify", "reference", "--codec", "coarse", *SMALL, "--model-id", "tiny", "-o", out)
    # Three trials prove nothing within 5 points, whatever they say.
    assert run(*args) == 1 and not Certificate.load(out).passed
    assert run(*args, "--max-task-loss", 0.5, "--max-kl", 0.3) == (0 if passed else 1)
    certificate = Certificate.load(out)
    assert certificate.passed is passed and certificate.parameters == {"step": step}
    assert (certificate.codec, certificate.model_id) == ("coarse", "tiny")
    assert certificate.conditions["windows"] == 3 and certificate.conditions["trials"] == {"needle": 3}
    assert certificate.conditions["limits"] == {"perplexity_increase": 0.05, "kl": 0.3, "task_loss": 0.5}
    shown = capsys.readouterr().out
    assert (
        "needle loss" in shown
        and "unproven: the interval is too wide" in shown
        and ("passed: coarse may" in shown) is passed
        and "not passed" in shown
    )
    assert json.loads(out.read_text())["passed"] is passed
    chunk, _ = ForcedModel(load_model(None)[0], model_id="tiny").prefill(IDS)
    with KVStore([HostTier(None)], codec=codec, certificates=[certificate]) as store:
        key = store_key()
        if passed:
            store.put(key, chunk)
            assert store.get(key) is not None
        else:
            with pytest.raises(UncertifiedError):
                store.put(key, chunk)


def store_key() -> bytes:
    return bytes(range(32))


def test_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    for args, message in (
        (("--codec", "zip"), "unknown codec 'zip'; known: raw"),
        (("--codec", "raw", "--tasks", "needle,chess"), "tasks are chess; expected some of auto, none"),
        (("--codec", "raw", "--profile", short), "cannot be read as a profile"),
        (("--codec", "raw", "--text", short), "give more --text"),
    ):
        assert run("certify", "reference", *args, "--model-id", "m") == 2
        assert message in capsys.readouterr().err


def test_limits_may_be_left_off() -> None:
    found = Measurement(ZEROS, forced=[(1.0, 9.0, 5.0)] * 2, right={"needle": [(True, False)] * 9})
    figures = found.figures(Limits(None, None, None))
    assert figures["kl"].value == 5.0 and all(f.passed and f.limit is None for f in figures.values())
    assert not Certificate(ForcedModel(make_model("llama"), model_id="m").spec, "zeros", {}, figures).passed
