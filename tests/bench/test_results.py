"""The last results of every benchmark, and the page that is made from them."""

import json
from pathlib import Path

import pytest

from kvloom.bench.results.render import ON, PAGE, RESULTS, render, take_in
from kvloom.evaluation.page import Table
from kvloom.evaluation.report import BenchResult, Metric, Target

KNOWN_ENV = {
    *("python", "kvloom", "torch", "transformers", "system", "cpu", "cores", "torch_threads", "memory_bytes"),
    *("devices", "date"),
}


def test_the_page_is_made_of_the_results() -> None:
    assert PAGE.read_text() == render(), "run: make docs"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_are_from_and_nothing_private(path: Path) -> None:
    result = json.loads(path.read_text())
    assert result["bench"] == path.stem.partition(ON)[0] and result["title"].endswith("?")
    assert result["commit"] or result["source"], "a figure belongs to a commit"
    assert set(result["env"]) <= KNOWN_ENV
    assert "rows" not in result and path.stat().st_size < 100_000
    for name, metric in result["metrics"].items():
        assert set(metric) == {"value", "low", "high", "unit", "baseline"}, name
        if metric["low"] is not None and metric["value"] is not None:
            assert metric["low"] <= metric["value"] <= metric["high"], name


def test_a_new_result_replaces_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.evaluation.report.commit", lambda: "a" * 40)
    metrics = {"speed": Metric(2.5, 2.0, 3.0, "times", "plain"), "lost": Metric(float("nan"), baseline="no disk")}
    targets = [Target("speed", ">=", 2.0), Target("lost", "<", 0.1), Target("size", "<=", 1.0)]
    tables = [Table(["way", "time"], [["a|b_c `d_e`", 1.23456], ["b", None]], "times")]
    result = BenchResult("tiers", metrics, [{"raw": 1}], tables, (), targets, ["Read *this*."], "Is it fast?")
    new, folder = tmp_path / "new.json", tmp_path / "results"
    folder.mkdir()
    (folder / "tiers.json").write_text("old")
    result.write(new)
    take_in(new, folder)
    assert "rows" not in json.loads((folder / "tiers.json").read_text())
    page = render(folder)
    assert "## tiers: is it fast?" in page and "commit `aaaaaaaaaaaa`" in page and "copied" not in page
    assert "| speed | 2.5 times (2 to 3) | plain | >= 2 | reached |" in page
    assert "| lost | - |  | < 0.1 | not measured no disk |" in page
    assert "| size | - |  | <= 1 | not measured |" in page
    assert "| a\\|b\\_c `d_e` | 1.235 |" in page and "Read \\*this\\*." in page


def test_results_of_a_pretrained_model_stand_apart_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.evaluation.report.commit", lambda: "a" * 40)
    folder = tmp_path / "results"
    folder.mkdir()
    for model, value in ((None, 0.25), ("small-1b", 0.75)):
        BenchResult("blend", {"gap": Metric(value)}, title="Is it right?").write(tmp_path / "new.json")
        take_in(tmp_path / "new.json", folder, model=model)
    assert {path.name for path in folder.iterdir()} == {"blend.json", "blend-on-small-1b.json"}
    page = render(folder)
    own, bundled = page.index("## blend on small-1b: is it right?"), page.index("## blend: is it right?")
    assert own < page.index("0.75") < bundled < page.index("| gap | 0.25")
    assert "do not carry over to other models" in page


def test_what_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    for text, message in (
        ("[]", "is no result of a benchmark"),
        ("{", "is no result of a benchmark"),
        ('{"bench": "tiers"}', "is no result of a benchmark"),
        ('{"bench": "tiers", "commit": "abc-dirty"}', "uncommitted changes"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            take_in(path, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
