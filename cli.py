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

BENCHMARKS = {
    "blend": ".bench.blend.run",
    "codecs": ".bench.codecs.run",
    "retrieval": ".bench.retrieval.run",
    "tiers": ".bench.tiers.run",
    "vllm": ".bench.vllm.run",
}
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


def _parts(text: str) -> list[str]:
    """Items of a comma-separated list."""
    return [part.strip() for part in text.split(",")]


def _number(text: str, name: str, example: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(
            f"{name} is {text!r}; expected {example}, or several of the kind with commas between"
        ) from error


def _share(text: str) -> float:
    """`"5%"` is 0.05."""
    if not text.endswith("%"):
        raise ValueError(f"capacity is {text!r}; expected a percentage such as 5%")
    return _number(text.removesuffix("%"), "capacity", "a percentage such as 5%") / 100


def _tokens(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"size is {text!r}; expected a number of tokens such as 4096, or several with commas between")
    return int(text)


def _parameter(text: str) -> tuple[str, int | float | str]:
    """`"rank=160"` is `("rank", 160)`; what is no number stays text."""
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise ValueError(f"parameter is {text!r}; expected NAME=VALUE")
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


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
    from .bench.demo.run import DemoOptions, run_demo

    options = DemoOptions(model=model, docs=docs, question=question, json=json, report=report, store=store, quick=quick)
    run_demo(options)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"One of: {', '.join(BENCHMARKS)}.")],
    json: JsonFile = None,
    quick: Quick = False,
    folder: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", help="codecs, tiers, vllm: folder whose disk is measured; default: here."),
    ] = None,
    lmcache_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="tiers, vllm: python that has LMCache; default: .venv-lmcache/bin/python, if there."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="codecs, retrieval, vllm: a page of tables and plots.")
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="retrieval: contexts on the bundled model, e.g. 4096,8192.")
    ] = None,
) -> None:
    """Run one benchmark and print its figures."""
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(BENCHMARKS)}")
    options: dict[str, object] = {}
    for flag, option, value, takers in (
        ("--dir", "folder", folder, ("codecs", "tiers", "vllm")),
        ("--lmcache-python", "lmcache_python", lmcache_python, ("tiers", "vllm")),
        ("--report", "report", report, ("codecs", "retrieval", "vllm")),
        ("--sizes", "sizes", sizes, ("retrieval",)),
    ):
        if value is not None and name not in takers:
            listed = " and ".join(part for part in (", ".join(takers[:-1]), takers[-1]) if part)
            raise ValueError(f"{flag} belongs to {listed}, not to {name}")
        if value is not None:
            options[option] = value
    if sizes is not None:
        options["sizes"] = [_tokens(part) for part in _parts(sizes)]
    from .evaluation.report import BenchResult

    result = import_module(BENCHMARKS[name], __package__).run(quick=quick, **options)
    if not isinstance(result, BenchResult):
        raise TypeError(f"benchmark {name} returned {type(result).__name__}; expected BenchResult")
    if json:
        result.write(json)


ModelDir = Annotated[
    str, typer.Argument(metavar="MODEL", help="Local Hugging Face folder; `reference` for the bundled model.")
]
ModelId = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Name of weights and adapter, as the server gives it; default: hash of both."),
]
Dtype = Annotated[
    str | None, typer.Option(metavar="NAME", help="Precision of the weights: auto, float32, bfloat16, float16.")
]
Texts = Annotated[
    list[Path] | None, typer.Option("--text", metavar="FILE", help="Text file, or folder of them; may be repeated.")
]


def _model_dir(model: str) -> Path | None:
    return None if model == "reference" else Path(model)


@app.command()
def calibrate(
    model: ModelDir,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", callback=_output_file, help="Write the profile here.")
    ],
    text: Texts = None,
    sequences: Annotated[int, typer.Option(min=1, help="Token sequences; fewer if the text is short.")] = 16,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens in each.")] = 2048,
    centroids: Annotated[
        int, typer.Option(min=1, max=65536, help="Of each codebook of vq; fewer of few tokens.")
    ] = 4096,
    model_id: ModelId = None,
    dtype: Dtype = None,
) -> None:
    """Learn a model's keys and values from text: the profile that nuq, lowrank, entropy, kv4 and vq need."""
    if not text:
        raise ValueError("no text; name files or folders of it with --text")
    from .certify.calibrate import CalibrateOptions, run_calibrate

    options = CalibrateOptions(
        model=_model_dir(model),
        texts=text,
        out=out,
        sequences=sequences,
        tokens=tokens,
        centroids=centroids,
        model_id=model_id,
        dtype=dtype,
    )
    run_calibrate(options)


