"""Commands that prepare what may lose something: `calibrate` learns profiles, `certify` measures and permits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    Device,
    Dtype,
    ModelFolder,
    ModelId,
    Texts,
    file_path,
    model_folder,
    output_path,
    read_list,
    read_numbers,
    read_parameter,
)


def calibrate(
    model: ModelFolder,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", callback=output_path, help="Write the profile here.")
    ],
    text: Texts = None,
    sequences: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences; fewer if the text is short.")] = 8,
    tokens: Annotated[int, typer.Option(metavar="N", min=16, help="Tokens of each sequence.")] = 2048,
    gradients: Annotated[
        int, typer.Option(metavar="N", min=1, help="Sequences that tell what errors cost; they take most of the time.")
    ] = 2,
    centroids: Annotated[
        int, typer.Option(metavar="N", min=1, max=65536, help="Centroids of each codebook of vq, at most.")
    ] = 4096,
    model_id: ModelId = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Learn a model's keys and values from text: the profile that nuq, transform, lowrank, vq and corrections need."""
    if not text:
        raise ValueError("no text; name files or folders of it with --text")
    from ..certify.calibrate import CalibrateOptions, run_calibrate

    run_calibrate(
        CalibrateOptions(
            model=model_folder(model),
            texts=text,
            out=out,
            sequences=sequences,
            tokens=tokens,
            gradients=gradients,
            centroids=centroids,
            model_id=model_id,
            dtype=dtype,
            device=device,
        )
    )


RETRIEVAL, EXTENT, LIMITS = "With --retrieval", "What is measured on", "Limits, at the bad end of the 95 % interval"


BELONGS_TO = {  # options that say nothing in the other cases
    **dict.fromkeys(("ratios", "select", "check_layer"), ("fusion",)),
    **dict.fromkeys(
        (
            *("budget_ratio", "coverage", "budget_tokens", "sink_tokens", "window_tokens", "dense_layers", "pooling"),
            "parameter",
        ),
        ("retrieval",),
    ),
    **dict.fromkeys(
        ("text", "text_windows", "text_window_tokens", "max_perplexity_increase", "max_kl"),
        ("codec", "retrieval"),
    ),
}


