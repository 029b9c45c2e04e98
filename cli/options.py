"""Options that several commands have, and how their text is read."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from ..calibration.output_file import check_output


def any_path(path: Path | None) -> Path | None:
    """`~` expanded."""
    try:
        return None if path is None else path.expanduser()
    except RuntimeError as error:
        raise typer.BadParameter(f"{path}: there is no such home folder") from error


def output_path(path: Path | None) -> Path | None:
    """A file that can be written, so that no work is done in vain."""
    path = any_path(path)
    try:
        if path is not None:
            check_output(path)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return path


def report_path(path: Path | None) -> Path | None:
    """A page that can be written, and drawn."""
    return _report(path, ("", ".html"))


def drawing_path(path: Path | None) -> Path | None:
    """A page or a drawing that can be written, and drawn."""
    return _report(path, ("", ".html", ".svg"))


def _report(path: Path | None, suffixes: Sequence[str]) -> Path | None:
    path = output_path(path)
    if path is None:
        return None
    if path.suffix not in suffixes:
        raise typer.BadParameter(f"{path} ends in {path.suffix}; expected {' or '.join(filter(None, suffixes))}")
    if find_spec("matplotlib") is None:
        raise typer.BadParameter('plots need matplotlib; run: pip install "kvloom[bench]"')
    return path


def folder_path(path: Path | None) -> Path | None:
    """A folder that is there."""
    path = any_path(path)
    if path is not None and not path.is_dir():
        raise typer.BadParameter(f"{path} is not a folder")
    return path


def file_path(path: Path | None) -> Path | None:
    """A file that is there, or a pipe."""
    path = any_path(path)
    if path is not None and not path.exists():
        raise typer.BadParameter(f"there is no file {path}")
    if path is not None and path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; expected a file")
    return path


def text_paths(paths: list[Path] | None) -> list[Path] | None:
    """Files and folders that are there."""
    for path in paths or ():
        if not path.expanduser().exists():
            raise typer.BadParameter(f"there is no file or folder {path}")
    return None if paths is None else [path.expanduser() for path in paths]


def read_list(text: str, option: str) -> list[str]:
    """Items between commas."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{option} is {text!r}; expected items with one comma between two")
    return items


def read_numbers(text: str, option: str) -> list[float]:
    """Numbers between commas."""
    return [_number(item, option) for item in read_list(text, option)]


def read_percentages(text: str, option: str) -> list[float]:
    """`"5%,10%"` is 0.05 and 0.1."""
    items = read_list(text, option)
    if wrong := [item for item in items if not item.endswith("%")]:
        raise ValueError(f"{option} has {wrong[0]!r}; expected a percentage such as 5%")
    return [_number(item.removesuffix("%"), option) / 100 for item in items]


def read_token_counts(text: str, option: str) -> list[int]:
    """Numbers of tokens between commas."""
    items = read_list(text, option)
    if wrong := [item for item in items if not item.isdecimal()]:
        raise ValueError(f"{option} has {wrong[0]!r}; expected a number of tokens such as 4096")
    return [int(item) for item in items]


def read_tokens(text: str, option: str) -> int:
    """`"128k"` is 131072: `k` and `m` stand for 1,024 and for 1,048,576 tokens."""
    number, factor = text.strip().lower(), 1
    for unit, size in (("k", 1 << 10), ("m", 1 << 20)):
        if number.endswith(unit):
            number, factor = number.removesuffix(unit), size
    if not number.isdecimal() or not 0 < int(number) * factor < 1 << 40:
        raise ValueError(f"{option} is {text!r}; expected a number of tokens such as 131072 or 128k")
    return int(number) * factor


def read_parameter(text: str) -> tuple[str, int | float | str]:
    """`"rank=160"` is `("rank", 160)`; what is no number stays text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"--parameter is {text!r}; expected NAME=VALUE")
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{option} has {text!r}; expected a number") from error


JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", callback=output_path, help="Write the figures here as JSON.")
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", callback=report_path, help="Write a page of tables and plots."),
]
Quick = Annotated[bool, typer.Option("--quick", help="Smallest sizes: shows that it runs, proves nothing.")]
DiskFolder = Annotated[
    Path, typer.Option("--dir", metavar="DIR", callback=folder_path, help="Folder whose disk is measured.")
]
ModelFolder = Annotated[
    str, typer.Argument(metavar="MODEL", help="Local Hugging Face folder; `reference` for the bundled model.")
]
ModelId = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of the weights, as the server has it; default: the name of the folder."),
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cpu or cuda; default: a GPU if there is one.")]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Precision: auto, float32, bfloat16 or float16.")]
Texts = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="PATH", callback=text_paths, help="Text file or folder of them; may be repeated."),
]


def model_folder(model: str) -> Path | None:
    """None for the bundled model."""
    return None if model == "reference" else any_path(Path(model))
