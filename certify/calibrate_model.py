"""Calibration: a model's keys and values over a text, and what errors in them cost, one layer at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import accumulate, chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from transformers import PreTrainedModel
except ImportError as error:
    raise ImportError(
        'kvloom.certify.calibrate_model needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ..blend.attention import layer_attention
from ..calibration.layer_sample import LayerSample
from ..calibration.model_profile import Profile
from ..compress.rotation import layer_unrotated
from ..connectors.hf.model import TransformersModel
from ..errors import EngineError
from .method_fits import LAYER_FITS, Fit
from .profile_parts import ProfileParts

_HEAD_TOKENS = 256  # whose logits are computed at once: a vocabulary of 128,000 makes each of them half a megabyte
_MEMORY_BYTES = 2 << 30


def calibrate(
    model: PreTrainedModel,
    windows: Sequence[Sequence[int]],
    *,
    model_id: str | None = None,
    layer_fits: Mapping[str, Fit] = LAYER_FITS,
    strings: Sequence[Sequence[int]] = (),
    gradient_windows: int | None = None,
    skip_tokens: int = 1,
    memory_bytes: int = _MEMORY_BYTES,
    meta: Mapping[str, str] | None = None,
    advance: Callable[[str, int], object] = lambda _stage, _tokens: None,
) -> Profile:
    """The profile of a model, from its keys, its values and the gradients of its loss over token sequences.

    Layer by layer, so that beside the weights only one layer's samples and one sequence's activations of one layer are
    in memory: a forward pass keeps the hidden states at every layer's border, then each layer from the last on is
    computed again, with gradients. The Fisher information is that of the true next tokens (KVQuant, arXiv 2401.18079,
    section 3.3). The model is not changed.

    Parameters
    ----------
    windows : token sequences, see `token_windows`; all of them fit the model's context.
    model_id : names the weights; None computes `weights_id`.
    layer_fits : by method, what is to be learned.
    strings : further token sequences, see `string_windows`: only their keys and queries count, and only for
        methods that want them.
    gradient_windows : so many of the windows, evenly spaced, tell what errors cost; None for all of them. A backward
        pass takes three times as long as a forward pass, and costs are much the same everywhere in a text.
    skip_tokens : first tokens of every sequence that are no samples: attention sinks are unlike all others.
    memory_bytes : hidden states that take more than this are kept in a temporary file.
    meta : goes into the profile with what this function adds: sequences, tokens, loss, date.
    advance : called with a stage and by how much it has advanced: `forward`, `backward` and `fit` by tokens times
        layers. `stage_units` says how much there will be.

    Raises
    ------
    ValueError : no sequences, or one that is too short or too long.
    EngineError : the model is of a kind that is not supported, or its loss is not finite.
    """
    layers = TransformersModel(model, model_id=model_id)
    lengths = [len(window) for window in (*windows, *strings)]
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if not windows or not skip_tokens + 1 < shortest <= longest <= layers.max_tokens:
        raise ValueError(
            f"{len(lengths)} sequences of {shortest} to {longest} tokens; expected at least one, each of more than "
            f"{skip_tokens + 1} and at most {layers.max_tokens} tokens"
        )
    spec, all_bounds = layers.spec, list(pairwise(accumulate(lengths, initial=0)))
    text_bounds, further = all_bounds[: len(windows)], all_bounds[len(windows) :]
    chosen = _spread(len(windows), gradient_windows)
    bounds = [text_bounds[i] for i in chosen]
    others = [bound for i, bound in enumerate(text_bounds) if i not in chosen]
    ids = torch.tensor(list(chain.from_iterable((*windows, *strings))))
    text_tokens = text_bounds[-1][1]
    width = model.config.hidden_size
    with _memory((spec.num_layers + 1, len(ids), width), model.dtype, memory_bytes) as borders:
        for a, b in all_bounds:
            _forward(layers, ids[a:b].to(model.device), borders[:, a:b], advance)
        gradient = torch.zeros(text_tokens, width, dtype=model.dtype)
        loss = 0.0
        for a, b in bounds:
            gradient[a:b], lost = _loss_gradient(layers, borders[-1, a:b].to(model.device), ids[a:b].to(model.device))
            loss += lost
        loss /= sum(b - a - 1 for a, b in bounds)
        if not math.isfinite(loss):
            raise EngineError(f"the model's loss over the text is {loss}; expected a finite number")
        parts = ProfileParts(spec, layer_fits)
        for layer in reversed(range(spec.num_layers)):
            queries = _QueryMoments(layers, layer)
            more_keys, _ = _keys_values(layers, layer, borders[layer], further, skip_tokens, queries, model.device)
            more = _keys_values(layers, layer, borders[layer], others, skip_tokens, queries, model.device)
            keys, values, key_fisher, value_fisher = _backward(
                layers, layer, borders[layer], gradient, bounds, skip_tokens, queries, model.device, advance
            )
            keys, values = torch.cat((keys, more[0])), torch.cat((values, more[1]))
            parts.add(
                layer, LayerSample(spec, keys, values, key_fisher, value_fisher, queries.mean(), more_keys, layer)
            )
            advance("fit", text_tokens)
    about = {
        **(meta or {}),
        "sequences": str(len(windows)),
        "tokens": str(text_tokens),
        "string_tokens": str(len(ids) - text_tokens),
        "loss": f"{loss:.4f}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return Profile(spec, parts.tensors(), about)


def stage_units(
    layers: int,
    windows: Sequence[Sequence[int]],
    *,
    strings: Sequence[Sequence[int]] = (),
    gradient_windows: int | None = None,
) -> dict[str, int]:
    """Sum of what `advance` is called with, by stage."""
    tokens, further = (layers * sum(map(len, sequences)) for sequences in (windows, strings))
    backward = layers * sum(len(windows[i]) for i in _spread(len(windows), gradient_windows))
    return {"forward": tokens + further, "backward": backward, "fit": tokens}


def _spread(count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` numbers, evenly spaced; all of them for None or too many."""
    if wanted is None or wanted >= count:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


