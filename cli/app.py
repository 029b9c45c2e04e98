"""The entry point of the `kvloom` command. Expected failures are one line on stderr and exit code 2."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from .. import __version__
from ..errors import KVLoomError
from ..service import command as service
from . import bench, certify, explain, planning, rag

COLUMNS = (40, 1000)  # what a terminal may say of its width; anything else is as good as nothing said


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"kvloom {__version__}")
        raise typer.Exit


app = typer.Typer(
    name="kvloom",
    help="Keep, compress, search and fuse the KV caches of long contexts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(rag.ask)
app.command()(bench.demo)
app.add_typer(bench.app)
app.command()(certify.calibrate)
app.command()(certify.certify)
app.command()(planning.simulate)
app.command()(planning.plan)
app.command()(bench.doctor)
app.command()(explain.explain)
app.command()(service.serve)
app.add_typer(service.config_app)
app.add_typer(service.token_app)

# Typer brings its own click, or uses the one that is installed: its refusals are known by their common base.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; `args` as in `sys.argv[1:]`. Always ends with `SystemExit`."""
    args = list(sys.argv[1:] if args is None else args)
    _forget_absurd_width()
    try:
        _refuse_empty(args)
        code = app(args, prog_name="kvloom", standalone_mode=False)
    except UsageError as error:
        _fail(error, _usage_message(error))
    except ImportError as error:
        missing = error.name or ""
        if missing.split(".")[0] == __package__.split(".")[0]:  # a bug of ours, not a package to install
            raise
        _fail(error, f'{missing} is not installed; run: pip install "kvloom[bench]"' if missing else str(error))
    except (KVLoomError, OSError, ValueError) as error:
        _fail(error, str(error) or type(error).__name__)
    sys.exit(code if isinstance(code, int) else 0)


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Holds the options that stand before a command."""


def _refuse_empty(args: Sequence[str]) -> None:
    """Nothing that a command takes may be empty, and an empty path would be the current folder."""
    for before, arg in zip(("", *args), args, strict=False):
        if not arg or (arg.startswith("--") and arg.endswith("=") and arg.count("=") == 1):
            name = arg.removesuffix("=") or (before if before.startswith("-") else "")
            raise ValueError(f"{name or 'an argument'} is empty; give it a value, or leave it out")


def _usage_message(error: Exception) -> str:
    """Typer's message about wrong arguments, and where to read on; empty if it has printed the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    message = getattr(error, "format_message", error.__str__)().rstrip(".")
    context = getattr(error, "ctx", None)
    if context is None:
        return str(message)
    if message.startswith("No such command"):
        message += f"; known: {', '.join(context.command.commands)}"
    return f"{message}; see {context.command_path} --help"


def _fail(error: Exception, message: str) -> NoReturn:
    """One line and exit code 2; with `KVLOOM_TRACEBACK` set, the whole story."""
    if os.environ.get("KVLOOM_TRACEBACK"):
        raise error
    if message:
        typer.echo(f"kvloom: {' '.join(message.split())}", err=True)
    sys.exit(2)


def _forget_absurd_width() -> None:
    """`COLUMNS=0` makes tables and help vanish; then the terminal itself is asked."""
    least, most = COLUMNS
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and not (len(columns) < 9 and least <= int(columns) <= most):
        del os.environ["COLUMNS"]
