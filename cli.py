"""The `kvloom` command. Expected failures are one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from . import __version__
from .errors import KVLoomError

BENCHMARKS = {"blend": ".bench.blend"}
"""Module of each benchmark by name. It offers `run(*, quick: bool) -> BenchResult`."""

app = typer.Typer(
    name="kvloom",
    help="Keep, compress, search and fuse the KV caches of long contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` as in `sys.argv[1:]`. Always ends with `SystemExit`."""
    try:
        app(args, prog_name="kvloom")
    except ImportError as error:
        missing = error.name or ""
        if missing.split(".")[0] == __package__:  # a bug of ours, not a package to install
            raise
        _fail(error, f'{missing} is not installed; run: pip install "kvloom[bench]"' if missing else str(error))
    except (KVLoomError, OSError, ValueError) as error:
        _fail(error, str(error) or type(error).__name__)


def _fail(error: Exception, message: str) -> NoReturn:
    """One line and exit code 2; with `KVLOOM_TRACEBACK` set, the whole story."""
    if os.environ.get("KVLOOM_TRACEBACK"):
        raise error
    typer.echo(f"kvloom: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _output_file(path: Path | None) -> Path | None:
    """Refuses a file that could not be written, before hours go into what belongs there."""
    if path is None:
        return None
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; name a file in a folder that exists") from error
    return path


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvloom {__version__}")
        raise typer.Exit


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=_output_file, help="Write the figures here as JSON.")
]
Quick = Annotated[bool, typer.Option("--quick", help="Smallest sizes: shows that it runs, proves nothing.")]


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Holds the options that stand before a command."""


@app.command()
def demo(
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Model folder; default: the bundled one.")] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of texts; default: bundled passages.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Question about the documents.")] = None,
    store: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the cache here; default: removed.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=_output_file, help="Write a page with tables and plots (.html)."),
    ] = None,
    json: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Answer questions over cached documents, by every method, cold and after a restart."""
    from .bench.demo import DemoOptions, run_demo

    options = DemoOptions(model=model, docs=docs, question=question, json=json, report=report, store=store, quick=quick)
    run_demo(options)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(BENCHMARKS)}.")],
    json: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Run one benchmark and print its figures."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    from .bench.report import BenchResult

    result = import_module(BENCHMARKS[name], __package__).run(quick=quick)
    if not isinstance(result, BenchResult):
        raise TypeError(f"benchmark {name} returned {type(result).__name__}; expected BenchResult")
    if json:
        result.write(json)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Option("--dir", metavar="DIR", help="Folder whose disk is measured.")] = Path(),
    json: JsonFile = None,
) -> None:
    """Show versions, devices, copy and disk speed, and which extras are usable."""
    from .bench.doctor import diagnose, show

    result = diagnose(folder)
    show(result)
    if json:
        result.write(json)


if __name__ == "__main__":
    main()