@app.command()
def certify(
    model: ModelDir,
    codec: Annotated[
        str | None, typer.Option(metavar="NAME", help="Codec, for instance nuq4 or lowrank4+nuq4.")
    ] = None,
    retrieval: Annotated[
        str | None, typer.Option(metavar="NAME", help="Or how decoding attends, for instance landmarks or vq.")
    ] = None,
    fusion: Annotated[
        bool, typer.Option("--fusion", help="Or what share of the tokens of cached documents must be recomputed.")
    ] = False,
    ratios: Annotated[
        str, typer.Option(metavar="SHARES", help="fusion: shares to try; the smallest that passes is certified.")
    ] = "0.05,0.1,0.15,0.2,0.3,0.5",
    budget: Annotated[
        float, typer.Option(metavar="SHARE", help="retrieval: tokens chosen for each KV head; 0.03 is 3 %.")
    ] = 0.03,
    budget_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: at least so many of them.")] = 0,
    sink_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: first tokens, always attended to.")] = 16,
    near_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: last tokens, always attended to.")] = 128,
    dense_layers: Annotated[int, typer.Option(metavar="N", help="retrieval: first layers that attend to all.")] = 0,
    pooling: Annotated[str, typer.Option(metavar="NAME", help="retrieval: how query heads agree, max or sum.")] = "max",
    parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="retrieval: a parameter of the method's own; may be repeated."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Profile of the model, from `kvloom calibrate`.")
    ] = None,
    text: Texts = None,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="needle, record, alias, needle8; auto: those the model knows; none.")
    ] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="Of each kind of task.")] = 200,
    context_tokens: Annotated[
        int | None, typer.Option(min=64, help="Of each task; default: 1024, with --retrieval 2048.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of held-out text.")] = 16,
    window_tokens: Annotated[int, typer.Option(min=16, help="Tokens in each.")] = 1024,
    max_perplexity_increase: Annotated[float, typer.Option(metavar="SHARE", help="Limit; 0.05 is 5 %.")] = 0.05,
    max_kl: Annotated[float, typer.Option(metavar="NATS", help="Limit of the divergence of a token.")] = 0.1,
    max_task_loss: Annotated[float, typer.Option(metavar="SHARE", help="Limit; 0.05 is 5 points.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", callback=_output_file, help="Write the certificate.")
    ] = None,
    model_id: ModelId = None,
    dtype: Dtype = None,
) -> None:
    """Measure what a codec, retrieval or fusion costs a model, and write the certificate that permits it.

    Exits with 1 if it does not pass.
    """
    if (codec is not None) + (retrieval is not None) + fusion != 1:
        raise ValueError("give one of --codec, --retrieval and --fusion")
    if fusion:
        from .certify.fusion import FusionOptions, certify_fusion
        from .evaluation.quality import KINDS

        asked = FusionOptions(
            model=_model_dir(model),
            ratios=[_number(share, "ratios", "shares such as 0.05,0.15") for share in _parts(ratios)],
            kinds=KINDS if tasks == "auto" else _parts(tasks),
            trials=trials,
            context_tokens=context_tokens or 1024,
            task_loss=max_task_loss,
            out=out,
            model_id=model_id,
            dtype=dtype,
        )
        if not certify_fusion(asked).passed:
            raise typer.Exit(1)
        return
    from .certify.certify import CertifyOptions
    from .certify.certify import certify as measure
    from .evaluation.quality import Limits
    from .retrieval.settings import Retrieval

    decoding = None
    if retrieval is not None:
        decoding = Retrieval(
            retrieval,
            budget_ratio=budget,
            budget_tokens=budget_tokens,
            sink_tokens=sink_tokens,
            window_tokens=near_tokens,
            dense_layers=dense_layers,
            pooling=pooling,  # type: ignore[arg-type]  # which it checks
            parameters=dict(map(_parameter, parameter or ())),
        )
    options = CertifyOptions(
        codec=codec,
        retrieval=decoding,
        model=_model_dir(model),
        profile=profile,
        texts=text or (),
        tasks=_parts(tasks),
        windows=windows,
        window_tokens=window_tokens,
        trials=trials,
        context_tokens=context_tokens,
        limits=Limits(max_perplexity_increase, max_kl, max_task_loss),
        out=out,
        model_id=model_id,
        dtype=dtype,
    )
    if not measure(options).passed:
        raise typer.Exit(1)


@app.command()
def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.jsonl", help="Requests as JSON lines, in Mooncake's format.")],
    capacity: Annotated[
        str, typer.Option(metavar="SHARES", help="Capacities, in % of the bytes of all different blocks.")
    ] = "2%,5%,10%,25%",
    codec_ratio: Annotated[
        str, typer.Option(metavar="RATIOS", help="How many times smaller a codec makes a block.")
    ] = "1",
    policy: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these beside lru and default; default: all.")
    ] = None,
    json: JsonFile = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            "--plot",
            metavar="FILE",
            callback=_output_file,
            help="Draw hit ratios (.svg, or .html with tables).",
        ),
    ] = None,
) -> None:
    """Replay a recorded trace: hit ratios by eviction policy, capacity and codec ratio."""
    from .bench.eviction.run import SimulateOptions, simulate
    from .kvstore.eviction.policy import POLICIES

    options = SimulateOptions(
        trace=trace,
        capacity_ratios=[_share(text) for text in _parts(capacity)],
        codec_ratios=[_number(text, "codec ratio", "4") for text in _parts(codec_ratio)],
        policies=list(POLICIES) if policy is None else _parts(policy),
        json=json,
        report=report,
    )
    simulate(options)


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
