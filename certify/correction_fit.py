"""Fits the correction of documents that were computed alone (`blend.correction`) to a model's own text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..blend.correction import BIASES, PLACES, WEIGHTS, place_of
from ..connectors.hf.model import TransformersModel
from ..connectors.hf.prefill import Prefill
from ..connectors.identity.requests import lead_of, natural_lead
from ..core import KVChunk, KVSpec

_LEFT_OUT = 0.03  # of a context's tokens: attention sinks and the like change most and would decide the fit alone
_RIDGE = 1e-3  # of the mean square of what the map is given
KEYS_RATIO = 0.5
"""Of what least squares say of keys: they go too far on other text, where answers lose the documents (decision 164)."""
_SMALLEST, _LARGEST = 64, 384  # tokens of a document


def learn_correction(
    layers: TransformersModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Sequence[int]],
    *,
    advance: Callable[[int], object] = lambda _: None,
) -> Mapping[str, Tensor]:
    """The tensors of a `Correction` from the sequences that a model is calibrated with; none from too little text.

    Parameters
    ----------
    windows : of `token_windows`, the model's own lead included.
    advance : called with tokens that are done; those of all windows in all.
    """
    lead = len(lead_of(tokenizer))
    contexts = document_contexts([window[lead:] for window in windows])
    left = sum(map(len, windows)) - sum(map(len, chain.from_iterable(contexts)))
    found: Mapping[str, Tensor] = {}
    if contexts:
        found = fit_correction(layers, contexts, lead_ids=natural_lead(tokenizer), advance=advance)
    advance(left)
    return found


def document_contexts(
    windows: Sequence[Sequence[int]], *, seed: int = 0, smallest: int = _SMALLEST, largest: int = _LARGEST
) -> list[list[Sequence[int]]]:
    """Contexts of two or more documents out of different windows: as many as windows if there are enough documents, of
    nearly all their tokens; none if there is but one document.

    Parameters
    ----------
    windows : token sequences, see `token_windows`.
    seed : of the documents' lengths and order; equal seeds give equal contexts.
    smallest, largest : tokens of a document; what is left of a window may be less and is left out.
    """
    drawn = torch.Generator().manual_seed(seed)
    pieces: list[Sequence[int]] = []
    for window in windows:
        start = 0
        while start + smallest <= len(window):
            length = int(torch.randint(smallest, largest + 1, (1,), generator=drawn))
            pieces.append(window[start : start + length])
            start += length
    order = torch.randperm(len(pieces), generator=drawn).tolist()
    count = min(len(windows), len(pieces) // 2)
    return [[pieces[piece] for piece in order[place::count]] for place in range(count)]


def fit_correction(
    layers: TransformersModel,
    contexts: Sequence[Sequence[Sequence[int]]],
    *,
    lead_ids: Sequence[int],
    keys_ratio: float = KEYS_RATIO,
    advance: Callable[[int], object] = lambda _: None,
) -> Mapping[str, Tensor]:
    """The tensors of a `Correction`: by least squares, from documents' KV alone to what it lacks in their contexts.

    Two forward passes over all tokens, no gradients.

    Parameters
    ----------
    contexts : token sequences of the documents of each, at least two: the first one lacks nothing.
    lead_ids : in front of every document, and of every context.
    keys_ratio : how far keys are moved along what is found; values are moved all the way.
    advance : called with the tokens of each context that is done.

    Raises
    ------
    ValueError : a context has no second document.
    """
    if not contexts or any(len(documents) < 2 for documents in contexts):
        raise ValueError("a correction is fitted to contexts of at least two documents each")
    spec = layers.spec
    width, taken = spec.head_dim + spec.value_dim, spec.head_dim + spec.value_dim + PLACES
    grams = torch.zeros(spec.num_layers, spec.num_kv_heads, taken, taken, dtype=torch.float64)
    products = torch.zeros(spec.num_layers, spec.num_kv_heads, taken, width, dtype=torch.float64)
    prefill = Prefill(layers, lead_ids=lead_ids, pack_tokens=1)
    for documents in contexts:
        whole = prefill.alone([*lead_ids, *chain.from_iterable(documents)])
        starts = [len(lead_ids)]
        for ids in documents:
            starts.append(starts[-1] + len(ids))
        places = [slice(*bounds) for bounds in pairwise(starts[1:])]
        alone = [_plain(spec, chunk) for chunk in prefill.behind_lead(documents[1:])]
        offsets = torch.cat([torch.arange(len(ids)) for ids in documents[1:]])
        classes = F.one_hot(place_of(offsets), PLACES).float()
        plain = _plain(spec, whole)
        for layer in range(1, spec.num_layers):
            given = torch.cat([each[layer] for each in alone], dim=1)  # [H, T, D + Dv]
            lacks = torch.cat([plain[layer, :, place] for place in places], dim=1) - given
            off = lacks.square().sum((0, 2))
            kept = off <= off.quantile(1.0 - _LEFT_OUT)
            inputs = torch.cat((given, classes.expand(len(given), -1, -1)), dim=-1)[:, kept].double()
            grams[layer] += inputs.mT @ inputs
            products[layer] += inputs.mT @ lacks[:, kept].double()
        advance(sum(map(len, documents)))
    size = grams.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-30)
    found = torch.linalg.solve(grams + _RIDGE * size * torch.eye(taken, dtype=torch.float64), products).float()
    found[..., : spec.head_dim] *= keys_ratio
    return {WEIGHTS: found[:, :, :width].contiguous(), BIASES: found[:, :, width:].contiguous()}


def _plain(spec: KVSpec, chunk: KVChunk) -> Tensor:
    """Keys before rotation beside values, `[L, H, T, D + Dv]` float32."""
    return torch.cat((spec.shift(chunk.keys.float(), -chunk.positions), chunk.values.float()), dim=-1)
