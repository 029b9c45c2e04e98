"""The ways of choosing tokens that are measured, by the name to show, and what they learn of a model beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...calibration.model_profile import Profile
from ...certify.calibrate_model import calibrate
from ...evaluation.passages import load_heldout, load_questions
from ...evaluation.windows import STRINGS_RATIO, string_windows, token_windows
from ...retrieval.per_head import PerHeadSelector
from ...retrieval.registry import selector_by_name
from ...retrieval.selector import LayerShape, Selector
from ...retrieval.vq.vq_fit import distance_bands, fit_layer
from .faiss_index import HnswIndex, IvfIndex
from .ruler import AGGREGATION

EXACT, RANDOM, VQ = "exact", "random", "vq"
TEXT = "text"  # a kind of context beside RULER's: held-out prose, continued
CENTROIDS = 512  # A2ATS's 4,096 serve 128K tokens; as many would be half of the bytes of a context of 8K here

Factory: TypeAlias = Callable[[int, LayerShape, int], Selector]
"""An empty selector of a layer, by its number, its shape and the first token that it covers."""


def learn(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, sequences: int, tokens: int) -> Profile:
    """Codebooks of the model, from the first halves of the bundled passages and prose, and from random strings.

    What is measured lies in the other halves.
    """
    windows = token_windows(tokenizer, learning_texts(), sequences=sequences, tokens=tokens, least_tokens=64)
    strings = string_windows(tokenizer, sequences=round(STRINGS_RATIO * sequences), tokens=tokens)
    bands = distance_bands(model.config.max_position_embeddings)
    fits = {VQ: partial(fit_layer, centroids=CENTROIDS, bands=bands)}
    return calibrate(model, windows, model_id="measured", layer_fits=fits, strings=strings)


def learning_texts() -> list[str]:
    """First halves of the bundled passages and prose."""
    passages, prose = load_questions(), load_heldout()
    texts = [text for asked in passages[: len(passages) // 2] for text in asked.passages]
    return [*texts, *prose[: len(prose) // 2]]


def selectors(profile: Profile | None = None, *, names: Sequence[str] | None = None) -> dict[str, Factory]:
    """How the selectors of these names are made, all for None; exact search first: what it chooses is what the others
    are held to.

    Parameters
    ----------
    profile : with codebooks; without it `vq` is left out.

    Raises
    ------
    ValueError : there is no selector of a name.
    """
    known = {name: make for name, make in METHODS.items() if name != VQ}
    if profile is not None:
        known = {**METHODS, VQ: named(VQ, profile)}
    names = tuple(known) if names is None else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"selectors are {', '.join(unknown)}; expected some of {', '.join(known)}")
    return {name: known[name] for name in dict.fromkeys((EXACT, *names))}


def named(name: str, profile: Profile | None = None, **parameters: Any) -> Factory:
    """A selector of `retrieval.catalog`, with parameters of its own."""

    def make(layer: int, shape: LayerShape, start: int) -> Selector:
        return selector_by_name(name, shape, layer, start=start, profile=profile, parameters=parameters)

    return make


METHODS: Mapping[str, Factory] = {
    EXACT: named(EXACT),
    RANDOM: named(RANDOM),
    "quantized": named("quantized"),
    "landmarks": named("landmarks"),
    "factor": named("factor"),
    "landmarks+factor": named("landmarks+factor"),
    VQ: named(VQ),
    "graph": named("graph"),
    "sketch": named("sketch"),
    "clusters": named("clusters"),
    "clusters, no rest": named("clusters", estimated_ratio=0.0),
    "IVF": lambda _layer, shape, start: PerHeadSelector(shape, IvfIndex, name="IVF", start=start),
    "HNSW": lambda _layer, shape, start: PerHeadSelector(shape, HnswIndex, name="HNSW", start=start),
}

ONLY: Mapping[str, Sequence[str]] = {
    "IVF": (TEXT,),
    "HNSW": (TEXT,),  # slow to build
    "clusters, no rest": (TEXT, *AGGREGATION),
}
"""Selectors that are measured on some kinds of context alone."""
