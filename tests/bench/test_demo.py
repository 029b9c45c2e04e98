"""The demo and the fusion benchmark at their smallest, on a tiny random model, and what they say to wrong input."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kvloom import DiskTier, KVStore, cli
from kvloom.bench.blend.bundled import gap_closed, measure_bundled
from kvloom.bench.blend.run import run as run_blend
from kvloom.bench.demo.run import METHODS, DemoOptions, run_demo
from kvloom.evaluation.fused_answers import FULL, NAIVE, Method, Outcome, Score, kl_divergence
from kvloom.evaluation.texts import read_documents
from kvloom.evaluation.workload import task_cases

from ..support.models import DOCUMENTS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", max_position_embeddings=8192).save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture
def docs_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.mark.slow
def test_demo_measures_both_phases(model_dir: Path, tmp_path: Path) -> None:
    found = run_demo(DemoOptions(model=model_dir, store=tmp_path / "store", quick=True, curves=True))
    found.write_page(tmp_path / "r.html")
    result = json.loads(found.to_json())
    assert result["bench"] == "demo"
    phases = {phase: [r for r in result["rows"] if r["phase"] == phase] for phase in ("first run", "after restart")}
    for phase, tier in (("first run", "host"), ("after restart", "disk")):
        rows = {row["method"]: row for row in phases[phase]}
        assert list(rows) == [m.name for m in METHODS]
        assert rows["full prefill"]["speedup"] == 1.0
        assert rows["full prefill"]["loaded_bytes"] == {}
        assert rows["full prefill"]["kl"] == 0.0
        assert all(set(row["exact_match"]) == {"record", "alias"} for row in rows.values())
        assert rows["prefix caching"]["kl"] < 1e-9
        assert rows["naive reuse"]["kl"] > 1e-4
        for name in ("naive reuse", "CacheBlend 15%", "kvloom 15%"):
            assert list(rows[name]["loaded_bytes"]) == [tier]
        order = ["naive reuse", "CacheBlend 5%", "CacheBlend 15%", "CacheBlend 30%", "full prefill"]
        computed = [rows[name]["computed_tokens"] for name in order]
        assert computed == sorted(computed) and len(set(computed)) == len(order)
    for before, after in zip(*phases.values(), strict=True):
        assert before["kl"] == pytest.approx(after["kl"], abs=1e-5)  # sums over memory that lies elsewhere
        assert sum(before["loaded_bytes"].values()) == sum(after["loaded_bytes"].values())
    assert "exact_match_alias_CacheBlend_15%_after_restart" in result["metrics"]
    page = (tmp_path / "r.html").read_text()
    assert "records right" in page and "aliases right" in page
    assert page.count("<svg") == 2
    assert "https://" not in page.replace("http://www.w3.org", "")
    with KVStore([DiskTier(tmp_path / "store")]) as store:
        assert store.check() == []
        assert store.stats().tiers[0].chunks > 0


@pytest.mark.slow
def test_demo_answers_a_question_over_ones_own_documents(
    model_dir: Path, docs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_demo(DemoOptions(model=model_dir, docs=docs_dir, question="Where is the honey sold?", quick=True)).show()
    printed = capsys.readouterr().out
    answers = {line.partition(":")[0].strip(): line.partition(":")[2] for line in printed.splitlines() if ": '" in line}
    assert set(answers) == {m.name for m in METHODS}
    assert answers["prefix caching"] == answers["full prefill"]


def make_gpt2(folder: Path) -> Path:
    GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=16, n_layer=1, n_head=2)).save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "fault", ["model", "no docs", "empty docs", "binary", "long", "foreign store", "gpt2", "report"]
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    fault: str, model_dir: Path, docs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, model, docs, report, says = tmp_path / "store", model_dir, docs_dir, tmp_path / "r.html", ""
    if fault == "model":
        model, says = tmp_path / "nowhere", "is not a folder"
    elif fault == "no docs":
        docs, says = tmp_path / "nowhere", "is not a folder"
    elif fault == "empty docs":
        docs, says = tmp_path / "empty", "no documents"
        docs.mkdir()
        (docs / "a.txt").write_text(" \n")
    elif fault == "binary":
        (docs / "z.txt").write_bytes(b"\xff\xfe\x00")
        says = "not UTF-8"
    elif fault == "long":
        (docs / "z.txt").write_text("word " * 20000)
        says = "context"
    elif fault == "foreign store":
        store.mkdir()
        (store / "thesis.doc").write_text("not a cache")
        says = "not a kvloom store"
    elif fault == "gpt2":
        model, says = make_gpt2(tmp_path / "gpt2"), "has no decoder with a list of layers"
    else:
        report, says = tmp_path / "nowhere" / "r.html", "cannot write"
    before = sorted(tmp_path.rglob("*"))
    arguments = ["--model", model, "--docs", docs, "--store", store, "--report", report, "--question", "Who?"]
    with pytest.raises(SystemExit) as leave:
        cli.main(["demo", *map(str, arguments)])
    assert leave.value.code == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.strip().count("\n") == 0
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_blend_benchmark_writes_every_figure() -> None:
    result = run_blend(quick=True)
    assert result.metrics["tokens_identical_at_1"].value == 1.0
    assert result.metrics["max_abs_dlogit_at_1"].value < 1e-4
    for name in ("gap_closed_at_0.05", "gap_closed_at_0.15", "gap_closed_random_at_0.15", "smallest_ratio_closing_0.9"):
        assert name in result.metrics
    for name in ("ttft_speedup_at_0.15_host_4k", "ttft_speedup_at_0.15_disk_4k"):
        metric = result.metrics[name]
        assert metric.low is not None and 0 < metric.low <= metric.value
    assert json.loads(result.to_json())["rows"]


@pytest.mark.slow
def test_blend_benchmark_ends_when_its_time_is_up() -> None:
    """With a task of each kind, and says how many it was."""
    result = measure_bundled(quick=True, device="cpu", stop_s=time.monotonic())
    assert result.metrics["tokens_identical_at_1"].value == 1.0
    assert [note for note in result.notes if "after 1 of 3 tasks of record" in note]
    assert [note for note in result.notes if "after 1 of 2 tasks of alias" in note]


@pytest.mark.slow
def test_blend_benchmark_of_a_model(model_dir: Path) -> None:
    """Every figure, at the cost of CacheBlend or below: no method wins by computing more."""
    result = run_blend(quick=True, model_dir=model_dir)
    for share in ("0.15", "0.30"):
        for name in ("real_gap_closed", "real_cacheblend_gap_closed", "real_multihop_gap_closed", "real_ttft_speedup"):
            assert f"{name}_at_{share}" in result.metrics
    assert result.metrics["real_musique_kl_at_0.15_vs_cacheblend"].value > 0
    rows = json.loads(result.to_json())["rows"]
    assert {row["kind"] for row in rows} == {"astride", "multihop", "extract", "text"}
    computed = {row["method"]: row["computed_ratio"] for row in rows if row["kind"] == "astride"}
    assert set(computed) >= {"kvloom at 15%", "CacheBlend 15%", "EPIC at 15%", "ProphetKV at 15%", "random at 15%"}
    assert all(row["questions"] == 2 for row in rows)


def make_score(method: Method, exact: list[bool]) -> Score:
    outcomes = tuple(Outcome(1.0, (0,), torch.zeros(2), 1.0, {}) for _ in exact)
    return Score(method, ("record",) * len(exact), outcomes, tuple(exact), tuple(0.0 for _ in exact))


def test_right_answers_are_counted_by_kind() -> None:
    score = Score(FULL, ("a", "b", "a", "c"), (), (True, False, False, None), ())
    assert score.exact_match == {"a": 0.5, "b": 0.0}


def test_gap_closed() -> None:
    full, naive = make_score(FULL, [True] * 9 + [False]), make_score(NAIVE, [True] + [False] * 9)
    half = make_score(METHODS[-1], [True] * 5 + [False] * 5)
    scores = [full, naive, half]
    assert gap_closed(scores, full).value == 1.0
    assert gap_closed(scores, naive).value == 0.0
    metric = gap_closed(scores, half)
    assert metric.value == pytest.approx(0.5)
    assert metric.low is not None and metric.high is not None and metric.low < 0.5 < metric.high
    assert math.isnan(gap_closed([full, make_score(NAIVE, list(full.known))], full).value)


def test_kl_divergence() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.2, 0.7])
    assert kl_divergence(p.log(), q.log()) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert kl_divergence(p.log() + 3.0, p.log()) == pytest.approx(0.0, abs=1e-7)


def test_tasks_hide_their_facts_in_the_given_texts(docs_dir: Path) -> None:
    texts = [" ".join(read_documents(docs_dir))]
    cases = task_cases(texts, lambda t: len(t.split()), kind="record", count=3, context_tokens=200, num_documents=4)
    assert len({c.question for c in cases}) == 3
    for case in cases:
        assert len(case.documents) == 4
        assert case.answer is not None
        where = [i for i, d in enumerate(case.documents) if f"is{case.answer}" in d]
        name = case.question.split(" of ")[1].partition("?")[0]
        named = [i for i, d in enumerate(case.documents) if f"consider {name}." in d]
        assert where == [named[0] + 1]
        assert "honey" in "".join(case.documents) or "loom" in "".join(case.documents)
