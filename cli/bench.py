"""Commands that measure: `demo`, `bench`, `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DiskFolder,
    JsonFile,
    Quick,
    ReportFile,
    any_path,
    file_path,
    folder_path,
    read_list,
    read_token_counts,
)
from .output import finish as _finish
from .output import refuse_without_model as _refuse_without_model

app = typer.Typer(name="bench", help="Run one benchmark and print its figures.", no_args_is_help=True)

LMCachePython = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH", callback=file_path, help="Python that has LMCache; default: that of `make engines`, if there."
    ),
]


Pretrained = Annotated[
    Path | None, typer.Option(metavar="DIR", callback=folder_path, help="A pretrained model instead, and it alone.")
]
Device = Annotated[
    str | None, typer.Option(metavar="NAME", help="With --model: cpu or cuda; default: a GPU if there is one.")
]
Questions = Annotated[int | None, typer.Option(metavar="N", min=1, help="With --model: questions of each kind.")]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="With --model: processes that share the work; default: one a core."),
]


@app.command()
def blend(
    json: JsonFile = None,
    quick: Quick = False,
    model: Pretrained = None,
    device: Device = None,
    full: Annotated[
        bool, typer.Option("--full", help="All tasks, some minutes more; with --model, all kinds and methods, hours.")
    ] = False,
    questions: Annotated[int | None, typer.Option(metavar="N", min=2, help="With --model: of each kind.")] = None,
    kinds: Annotated[
        str | None, typer.Option(metavar="KINDS", help="Kinds of question, with --model, e.g. astride,multihop.")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=256, help="With --model: tokens of a question's documents.")
    ] = None,
    times: Annotated[bool, typer.Option(help="Measure times to first token, with --model.")] = True,
    processes: Processes = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.1, help="After them no question begins; default: 14, with --full none."),
    ] = None,
) -> None:
    """Fused documents beside full prefill: answers and time to first token, by ratio and length."""
    from ..bench.blend.quality import KINDS
    from ..bench.blend.run import run

    names = [] if kinds is None else read_list(kinds, "--kinds")
    if unknown := [name for name in names if name not in KINDS]:
        raise typer.BadParameter(f"{', '.join(unknown)}; expected some of {', '.join(KINDS)}", param_hint="--kinds")
    found = run(
        quick=quick,
        model_dir=model,
        device=device,
        full=full,
        questions=questions,
        kinds=names,
        context_tokens=context_tokens,
        timed=times,
        processes=processes,
        minutes=minutes,
    )
    _finish(found, json)


@app.command()
def codecs(
    json: JsonFile = None,
    report: ReportFile = None,
    quick: Quick = False,
    folder: DiskFolder = Path(),
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", callback=folder_path, help="A pretrained model instead, and it alone.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --model: cpu or cuda; default: a GPU if there is one.")
    ] = None,
    windows: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="With --model: windows of text; default: 8.")
    ] = None,
) -> None:
    """Bytes, quality and speed of every codec."""
    if model is not None:
        from ..bench.codecs.pretrained import run as run_pretrained

        _finish(run_pretrained(model, device=device, quick=quick, windows=windows), json, report)
        return
    for name, value in (("--device", device), ("--windows", windows)):
        if value is not None:
            raise typer.BadParameter("needs --model", param_hint=name)
    from ..bench.codecs.run import run

    _finish(run(quick=quick, folder=folder), json, report)


@app.command("plan")
def check_plan(
    json: JsonFile = None, report: ReportFile = None, quick: Quick = False, folder: DiskFolder = Path()
) -> None:
    """What `kvloom plan` says of this machine, beside what it does; hits beside the simulator's; published figures."""
    from ..bench.plan.check import run

    _finish(run(quick=quick, folder=folder), json, report)


@app.command()
def controller(
    json: JsonFile = None, report: ReportFile = None, quick: Quick = False, folder: DiskFolder = Path()
) -> None:
    """Load or recompute in stock vLLM: always, never and kvloom's choice, by tier, length and load."""
    from ..bench.controller.run import run

    _finish(run(quick=quick, folder=folder), json, report)


@app.command()
def distributed(
    json: JsonFile = None,
    report: ReportFile = None,
    quick: Quick = False,
    folder: DiskFolder = Path(),
    lmcache_python: LMCachePython = None,
) -> None:
    """Redis, Mooncake and S3 as tiers, beside a bare client of each, and frozen; LMCache's benchmark above kvloom."""
    from ..bench.distributed.run import run

    _finish(run(quick=quick, folder=folder, lmcache_python=lmcache_python), json, report)


@app.command()
def eviction(json: JsonFile = None, report: ReportFile = None, quick: Quick = False) -> None:
    """Eviction policies on six kinds of traffic, between LRU and a cache that knows the future."""
    from ..bench.eviction.run import run

    _finish(run(quick=quick), json, report)