@contextmanager
def _memory(shape: tuple[int, ...], dtype: torch.dtype, memory_bytes: int) -> Iterator[Tensor]:
    """An uninitialised tensor: in memory if it is no larger than that, otherwise in a file that goes afterwards."""
    count = torch.Size(shape).numel()
    if count * dtype.itemsize <= memory_bytes:
        yield torch.empty(shape, dtype=dtype)
        return
    with tempfile.TemporaryDirectory(prefix="kvloom-calibrate-") as folder:
        yield torch.from_file(str(Path(folder) / "borders"), shared=True, size=count, dtype=dtype).view(shape)


@torch.no_grad()
def _forward(layers: TransformersModel, ids: Tensor, borders: Tensor, advance: Callable[[str, int], object]) -> None:
    """Fills `borders` `[L + 1, T, E]` with the inputs of every layer and the output of the last."""
    positions = torch.arange(len(ids), device=ids.device)
    hidden = layers.embed(ids)
    borders[0] = hidden.cpu()
    for layer in range(layers.spec.num_layers):
        queries, keys, values = layers.qkv(layer, hidden, positions)
        hidden = layers.finish(layer, hidden, _attend(layers, layer, queries, keys, values, positions))
        borders[layer + 1] = hidden.cpu()
        advance("forward", len(ids))


