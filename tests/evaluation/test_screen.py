"""Tables and progress where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvloom.evaluation import screen
from kvloom.evaluation.page import Table
from kvloom.evaluation.screen import StepProgress, print_table


def test_a_wide_table_keeps_every_head_and_cell_in_a_file() -> None:
    columns = [f"contribution{i}" for i in range(30)]
    rows = [[f"{i}.{'7' * 12}" for i in range(30)]]
    text = io.StringIO()
    print_table(Console(file=text, width=120), Table(columns, rows, "wide"))
    shown = text.getvalue()
    assert "…" not in shown
    assert all(word in shown for word in (*columns, *rows[0]))


def test_progress_says_now_and_then_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    text = io.StringIO()
    bar = StepProgress(console=Console(file=text, width=120), disable=True, get_time=lambda: now[0])
    task = bar.add_task("needle tasks", total=200)
    hidden = bar.add_task("loading", total=200, logged=False)
    for _ in range(100):
        now[0] += 1.0
        bar.advance(task)
        bar.advance(hidden)
    lines = text.getvalue().splitlines()
    assert lines[0] == "kvloom: needle tasks"
    left = {30: "about 3 min", 60: "about 2 min", 90: "about 2 min"}
    assert lines[1:] == [f"kvloom: needle tasks: {n} of 200, {said} left" for n, said in left.items()]