@app.command()
def retrieval(
    json: JsonFile = None,
    report: ReportFile = None,
    quick: Quick = False,
    sizes: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Contexts on the bundled model, e.g. 4096,8192.")
    ] = None,
    model: Pretrained = None,
    device: Device = None,
    questions: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="With --model: contexts; each is asked for all it states, and four times for one fact.",
        ),
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="With --model: tokens of a context; default: 2048.")
    ] = None,
    processes: Processes = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="N", min=0.1, help="With --model: after them no context begins; default: 14."),
    ] = None,
) -> None:
    """What choosing tokens loses and saves."""
    tokens = None if sizes is None else read_token_counts(sizes, "--sizes")
    if model is not None:
        if tokens is not None:
            raise typer.BadParameter("is about the bundled model; leave it out", param_hint="--sizes")
        from ..bench.retrieval.pretrained_run import run as run_pretrained

        found = run_pretrained(
            model,
            device=device,
            quick=quick,
            questions=questions,
            context_tokens=context_tokens,
            processes=processes,
            minutes=minutes,
        )
        _finish(found, json, report)
        return
    _refuse_without_model(device=device, questions=questions, context_tokens=context_tokens, minutes=minutes)
    from ..bench.retrieval.run import run

    _finish(run(quick=quick, sizes=tokens), json, report)


@app.command()
def schedule(
    json: JsonFile = None, report: ReportFile = None, quick: Quick = False, folder: DiskFolder = Path()
) -> None:
    """What `kvloom simulate --model` predicts of one trace, beside stock vLLM."""
    from ..bench.schedule.check import run

    _finish(run(quick=quick, folder=folder), json, report)


@app.command()
def service(
    json: JsonFile = None, report: ReportFile = None, quick: Quick = False, lmcache_python: LMCachePython = None
) -> None:
    """The service over shared memory and HTTP, beside a bare socket, Redis and LMCache; what it loses under load."""
    from ..bench.service.run import run

    _finish(run(quick=quick, lmcache_python=lmcache_python), json, report)


@app.command()
def tiers(
    json: JsonFile = None, quick: Quick = False, folder: DiskFolder = Path(), lmcache_python: LMCachePython = None
) -> None:
    """The store beside the machine's limits, and beside files, LMDB, SQLite and LMCache."""
    from ..bench.tiers.run import run

    _finish(run(quick=quick, folder=folder, lmcache_python=lmcache_python), json)


@app.command()
def sglang(json: JsonFile = None, quick: Quick = False, folder: DiskFolder = Path()) -> None:
    """A prefix hit from storage in stock SGLang, beside HiCache's own files; runs in SGLang's environment."""
    from ..bench.sglang.run import run

    _finish(run(quick=quick, folder=folder), json)


@app.command()
def vllm(
    json: JsonFile = None,
    report: ReportFile = None,
    quick: Quick = False,
    folder: DiskFolder = Path(),
    lmcache_python: LMCachePython = None,
    families: Annotated[
        bool, typer.Option("--families", help="Also start every family of docs/models.md; a few minutes more.")
    ] = False,
    long: Annotated[
        bool, typer.Option("--long", help="Only decoding through retrieval behind 64K tokens; some minutes.")
    ] = False,
) -> None:
    """Kvloom in stock vLLM beside vLLM's own caches and LMCache; runs in vLLM's environment."""
    if long:
        if families or lmcache_python is not None:
            raise typer.BadParameter("leaves out --families and --lmcache-python", param_hint="--long")
        from ..bench.vllm.long import run as run_long

        _finish(run_long(quick=quick, folder=folder), json, report)
        return
    from ..bench.vllm.run import run

    _finish(run(quick=quick, folder=folder, lmcache_python=lmcache_python, families=families), json, report)


def demo(
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", callback=folder_path, help="Model folder; default: the bundled one.")
    ] = None,
    docs: Annotated[
        Path | None, typer.Option(metavar="DIR", callback=folder_path, help="Folder of texts; default: bundled ones.")
    ] = None,
    question: Annotated[str | None, typer.Option(metavar="TEXT", help="Question about the documents.")] = None,
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", callback=any_path, help="Keep the cache here; default: removed.")
    ] = None,
    report: ReportFile = None,
    json: JsonFile = None,
    quick: Quick = False,
) -> None:
    """Answer questions over cached documents, by every method, cold and after a restart."""
    from ..bench.demo.run import DemoOptions, run_demo

    curves = report is not None
    options = DemoOptions(model=model, docs=docs, question=question, store=store, quick=quick, curves=curves)
    _finish(run_demo(options), json, report)


def doctor(
    folder: DiskFolder = Path(),
    url: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="A server to ask: a tier's URL, or http:// of a service or engine; repeatable."
        ),
    ] = None,
    speeds: Annotated[bool, typer.Option(help="Measure copies and the disk.")] = True,
    json: JsonFile = None,
) -> None:
    """Show versions, devices, speeds, extras, and which engines and servers are usable. Exit code 1: a URL is not."""
    from ..bench.doctor.run import diagnose

    found = diagnose(folder, url or (), speeds=speeds)
    _finish(found, json)
    if "unreachable" in found.metrics and found.metrics["unreachable"].value:
        raise typer.Exit(1)


@app.command()
def rag(
    json: JsonFile = None,
    report: ReportFile = None,
    quick: Quick = False,
    model: Pretrained = None,
    questions: Questions = None,
) -> None:
    """Questions over a corpus's cached KV beside a plain pipeline; the RAG frameworks that are installed, too."""
    from ..bench.rag.run import run

    _finish(run(quick=quick, model_dir=model, questions=questions), json, report)
