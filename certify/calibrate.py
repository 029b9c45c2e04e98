"""Makes the profile of a model from text files: `kvloom calibrate`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from .. import __version__
from ..blend.correction import WEIGHTS
from ..calibration.model_profile import Profile
from ..connectors.hf.model import TransformersModel
from ..evaluation.models import load_model
from ..evaluation.page import Row, Table
from ..evaluation.screen import output, print_table, progress
from ..evaluation.texts import read_texts
from ..evaluation.windows import (
    GRADIENT_SEQUENCES,
    SEQUENCE_TOKENS,
    SEQUENCES,
    STRINGS_RATIO,
    string_windows,
    token_windows,
)
from ..retrieval.vq.vq_fit import CENTROIDS, distance_bands, fit_layer
from .calibrate_model import calibrate, stage_units
from .correction_fit import learn_correction
from .method_fits import LAYER_FITS, LEFT_OUT

_STAGES = {"forward": "hidden states", "backward": "keys, values, gradients", "fit": "fitting layers"}


@dataclass(frozen=True, slots=True)
class CalibrateOptions:
    """Options of a calibration.

    Attributes
    ----------
    out : the profile; one that is there is replaced in one step.
    texts : files and folders of text like that which will be served.
    model : a Hugging Face folder; None for the bundled reference model.
    sequences, tokens : of calibration; less if the text is short.
    gradients : so many of the sequences tell what errors cost.
    centroids : of each KV head's codebook, at most; fewer if there are few tokens.
    model_id, dtype, device : as for `CertifyOptions`.
    """

    out: Path
    texts: Sequence[Path]
    model: Path | None = None
    sequences: int = SEQUENCES
    tokens: int = SEQUENCE_TOKENS
    gradients: int = GRADIENT_SEQUENCES
    centroids: int = CENTROIDS
    model_id: str | None = None
    dtype: str | None = None
    device: str | None = None


def run_calibrate(options: CalibrateOptions) -> Profile:
    """Calibrate, write the profile, print what is in it, and return it.

    Raises
    ------
    ValueError : no text, too little of it, or no usable model.
    EngineError : the model is of a kind that is not supported.
    """
    texts = read_texts(options.texts)
    began_s = time.perf_counter()
    with progress() as bar:
        loading = bar.add_task("loading the model", total=1, logged=False)
        model, tokenizer = load_model(options.model, dtype=options.dtype, device=options.device)
        bar.advance(loading)
        tokens = min(options.tokens, model.config.max_position_embeddings)
        windows = token_windows(tokenizer, texts, sequences=options.sequences, tokens=tokens)
        strings = string_windows(tokenizer, sequences=round(STRINGS_RATIO * len(windows)), tokens=len(windows[0]))
        fits = dict(LAYER_FITS)
        if "vq" in fits:
            bands = distance_bands(model.config.max_position_embeddings)
            fits["vq"] = partial(fit_layer, centroids=options.centroids, bands=bands)
        totals = stage_units(
            model.config.num_hidden_layers, windows, strings=strings, gradient_windows=options.gradients
        )
        bars = {stage: bar.add_task(_STAGES[stage], total=total) for stage, total in totals.items()}
        fusing = bar.add_task("fusion", total=sum(map(len, windows)))
        profile = calibrate(
            model,
            windows,
            model_id=options.model_id,
            layer_fits=fits,
            strings=strings,
            gradient_windows=options.gradients,
            meta={"texts": ", ".join(str(path) for path in options.texts), "version": __version__},
            advance=lambda stage, done: bar.advance(bars[stage], done),
        )
        layers = TransformersModel(model, model_id=profile.spec.model_id)  # its weights are not read once more
        correction = learn_correction(layers, tokenizer, windows, advance=partial(bar.advance, fusing))
        profile = replace(profile, tensors={**profile.tensors, **correction})
    profile.save(options.out)
    _show(profile, options.out, time.perf_counter() - began_s)
    return profile


def _show(profile: Profile, path: Path, elapsed_s: float) -> None:
    console = output()
    counts, sizes = Counter[str](), Counter[str]()
    for name, tensor in profile.tensors.items():
        method = name.partition(".")[0]
        counts[method] += 1
        sizes[method] += tensor.nbytes
    rows: list[Row] = [[method, counts[method], sizes[method]] for method in sorted(counts)]
    print_table(console, Table(["for", "tensors", "bytes"], rows, f"profile of {profile.spec.model_id[:24]}"))
    meta = profile.meta
    console.print(
        f"{meta['sequences']} sequences, {int(meta['tokens']):,} tokens, loss {meta['loss']} nats a token, "
        f"{elapsed_s:.0f} s: {path}"
    )
    if WEIGHTS not in profile.tensors:
        console.print("nothing for fusion, which needs two documents or more: give more --text")
    for method, missing in LEFT_OUT.items():
        console.print(f"nothing for {method}, which needs {', '.join(missing)}")
