"""Tables and progress on terminals of any width, and in logs."""

import io

import pytest
from rich.console import Console

from kvloom.evaluation.page import Table
from kvloom.evaluation.screen import output, print_table, progress

TABLE = Table(
    ["method", "TTFT ms", "loaded", "records right"],
    [["CacheBlend 15%", 4842, "5.0 MB host + 3 MB disk", "100%"], ["full prefill", None, "-", "[b]50%[/b]"]],
    "after a restart",
)


def printed(width: int) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    print_table(console, TABLE)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_a_table_fits_and_loses_nothing(width: int) -> None:
    shown = printed(width)
    assert max(map(len, shown.splitlines())) <= width and "…" not in shown
    for word in ("restart", "method", "4,842", "disk"):
        assert word in shown
    assert "[b]50%[/b]" in shown.replace("\n", "") or width < 80, "text is no markup"


def test_words_are_whole_on_80_columns() -> None:
    shown = printed(80)
    assert "CacheBlend" in shown and "5.0 MB host + 3 MB disk" in shown


def test_piped_output_is_wide_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output().width == 120


def test_a_log_says_what_begins(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        task = bar.add_task("held-out [text]", total=2)
        bar.add_task("loading", total=1, logged=False)
        bar.advance(task)
    assert capsys.readouterr().err == "kvloom: held-out [text]\n"