def _backward(
    layers: TransformersModel,
    layer: int,
    inputs: Tensor,
    gradient: Tensor,
    bounds: Sequence[tuple[int, int]],
    skip_tokens: int,
    moments: _QueryMoments,
    device: torch.device,
    advance: Callable[[str, int], object],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values and their Fisher information of one layer, as in its sample.

    Turns `gradient` `[tokens, E]` at the layer's output into that at its input, in place.
    """
    kept: list[tuple[Tensor, ...]] = []
    for a, b in bounds:
        positions = torch.arange(b - a, device=device)
        with torch.enable_grad():
            hidden = inputs[a:b].to(device).detach().requires_grad_()
            queries, keys, values = layers.qkv(layer, hidden, positions)
            output = layers.finish(layer, hidden, _attend(layers, layer, queries, keys, values, positions))
            found = torch.autograd.grad(output, (keys, values, hidden), gradient[a:b].to(device))
        gradient[a:b] = found[2].cpu()
        moments.add(queries.detach()[:, skip_tokens:], positions[skip_tokens:])
        half = [keys.detach(), values.detach(), found[0], found[1]]
        # Rotations are orthogonal: gradients turn back as keys do.
        half[0], half[2] = (layer_unrotated(layers.spec, layer, t, positions) for t in (half[0], half[2]))
        kept.append(tuple(t.transpose(0, 1)[skip_tokens:].float().cpu() for t in half))
        advance("backward", b - a)
    keys, values, key_gradient, value_gradient = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return keys, values, key_gradient.square_(), value_gradient.square_()


@torch.no_grad()
def _keys_values(
    layers: TransformersModel,
    layer: int,
    inputs: Tensor,
    bounds: Sequence[tuple[int, int]],
    skip_tokens: int,
    moments: _QueryMoments,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Keys before rotation `[N, H, D]` and values `[N, H, Dv]` of one layer, and its queries into `moments`."""
    spec = layers.spec
    kept = [(torch.empty(0, spec.num_kv_heads, spec.head_dim), torch.empty(0, spec.num_kv_heads, spec.value_dim))]
    for a, b in bounds:
        positions = torch.arange(b - a, device=device)
        queries, keys, values = layers.qkv(layer, inputs[a:b].to(device), positions)
        moments.add(queries[:, skip_tokens:], positions[skip_tokens:])
        pair = layer_unrotated(spec, layer, keys, positions), values
        keys, values = (t.transpose(0, 1)[skip_tokens:].float().cpu() for t in pair)
        kept.append((keys, values))
    keys, values = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return keys, values


class _QueryMoments:
    """Sum of the outer products of one layer's queries before rotation: all that is kept of them."""

    def __init__(self, layers: TransformersModel, layer: int) -> None:
        self._spec, self._layer, self._count = layers.spec, layer, 0
        self._sum = torch.zeros(layers.spec.num_kv_heads, layers.spec.head_dim, layers.spec.head_dim).double()

    def add(self, queries: Tensor, positions: Tensor) -> None:
        """`[Hq, Q, D]` after rotary embedding."""
        queries = layer_unrotated(self._spec, self._layer, queries, positions)
        grouped = queries.reshape(self._spec.num_kv_heads, -1, self._spec.head_dim).double()
        self._sum += (grouped.mT @ grouped).cpu()
        self._count += grouped.shape[1]

    def mean(self) -> Tensor:
        return self._sum / self._count


def _loss_gradient(layers: TransformersModel, hidden: Tensor, ids: Tensor) -> tuple[Tensor, float]:
    """Gradient `[T, E]`, at the last layer's output, of the summed loss of the next tokens, and that loss."""
    gradient, total = torch.zeros_like(hidden), 0.0
    for start in range(0, len(ids) - 1, _HEAD_TOKENS):
        stop = min(start + _HEAD_TOKENS, len(ids) - 1)
        with torch.enable_grad():
            rows = hidden[start:stop].detach().requires_grad_()
            logits = layers.logits(rows).float()
            loss = F.cross_entropy(logits, ids[start + 1 : stop + 1], reduction="sum")
            (gradient[start:stop],) = torch.autograd.grad(loss, rows)
        total += loss.item()
    return gradient.cpu(), total


def _attend(
    layers: TransformersModel, layer: int, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor
) -> Tensor:
    return layer_attention(layers.attention[layer], queries, keys, values, positions)
