"""`kvloom certify --retrieval`: what is measured is what a session does, and what it permits is no more than that."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList

from kvloom.calibration.certificate import Certificate
from kvloom.certify import certify
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.errors import UncertifiedError
from kvloom.evaluation.forcing import QUERIES, QUERY_POSITIONS, ForcedModel
from kvloom.evaluation.models import load_model
from kvloom.evaluation.quality import Measurement, measure
from kvloom.evaluation.sparse import through_retrieval
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.registry import METHODS
from kvloom.retrieval.settings import Retrieval

from ..hf.test_retrieval import Logits, connect, make, prompts
from ..support.models import make_variant
from ..support.retrieval_fakes import FAKES, LearningSelector, maker
from .test_certify import run

SOME = {"budget_ratio": 0.05, "break_even_tokens": 0}


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in FAKES:
        monkeypatch.setitem(METHODS, name, maker(name))


@pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")
@pytest.mark.parametrize(
    "options", [{}, {"dense_layers": 2, "sink_tokens": 0}, {"pooling": "sum"}, {"coverage": 0.6}], ids=str
)
def test_what_is_measured_is_what_a_session_does(options: dict[str, object]) -> None:
    """Logits of an answer in the middle of which a chunk leaves the window."""
    rag = connect(make())
    retrieval = Retrieval("exact", window_tokens=8, **SOME, **options)
    (ids,) = prompts(600)
    logits = Logits()
    answer = rag.generate(
        ids, retrieval=retrieval, max_new_tokens=190, logits_processor=LogitsProcessorList([logits])
    ).token_ids[0]
    forced = ForcedModel(rag.model, model_id="m")
    prefix, _ = forced.prefill(torch.tensor(ids))
    approximation = through_retrieval(retrieval, forced.layers)
    found = forced.logits(forced.continued(prefix, torch.tensor(answer[:-1]), approximation.attend))
    torch.testing.assert_close(found, torch.cat(logits.seen[1:]), rtol=1e-4, atol=1e-4)
    exact = forced.logits(forced.continued(prefix, torch.tensor(answer[:-1])))
    assert float((found - exact).abs().max()) > 0.01


@pytest.fixture(scope="module")
def forced() -> ForcedModel:
    return ForcedModel(make(), model_id="m", keeps_queries=True)


def measured(forced: ForcedModel, *retrievals: Retrieval) -> list[Measurement]:
    ways = [through_retrieval(retrieval, forced.layers) for retrieval in retrievals]
    return measure(forced, ways, windows=prompts(620, 621))


@pytest.mark.slow
def test_a_budget_of_everything_costs_nothing_and_chance_more_than_choice(forced: ForcedModel) -> None:
    all_of_it, best, drawn = measured(
        forced,
        Retrieval("random", budget_ratio=1.0),
        Retrieval("exact", budget_ratio=0.03, window_tokens=16),
        Retrieval("random", budget_ratio=0.03, window_tokens=16),
    )
    assert all_of_it.figures()["prefix_kl"].value < 1e-6
    assert set(all_of_it.figures()) == {"prefix_perplexity_increase", "prefix_kl"}
    assert 1e-4 < best.figures()["prefix_kl"].value < 0.8 * drawn.figures()["prefix_kl"].value


def test_models_with_windows_of_their_own_keep_them() -> None:
    forced = ForcedModel(make_variant("window"), model_id="m")
    prefix, _ = forced.prefill(torch.tensor(prompts(300)[0]))
    ids = torch.tensor(prompts(60, seed=1)[0])
    approximation = through_retrieval(Retrieval("random", budget_ratio=0.0, window_tokens=1), forced.layers)
    assert torch.equal(forced.continued(prefix, ids, approximation.attend), forced.continued(prefix, ids))


@pytest.mark.slow
def test_methods_that_learn_see_the_queries_of_the_prefix_alone(forced: ForcedModel) -> None:
    seen: list[LearningSelector] = []

    def keep(*args: object, **options: object) -> LearningSelector:
        seen.append(maker("learning")(*args, **options))
        return seen[-1]

    METHODS["learning"] = keep
    whole, _ = forced.prefill(torch.tensor(prompts(900)[0]))
    assert whole.extras[QUERIES].shape == (4, 4, 900, 8)
    assert whole.extras[QUERY_POSITIONS].tolist() == list(range(900))
    measured(forced, Retrieval("learning", budget_ratio=0.1, window_tokens=16))
    assert len(seen) == 2 * 4
    assert all(one.seen == list(range(310)) and one.built == 256 - 16 < len(one) for one in seen[:4])


SMALL = ("--text-windows", 2, "--text-window-tokens", 620, "--trials", 2, "--context-tokens", 560, "--tasks", "needle")
LOOSE = ("--max-task-loss", 1.0, "--max-kl", 9.0, "--max-perplexity-increase", 9.0)


@pytest.mark.slow
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "break_even", lambda *_: 768)
    out = tmp_path / "cert.json"
    args = (
        "certify",
        "reference",
        "--retrieval",
        "exact",
        "--budget-ratio",
        0.25,
        *SMALL,
        "--model-id",
        "tiny",
        "-o",
        out,
    )
    assert run(*args, *LOOSE) == 0  # two trials prove nothing within the limits of old
    shown = capsys.readouterr().out
    assert "passed: retrieval exact may be used for this model" in shown and "needle loss" in shown
    certificate = Certificate.load(out)
    assert certificate.codec == "retrieval exact" and certificate.parameters["budget_ratio"] == 0.25
    assert json.loads(out.read_text())["conditions"]["context_tokens"] == 560
    model, tokenizer = load_model(None)
    with KVStore([HostTier(None)]) as store:
        rag = TransformersConnector(model, tokenizer, store, model_id="tiny", certificates=[certificate])
        with rag.session(Retrieval("exact", budget_ratio=0.25)) as session:
            assert session.plan.break_even_tokens == certificate.conditions["break_even_tokens"] == 768
        with pytest.raises(UncertifiedError):
            rag.session(Retrieval("exact", budget_ratio=0.2))


def test_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    for args, message in (
        ((), "give one of --codec, --retrieval and --fusion"),
        (("--codec", "raw", "--retrieval", "exact"), "give one of --codec, --retrieval and --fusion"),
        (("--retrieval", "psychic"), "no retrieval method 'psychic'; known: "),
        (("--retrieval", "exact", "--budget-ratio", "3"), "budget_ratio is 3.0"),
        (("--retrieval", "exact", "--pooling", "mean"), "pooling is 'mean'"),
        (("--retrieval", "random", "--parameter", "seed"), "parameter is 'seed'; expected NAME=VALUE"),
        (("--retrieval", "random", "--parameter", "luck=7", "--trials", "1"), "random does not take {'luck': 7}"),
    ):
        assert run("certify", "reference", *args, "--model-id", "m") == 2
        assert message in capsys.readouterr().err
