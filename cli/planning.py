"""Commands that predict: `simulate`, `plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    DiskFolder,
    JsonFile,
    ReportFile,
    drawing_path,
    file_path,
    read_list,
    read_numbers,
    read_percentages,
    read_tokens,
)
from .output import finish, refuse_without_model

Gpu = Annotated[str, typer.Option(metavar="NAME", help="GPU by name or by figures; `here` measures this machine.")]
Gpus = Annotated[int, typer.Option(metavar="N", help="GPUs that share an engine.")]
Tiers = Annotated[
    list[str] | None,
    typer.Option("--tier", metavar="NAME=SIZE[@GB/s]", help="A place for chunks, such as disk=4TB@7; repeatable."),
]
Assume = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=VALUE", help="Another value of what `kvloom plan` lists last; repeatable."),
]


def simulate(
    trace: Annotated[
        Path,
        typer.Argument(metavar="TRACE.jsonl", callback=file_path, help="Requests as JSON lines, in Mooncake's format."),
    ],
    capacity: Annotated[
        str, typer.Option(metavar="SHARES", help="Capacities, in % of the bytes of all different blocks.")
    ] = "2%,5%,10%,25%",
    codec_ratio: Annotated[
        str, typer.Option(metavar="RATIOS", help="How many times smaller a codec makes a block.")
    ] = "1",
    policy: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Only these beside lru and default; default: all.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Times to first token, too: a model as for `kvloom plan`.")
    ] = None,
    gpu: Gpu = "here",
    gpus: Gpus = 1,
    tier: Tiers = None,
    codec: Annotated[str, typer.Option(metavar="NAMES", help="With --model: codecs of stored chunks.")] = "raw",
    engines: Annotated[
        int | None, typer.Option(metavar="N", help="With --model: engines; default: as many as computing needs.")
    ] = None,
    assume: Assume = None,
    json: JsonFile = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=drawing_path, help="Draw hit ratios (.svg, or .html with tables)."),
    ] = None,
) -> None:
    """Replay a recorded trace: hit ratios; with --model, times to first token by rules of loading."""
    capacities, codec_ratios = read_percentages(capacity, "--capacity"), read_numbers(codec_ratio, "--codec-ratio")
    policies = None if policy is None else read_list(policy, "--policy")
    from ..bench.eviction.simulate import SimulateOptions
    from ..bench.eviction.simulate import simulate as replay

    more = {} if policies is None else {"policies": policies}
    if model is None:
        refuse_without_model(gpu=None if gpu == "here" else gpu, tier=tier, engines=engines, assume=assume)
        finish(replay(SimulateOptions(trace, capacities, codec_ratios, **more)), json, report)
        return
    from ..bench.plan.machines import DEFAULT_TIERS, read_assumptions
    from ..bench.plan.run import PlanOptions
    from ..bench.schedule.run import with_schedules

    options = PlanOptions(
        model=model,
        context_tokens=1 << 15,
        gpu=gpu,
        gpus=gpus,
        tiers=tier or DEFAULT_TIERS,
        codecs=read_list(codec, "--codec"),
        traffic=str(trace),
        engines=engines,
        assume=read_assumptions(assume or ()),
    )
    found = replay(SimulateOptions(trace, capacities, codec_ratios, **more))
    finish(with_schedules(found, options), json, report)


def plan(
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="Folder with config.json, a known name, layers=32,kv_heads=8,...; or `reference`."
        ),
    ],
    context: Annotated[str, typer.Option(metavar="TOKENS", help="Tokens of a prompt, such as 131072 or 128k.")] = "32k",
    gpu: Gpu = "here",
    gpus: Gpus = 1,
    tier: Tiers = None,
    codec: Annotated[str, typer.Option(metavar="NAMES", help="Codecs to compare.")] = "raw,int4",
    traffic: Annotated[
        str | None,
        typer.Option(metavar="TRACE|zipf:...", help="Requests: a trace, or zipf:documents=10000,alpha=1,rate=2."),
    ] = None,
    policy: Annotated[str, typer.Option(metavar="NAME", help="Eviction policy.")] = "default",
    engines: Annotated[
        int | None, typer.Option(metavar="N", help="Engines to simulate; default: as many as each way needs.")
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COST", help="Cost of an hour: of a gpu, of a GB of host, disk...; repeatable."),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(metavar="NAME=N,...", help="Machines that share chunks: nodes=1000,chunks=1e9,rate=1.")
    ] = None,
    assume: Assume = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of weights and KV: bfloat16, float16 or float32.")
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=file_path, help="Of the model, for codecs that need one.")
    ] = None,
    folder: DiskFolder = Path(),
    json: JsonFile = None,
    report: ReportFile = None,
) -> None:
    """Predict what hardware would do for long contexts: bytes, capacity, hits, times to first token, cost."""
    from ..bench.plan.machines import DEFAULT_TIERS, read_assumptions, read_prices
    from ..bench.plan.run import PlanOptions
    from ..bench.plan.run import plan as predict
    from ..bench.plan.scale import Pool

    options = PlanOptions(
        model=model,
        context_tokens=read_tokens(context, "--context"),
        gpu=gpu,
        gpus=gpus,
        tiers=tier or DEFAULT_TIERS,
        codecs=read_list(codec, "--codec"),
        traffic=traffic,
        policy=policy,
        engines=engines,
        prices=read_prices(price or ()),
        assume=read_assumptions(assume or ()),
        profile=profile,
        dtype=dtype,
        folder=folder,
        pool=None if pool is None else Pool.read(pool),
    )
    finish(predict(options), json, report)