def certify(
    context: typer.Context,
    model: ModelFolder,
    codec: Annotated[str | None, typer.Option(metavar="NAME", help="Measure a codec: nuq4, lowrank4+nuq4, ...")] = None,
    retrieval: Annotated[
        str | None, typer.Option(metavar="NAME", help="Measure decoding with retrieval: landmarks, factor, vq, ...")
    ] = None,
    fusion: Annotated[
        bool, typer.Option("--fusion", help="Find the smallest share of cached documents that must be recomputed.")
    ] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=file_path, help="From `kvloom calibrate`; with --fusion, its correction."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", callback=output_path, help="Write the certificate.")
    ] = None,
    model_id: ModelId = None,
    dtype: Dtype = None,
    device: Device = None,
    ratios: Annotated[
        str,
        typer.Option(metavar="SHARES", rich_help_panel="With --fusion", help="Shares of recomputed tokens to try."),
    ] = "0.05,0.1,0.15,0.2,0.3,0.5",
    select: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel="With --fusion",
            help="How tokens are chosen: deviation, values, question, first+question, ...; default: what does best.",
        ),
    ] = None,
    check_layer: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel="With --fusion", help="Layer whose keys and values are compared."),
    ] = None,
    budget_ratio: Annotated[
        float,
        typer.Option(
            metavar="SHARE", rich_help_panel=RETRIEVAL, help="Tokens chosen for each KV head; 0.03 is 3 % of them."
        ),
    ] = 0.03,
    coverage: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=RETRIEVAL,
            help="Attend to the fewest of the chosen tokens that hold this share of the attention.",
        ),
    ] = None,
    budget_tokens: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=RETRIEVAL, help="Tokens chosen at least.")
    ] = 0,
    sink_tokens: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=RETRIEVAL, help="First tokens, always attended to.")
    ] = 16,
    window_tokens: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=RETRIEVAL, help="Last tokens, always attended to.")
    ] = 128,
    dense_layers: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=RETRIEVAL, help="First layers, which attend to all tokens.")
    ] = 0,
    pooling: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=RETRIEVAL, help="How query heads agree: max or sum.")
    ] = "max",
    parameter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", rich_help_panel=RETRIEVAL, help="A parameter of the method; may be repeated."
        ),
    ] = None,
    text: Texts = None,
    text_windows: Annotated[
        int, typer.Option(metavar="N", min=1, rich_help_panel=EXTENT, help="Windows of held-out text.")
    ] = 16,
    text_window_tokens: Annotated[
        int, typer.Option(metavar="N", min=16, rich_help_panel=EXTENT, help="Tokens of each window.")
    ] = 1024,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            rich_help_panel=EXTENT,
            help="needle, needle8, record, alias, astride, extract; auto: what the model knows; none.",
        ),
    ] = "auto",
    trials: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=EXTENT, help="Tasks of each kind.")] = 200,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=64, rich_help_panel=EXTENT, help="Tokens of a task; default: 1024, 2048 for retrieval."
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        float, typer.Option(metavar="SHARE", rich_help_panel=LIMITS, help="Relative; 0.05 is 5 %.")
    ] = 0.05,
    max_kl: Annotated[float, typer.Option(metavar="NATS", rich_help_panel=LIMITS, help="KL divergence a token.")] = 0.1,
    max_task_loss: Annotated[
        float, typer.Option(metavar="SHARE", rich_help_panel=LIMITS, help="Answers lost; 0.05 is 5 points.")
    ] = 0.05,
) -> None:
    """Measure what a codec, retrieval or fusion costs a model, and write the certificate that permits it.

    Exits with 1 if it does not pass.
    """
    if (codec is not None) + (retrieval is not None) + fusion != 1:
        raise ValueError("give one of --codec, --retrieval and --fusion")
    chosen = "fusion" if fusion else "codec" if retrieval is None else "retrieval"
    for name, takers in BELONGS_TO.items():
        source = context.get_parameter_source(name)
        if chosen not in takers and source is not None and source.name == "COMMANDLINE":
            option, known = name.replace("_", "-"), " and ".join(f"--{taker}" for taker in takers)
            raise ValueError(f"--{option} belongs to {known}, not to --{chosen}; leave it out")
    kinds = read_list(tasks, "--tasks")
    if fusion:
        shares = read_numbers(ratios, "--ratios")
        from ..certify.fusion import FusionOptions, certify_fusion

        asked = FusionOptions(
            model=model_folder(model),
            ratios=shares,
            select=select,
            check_layer=check_layer,
            profile=profile,
            tasks=kinds,
            trials=trials,
            context_tokens=context_tokens or 1024,
            task_loss=max_task_loss,
            out=out,
            model_id=model_id,
            dtype=dtype,
            device=device,
        )
        if not certify_fusion(asked).passed:
            raise typer.Exit(1)
        return
    parameters = dict(map(read_parameter, parameter or ()))
    from ..certify.certify import CertifyOptions
    from ..certify.certify import certify as measure
    from ..evaluation.quality import Limits
    from ..retrieval.settings import Retrieval

    decoding = None
    if retrieval is not None:
        decoding = Retrieval(
            retrieval,
            budget_ratio=budget_ratio,
            coverage=coverage,
            budget_tokens=budget_tokens,
            sink_tokens=sink_tokens,
            window_tokens=window_tokens,
            dense_layers=dense_layers,
            pooling=pooling,  # type: ignore[arg-type]  # which it checks
            parameters=parameters,
        )
    options = CertifyOptions(
        codec=codec,
        retrieval=decoding,
        model=model_folder(model),
        profile=profile,
        texts=text or (),
        tasks=kinds,
        windows=text_windows,
        window_tokens=text_window_tokens,
        trials=trials,
        context_tokens=context_tokens,
        limits=Limits(max_perplexity_increase, max_kl, max_task_loss),
        out=out,
        model_id=model_id,
        dtype=dtype,
        device=device,
    )
    if not measure(options).passed:
        raise typer.Exit(1)
