"""Commands that prepare what may lose something: `calibrate` learns profiles, `certify` measures and permits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import (
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
    sequences: Annotated[int, typer.Option(min=1, help="Token sequences; fewer if the text is short.")] = 16,
    tokens: Annotated[int, typer.Option(min=16, help="Tokens in each.")] = 2048,
    centroids: Annotated[
        int, typer.Option(min=1, max=65536, help="Of each codebook of vq; fewer of few tokens.")
    ] = 4096,
    model_id: ModelId = None,
    dtype: Dtype = None,
) -> None:
    """Learn a model's keys and values from text: the profile that nuq, lowrank, kv4 and vq need."""
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
            centroids=centroids,
            model_id=model_id,
            dtype=dtype,
        )
    )


def certify(
    model: ModelFolder,
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
    budget_ratio: Annotated[
        float, typer.Option(metavar="SHARE", help="retrieval: tokens chosen for each KV head; 0.03 is 3 %.")
    ] = 0.03,
    budget_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: at least so many of them.")] = 0,
    sink_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: first tokens, always attended to.")] = 16,
    window_tokens: Annotated[int, typer.Option(metavar="N", help="retrieval: last tokens, always attended to.")] = 128,
    dense_layers: Annotated[int, typer.Option(metavar="N", help="retrieval: first layers that attend to all.")] = 0,
    pooling: Annotated[str, typer.Option(metavar="NAME", help="retrieval: how query heads agree, max or sum.")] = "max",
    parameter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="retrieval: a parameter of the method's own; may be repeated."),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="FILE", callback=file_path, help="Profile of the model, from `kvloom calibrate`."),
    ] = None,
    text: Texts = None,
    text_windows: Annotated[int, typer.Option(min=1, help="Windows of held-out text.")] = 16,
    text_window_tokens: Annotated[int, typer.Option(min=16, help="Tokens in each.")] = 1024,
    tasks: Annotated[
        str, typer.Option(metavar="NAMES", help="needle, record, alias, needle8; auto: those the model knows; none.")
    ] = "auto",
    trials: Annotated[int, typer.Option(min=1, help="Of each kind of task.")] = 200,
    context_tokens: Annotated[
        int | None, typer.Option(min=64, help="Of each task; default: 1024, with --retrieval 2048.")
    ] = None,
    max_perplexity_increase: Annotated[float, typer.Option(metavar="SHARE", help="Limit; 0.05 is 5 %.")] = 0.05,
    max_kl: Annotated[float, typer.Option(metavar="NATS", help="Limit of the divergence of a token.")] = 0.1,
    max_task_loss: Annotated[float, typer.Option(metavar="SHARE", help="Limit; 0.05 is 5 points.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", callback=output_path, help="Write the certificate.")
    ] = None,
    model_id: ModelId = None,
    dtype: Dtype = None,
) -> None:
    """Measure what a codec, retrieval or fusion costs a model, and write the certificate that permits it.

    Exits with 1 if it does not pass.
    """
    if (codec is not None) + (retrieval is not None) + fusion != 1:
        raise ValueError("give one of --codec, --retrieval and --fusion")
    kinds = read_list(tasks, "--tasks")
    if fusion:
        shares = read_numbers(ratios, "--ratios")
        from ..certify.fusion import FusionOptions, certify_fusion

        asked = FusionOptions(
            model=model_folder(model),
            ratios=shares,
            tasks=kinds,
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
    )
    if not measure(options).passed:
        raise typer.Exit(1)
