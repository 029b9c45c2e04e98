"""`kvloom explain`: why a request of an engine was loaded, shortened or computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import JsonFile, folder_path

_MOST_SHOWN = 20


def explain(
    disk_path: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER", callback=folder_path, help="The engine's disk_path, or its journal_path if it has one."
        ),
    ],
    request: Annotated[
        str | None, typer.Argument(metavar="REQUEST", help="ID of a request, or its beginning.", show_default=False)
    ] = None,
    last: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="A table of the last N requests instead.")
    ] = None,
    json: JsonFile = None,
) -> None:
    """Say in a line why a request was loaded, shortened or computed."""
    from ..calibration.output_file import write_output
    from ..connectors.serving.explanations import explanation
    from ..connectors.serving.request_journal import read_journal

    if (request is None) == (last is None):
        raise ValueError("give the ID of a request, or --last N for a table of the last ones; not both")
    records = read_journal(disk_path)
    found = records[-last:] if last is not None else _found(records, str(request), disk_path)
    if json is not None:
        from json import dumps

        write_output(json, (dumps(found, indent=1) + "\n").encode())
    if last is not None:
        _print_table(found)
        return
    for record in found:
        typer.echo(explanation(record))


def _found(records: list[dict[str, Any]], request: str, folder: Path) -> list[dict[str, Any]]:
    """The requests of this ID, or whose IDs begin so; the last ones if they are many."""
    found = [record for record in records if record["request"] == request]
    found = found or [record for record in records if record["request"].startswith(request)]
    if not found:
        raise ValueError(
            f"no request {request!r} among the last {len(records):,} in {folder}; "
            f"see kvloom explain --last {_MOST_SHOWN} --disk-path {folder}"
        )
    return found[-_MOST_SHOWN:]


def _print_table(records: list[dict[str, Any]]) -> None:
    from ..connectors.serving.explanations import tokens_of, when
    from ..evaluation.page import Row, Table
    from ..evaluation.screen import output, print_table

    heads = [
        "over at",
        "request",
        "decision",
        "prompt tokens",
        "stored",
        "loaded",
        "expected with a load, ms",
        "without",
    ]
    rows: list[Row] = [
        [
            when(record),
            record["request"],
            str(record.get("decision") or "-"),
            record.get("prompt_tokens", 0),
            tokens_of(record.get("found_tokens")),
            tokens_of(record.get("loaded_tokens")),
            *(_milliseconds(record.get(name)) for name in ("expected_load_s", "expected_compute_s")),
        ]
        for record in records
    ]
    print_table(output(), Table(heads, rows, "", left=(0, 1, 2)))


def _milliseconds(seconds: object) -> str:
    return f"{seconds * 1e3:,.1f}" if isinstance(seconds, (int, float)) else "-"
