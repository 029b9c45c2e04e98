"""The outcome of a certification: a table of losses, a verdict, and the certificate in a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .. import __version__
from ..calibration.certificate import Certificate, Figure
from ..core import KVSpec
from ..evaluation.answers import KNOWN_RATIO
from ..evaluation.page import Row, Table
from ..evaluation.report import write_text
from ..evaluation.screen import output, print_table

HEADS = ("loss", "value", "95 % interval", "limit", "verdict")
UNPROVEN = "unproven"
QUESTION_TOKENS = 256  # kept free of documents in the model's context: a chat template, a question, an answer
NO_TASK = "the model answers none of the tasks; it is judged by text alone, and the certificate will say so"


def certificate(
    spec: KVSpec, form: tuple[str, Mapping[str, Any]], figures: Mapping[str, Figure], conditions: Mapping[str, Any]
) -> Certificate:
    """A certificate made now, of a method by its name and parameters."""
    return Certificate(spec, *form, figures, conditions, datetime.now(UTC).isoformat(timespec="seconds"), __version__)


def loss_rows(figures: Mapping[str, Figure]) -> list[Row]:
    """A row of `HEADS` for each loss."""
    return [[name.replace("_", " "), *_cells(figure)] for name, figure in figures.items()]


def finish(found: Certificate, table: Table, verdict: str, out: Path | None) -> Certificate:
    """Write the certificate where it is wanted; print the table, what was left out and the verdict; return it."""
    if out is not None:
        write_text(out, found.to_json())
    console = output()
    print_table(console, table)
    notes = [
        f"{kind} tasks are left out: the exact model answers {share:.0%} of them, {KNOWN_RATIO:.0%} are needed"
        for kind, share in found.conditions["skipped"].items()
    ]
    notes.append(f"{'passed' if found.passed else 'not passed'}: {verdict}")
    if not found.tasks:
        notes.append("judged without tasks: text alone; whoever uses this certificate is told so")
    if is_unproven(found.figures.values()):
        notes.append("unproven: the interval is too wide to tell; give more --trials, or more text")
    for note in notes:
        console.print(note, markup=False, highlight=False)
    return found


def is_unproven(figures: Iterable[Figure]) -> bool:
    """Whether more trials could make the difference."""
    return any(_verdict(figure) == UNPROVEN for figure in figures)


def _cells(figure: Figure) -> Sequence[str]:
    def text(value: float) -> str:
        return f"{value:+.2%}" if figure.unit == "share" else f"{value:.5f}"

    limit = "" if figure.limit is None else text(figure.limit)
    return text(figure.value), f"{text(figure.low)} to {text(figure.high)}", limit, _verdict(figure)


def _verdict(figure: Figure) -> str:
    if figure.limit is None:
        return ""
    if figure.passed:
        return "ok"
    return UNPROVEN if figure.value <= figure.limit else "too much"
