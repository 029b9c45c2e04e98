"""Figures, their intervals, their JSON, and the page."""

import json
import math
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from kvloom.evaluation import environment as env
from kvloom.evaluation.intervals import paired_bootstrap, share_interval, spread
from kvloom.evaluation.page import Plot, Point, Section, Table, html_report
from kvloom.evaluation.report import BenchResult, Metric, write_text


def test_spread_is_median_and_tenths() -> None:
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == pytest.approx((3.0, 1.4, 4.6))
    assert Metric.of_samples([2.0], unit="s") == Metric(2.0, 2.0, 2.0, "s")
    with pytest.raises(ValueError, match="no samples"):
        spread([])


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (8, 10, 0.4901625, 0.9433178),
        (0, 20, 0.0, 0.1611252),
        (20, 20, 0.8388748, 1.0),
    ],
)
def test_share_interval_is_wilsons(successes: int, trials: int, low: float, high: float) -> None:
    assert share_interval(successes, trials) == pytest.approx((low, high), abs=1e-6)


def test_share_interval_ends_where_the_share_is_just_plausible() -> None:
    """Wilson's ends are the shares from which the seen one lies 1.96 standard errors away."""
    for end in share_interval(481, 500):
        assert abs(481 / 500 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 500))


@pytest.mark.parametrize(("successes", "trials"), [(-1, 3), (4, 3), (0, 0)])
def test_share_interval_refuses_nonsense(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        share_interval(successes, trials)


def test_bootstrap_of_a_constant_difference_has_no_width() -> None:
    """Pairs are drawn together: what differs between trials but not within them cancels."""
    b = np.random.default_rng(1).normal(scale=100.0, size=50)
    value, low, high = paired_bootstrap(b + 2.0, b)
    assert (value, low, high) == pytest.approx((2.0, 2.0, 2.0))


def test_bootstrap_interval_has_the_textbook_width() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.normal(1.0, 1.0, size=400), np.zeros(400)
    value, low, high = paired_bootstrap(a, b)
    reach = 1.96 * a.std() / math.sqrt(len(a))
    assert value == pytest.approx(a.mean())
    assert (low, high) == pytest.approx((a.mean() - reach, a.mean() + reach), abs=0.1 * reach)
    assert paired_bootstrap(a, b) == (value, low, high)
    assert paired_bootstrap(a, b, seed=1) != (value, low, high)


def test_bootstrap_of_a_ratio_of_three() -> None:
    full, naive, blend = [1, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1]
    value, low, high = paired_bootstrap(
        blend, naive, full, statistic=lambda b, n, f: (b.mean() - n.mean()) / (f.mean() - n.mean())
    )
    assert value == pytest.approx(2 / 3)
    assert 0.0 <= low < value < high <= 1.0
    nothing = paired_bootstrap(
        naive, naive, naive, statistic=lambda b, n, f: (b.mean() - n.mean()) / (f.mean() - n.mean())
    )
    assert all(math.isnan(v) for v in nothing)


@pytest.mark.parametrize("samples", [[], [[]], [[1.0], [1.0, 2.0]]])
def test_bootstrap_refuses_unpaired_samples(samples: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="lengths"):
        paired_bootstrap(*samples)


def test_result_as_json(tmp_path: Path) -> None:
    metrics = {"gap_closed_at_0.15": Metric(0.97, 0.93, 1.0, "share", 1.0), "lost": Metric(math.nan, unit="s")}
    result = BenchResult(
        "blend", metrics, [{"method": "full prefill", "ttft_s": math.inf, "tokens": 4096, "sizes": (1, 2)}]
    )
    path = tmp_path / "out.json"
    path.write_text("old")
    result.write(path)
    found = json.loads(path.read_text())
    assert list(found) == ["bench", "title", "commit", "env", "metrics", "targets", "tables", "notes", "rows"]
    assert found["bench"] == "blend"
    assert found["metrics"]["gap_closed_at_0.15"] == {
        "value": 0.97,
        "low": 0.93,
        "high": 1.0,
        "unit": "share",
        "baseline": 1.0,
    }
    assert found["metrics"]["lost"] == {"value": None, "low": None, "high": None, "unit": "s", "baseline": None}
    assert found["rows"] == [{"method": "full prefill", "ttft_s": None, "tokens": 4096, "sizes": [1, 2]}]
    assert {"python", "torch", "cpu", "cores", "devices", "date"} <= set(found["env"])
    assert list(tmp_path.iterdir()) == [path]


def test_env_tells_nothing_private() -> None:
    import platform

    shown = json.dumps(env.environment())
    assert str(Path.home()) not in shown.replace('"/"', "") or Path.home() == Path("/")
    assert not platform.node() or platform.node() not in shown
    assert str(env.ROOT) not in shown


def test_commit_is_the_checkouts_or_the_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kvloom import __version__

    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", env.commit()) or env.commit() == __version__
    monkeypatch.setattr(env, "ROOT", tmp_path)
    assert env.commit() == __version__


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "second \ud800")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_page_holds_the_figures_and_fetches_nothing() -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    table = Table(
        ("method", "TTFT, s", "tokens"), [("full <prefill>", 0.123456, 4096), ("blend", None, 614)], "Cold & warm"
    )
    lines = {"deviation": [Point(0.05, 0.5, 0.4, 0.6), Point(0.15, 0.9, 0.8, 1.0)], "full": [Point(1.0, 0.97)]}
    plot = Plot("share recomputed", "exact match", lines, "Quality")
    page = html_report("Fusion <1>", [Section("Speed", "Two cores.", [table]), Section("Quality", parts=[plot])])
    assert "<title>Fusion &lt;1&gt;</title>" in page
    assert '<td class="words">full &lt;prefill&gt;</td>' in page
    assert "<td>0.1235</td>" in page
    assert "<td>4,096</td>" in page
    assert "Cold &amp; warm" in page
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)
    assert all(address.startswith("http://www.w3.org/") for address in re.findall(r"https?://[^\"' )]+", page))
    svg = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + len("</svg>")])
    words = {element.text for element in svg.iter() if element.tag.endswith("}text")}
    assert {"share recomputed", "exact match", "deviation", "full"} <= words


def test_plot_draws_the_points_where_they_are() -> None:
    pytest.importorskip("matplotlib", reason="plots need the extra `bench`")
    rising = Plot("x", "y", {"a": [Point(0, 0), Point(1, 1), Point(2, 2)]}).to_svg()
    falling = Plot("x", "y", {"a": [Point(0, 2), Point(1, 1), Point(2, 0)]}).to_svg()

    def heights(svg: str) -> list[float]:
        path = next(p for p in re.findall(r'<path d="([^"]+)"[^>]*stroke: #2f7fd6[^>]*', svg) if p.count("L") == 2)
        return [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]

    up, down = heights(rising), heights(falling)
    assert up[0] > up[1] > up[2]
    assert up[0] - up[1] == pytest.approx(up[1] - up[2], rel=1e-3)
    assert down == pytest.approx(up[::-1], rel=1e-3)
    assert "currentColor" in rising
    assert Plot("x", "y", {"a": [Point(0, 0)]}).to_svg() == Plot("x", "y", {"a": [Point(0, 0)]}).to_svg()


def test_the_interval_of_a_share_holds_the_share() -> None:
    """Also where all succeed, and rounding would leave it out."""
    for trials in range(1, 200):
        for successes in {0, 1, trials // 2, trials}:
            low, high = share_interval(successes, trials)
            assert 0.0 <= low <= successes / trials <= high <= 1.0
