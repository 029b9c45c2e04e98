"""What commands that measure or predict do with what they have found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..evaluation.report import BenchResult


def refuse_without_model(**options: object) -> None:
    """Refuses options that are given and mean nothing without `--model`."""
    for name, value in options.items():
        if value is not None:
            raise typer.BadParameter("needs --model", param_hint=f"--{name.replace('_', '-')}")


def finish(result: BenchResult, json: Path | None, report: Path | None = None) -> None:
    """Writes what is to be written, then shows it."""
    if json is not None:  # first: what reads our output may end before us, and hours of work with it
        result.write(json)
    if report is not None:
        result.write_page(report)
    result.show()
