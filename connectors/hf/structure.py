"""What a transformers decoder does with positions and scores, measured on the decoder itself, and whether its layers
can be run one at a time.

Nothing is read from a list of architectures. Each layer's rotation is the one among the model's tables (or none) that
moves its keys as the layer does; windows are read from the masks that the decoder makes; scales, caps and sinks are
what the layer calls its attention function with. Then every layer, run in steps, must give what it gives by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

try:
    from transformers import DynamicCache
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.structure needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ...blend.attention import layer_attention
from ...core import LayerAttention, LayerRopes, RopeSpec
from ...errors import EngineError
from ..identity.rope import settled_rope
from .generation import cache_argument
from .stock_layers import Asked, StockLayers

_PROBE_TOKENS = 12
_FAR_TOKENS = 1000  # between the two places at which keys are compared
_MASK_TOKENS = 1 << 20  # the longest row of a mask that is made; longer windows than that reach everywhere
_TABLE = "inv_freq"
_IN_STEPS = frozenset({"dynamic", "longrope"})
"""Rope types whose table depends on the length of the context: one table up to a length, others beyond."""

_KNOWN = frozenset({"dropout", "scaling", "sliding_window", "softcap", "s_aux"})
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "output_attentions", "cache_position", "is_causal"})


@dataclass(frozen=True, slots=True)
class RopeTable:
    """Where a layer's rotation is kept: `prefix` of the table's name in the decoder's rotary module."""

    prefix: str
    interleaved: bool
    passed_channels: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A decoder as measured.

    Attributes
    ----------
    ropes : by layer; None where keys are not rotated.
    window_tokens, scales, softcaps : by layer, see `LayerAttention`.
    sinks : by layer, the name of the parameter of the attention module that holds them; None without.
    query_heads, kv_heads, head_dim, value_dim : Hq, H, D, Dv.
    projects_alone : see `StockLayers`.
    """

    ropes: tuple[RopeTable | None, ...]
    window_tokens: tuple[int | None, ...]
    scales: tuple[float, ...]
    softcaps: tuple[float | None, ...]
    sinks: tuple[str | None, ...]
    query_heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    projects_alone: bool

    def attention(self, layers: StockLayers) -> tuple[LayerAttention, ...]:
        """What each layer does with scores, with the sinks that it has now."""
        sinks = (
            None if name is None else getattr(layers.attention_of(i)[1], name) for i, name in enumerate(self.sinks)
        )
        known = zip(self.scales, self.window_tokens, self.softcaps, sinks, strict=True)
        return tuple(LayerAttention(*each) for each in known)

    def rope(self, layers: StockLayers) -> RopeSpec | LayerRopes | None:
        """How keys are rotated, with the frequencies that the decoder has now."""
        tables = {table: _settled(layers, table) for table in set(self.ropes) if table is not None}
        by_layer = [None if table is None else tables[table] for table in self.ropes]
        return by_layer[0] if all(each == by_layer[0] for each in by_layer) else LayerRopes(tuple(by_layer))


def context_tokens(config: Any) -> int:
    """Tokens that a context may have: the model's longest, or fewer where another rope table begins."""
    limits = [int(config.max_position_embeddings)]
    for parameters in _parameter_sets(config).values():
        kind = parameters.get("rope_type")
        if kind == "longrope":
            limits.append(int(parameters.get("original_max_position_embeddings") or limits[0]))
        elif kind == "dynamic":  # at the very length, the table of a longer context before may still be there
            limits.append(limits[0] - 1)
    return min(limits)


def is_length_bound(config: Any) -> bool:
    """Whether tokens beyond `context_tokens` would be computed with another rope table."""
    return any(parameters.get("rope_type") in _IN_STEPS for parameters in _parameter_sets(config).values())


@torch.no_grad()
def measured(layers: StockLayers) -> Structure:
    """The structure of a decoder, verified.

    Raises
    ------
    EngineError : a property with which chunks could not be moved or layers not be run in steps; the message says which.
    """
    try:
        return _measured(layers)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"{type(layers.decoder).__name__} cannot be run layer by layer ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]})"
        ) from error


def _measured(layers: StockLayers) -> Structure:
    ids = _probe_ids(layers)
    positions = torch.arange(len(ids), device=ids.device)
    far = positions + max(1, min(_FAR_TOKENS, context_tokens(layers.config) - len(ids)))
    hidden = layers.embed(ids, positions)
    if not torch.equal(hidden, layers.embed(ids, far)):
        raise EngineError("token embeddings depend on positions, so that cached keys and values cannot be moved")
    stock = layers.record(ids)
    if len(stock) != len(layers.layers):
        raise EngineError(f"{len(stock)} of {len(layers.layers)} layers run in a forward pass")
    near = [layers.ask(i, given, positions) for i, (given, _) in enumerate(stock)]
    for i, ((_, output), asked) in enumerate(zip(stock, near, strict=True)):
        # Keys and values are looked at, too: some attention kernels give numbers for keys that are none.
        if not all(each.isfinite().all() for each in (asked.keys, asked.values, output)):
            raise EngineError(
                f"layer {i} gives numbers that are not finite for a few tokens: NaN or too large a weight?"
            )
    query_heads, kv_heads, head_dim, value_dim = _shapes(near)
    ropes = []
    for i, (given, _) in enumerate(stock):
        moved = layers.ask(i, given, far)
        if not _close(moved.values, near[i].values):
            raise EngineError(f"values of layer {i} depend on positions, so that they cannot be moved")
        ropes.append(_rope_of(layers, i, near[i].keys, moved.keys, int(far[0])))
    structure = Structure(
        tuple(ropes),
        _windows(layers, hidden, [asked.options for asked in near]),
        tuple(float(asked.options.get("scaling") or head_dim**-0.5) for asked in near),
        tuple(_softcap(asked.options) for asked in near),
        tuple(_sinks(layers, i, asked.options) for i, asked in enumerate(near)),
        query_heads,
        kv_heads,
        head_dim,
        value_dim,
        layers.projects_alone,
    )
    return _verified(layers, structure, stock, near, positions)


def _verified(
    layers: StockLayers,
    structure: Structure,
    stock: Sequence[tuple[Tensor, Tensor]],
    asked: Sequence[Asked],
    positions: Tensor,
) -> Structure:
    """The structure, with the way of finishing layers by which each gives what it gives by itself."""
    wrong = None
    for projects_alone in (True, False) if structure.projects_alone else (False,):
        layers.projects_alone, wrong = projects_alone, None
        for i, (here, (given, expected)) in enumerate(zip(structure.attention(layers), stock, strict=True)):
            attended = layer_attention(here, asked[i].queries, asked[i].keys, asked[i].values, positions)
            if not _close(layers.finish(i, given, attended), expected, given):
                wrong = i
                break
        if wrong is None:
            return replace(structure, projects_alone=projects_alone)
    kind = type(layers.layers[wrong or 0]).__name__
    raise EngineError(
        f"layer {wrong} ({kind}), run in steps with causal attention, gives something else than in the model's own "
        "forward pass; kvloom refuses what it cannot repeat exactly"
    )


def _probe_ids(layers: StockLayers) -> Tensor:
    """Different tokens, spread over the vocabulary."""
    vocabulary = int(layers.config.vocab_size)
    count = min(_PROBE_TOKENS, context_tokens(layers.config) - 1)
    ids = (torch.arange(1, count + 1) * 7919) % vocabulary
    return ids.to(input_device(layers.decoder.get_input_embeddings()))


def input_device(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights lie, unless accelerate fetches them for every call."""
    hook = getattr(module, "_hf_hook", None)
    for each in getattr(hook, "hooks", (hook,)):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    return next(module.parameters()).device


def _shapes(asked: Sequence[Asked]) -> tuple[int, int, int, int]:
    found = {(len(a.queries), len(a.keys), a.keys.shape[-1], a.values.shape[-1]) for a in asked}
    if len(found) != 1:
        raise EngineError(
            f"layers have different query heads, KV heads, head dims or value dims ({sorted(found)}); kvloom stores "
            "the layers of a chunk in one tensor"
        )
    for i, each in enumerate(asked):
        strange = {
            name
            for name, value in each.options.items()
            if name not in _KNOWN | _WITHOUT_EFFECT and value is not None and value is not False
        }
        if strange:
            raise EngineError(f"attention of layer {i} takes {', '.join(sorted(strange))}, which kvloom does not know")
    return found.pop()


def _softcap(options: Mapping[str, Any]) -> float | None:
    softcap = options.get("softcap")
    return None if softcap is None else float(softcap)


def _sinks(layers: StockLayers, layer: int, options: Mapping[str, Any]) -> str | None:
    sinks = options.get("s_aux")
    if sinks is None:
        return None
    attention = layers.attention_of(layer)[1]
    for name, parameter in attention.named_parameters(recurse=False):
        if parameter is sinks:
            return str(name)
    raise EngineError(f"attention sinks of layer {layer} are no parameter of its attention module")


# ------------------------------------------------------------------------------------------------------- rotations


def _parameter_sets(config: Any) -> dict[str, Mapping[str, Any]]:
    """`rope_parameters` by the prefix of their table's name: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {f"{name}_": each for name, each in parameters.items() if isinstance(each, Mapping)}
    return nested or {"": parameters}


def _tables(layers: StockLayers) -> Iterator[tuple[str, Tensor, float]]:
    """The rotary module's tables: prefix of the name, frequencies, amplitude."""
    rotary = getattr(layers.decoder, "rotary_emb", None)
    if rotary is None:
        return
    parameters = _parameter_sets(layers.config)
    for name, _ in rotary.named_buffers(recurse=False):
        prefix = name.removesuffix(_TABLE)
        if prefix + _TABLE != name or prefix.endswith("original_"):
            continue
        in_steps = parameters.get(prefix, {}).get("rope_type") in _IN_STEPS
        table = getattr(rotary, f"{prefix}original_{_TABLE}") if in_steps else getattr(rotary, name)
        yield prefix, table, float(getattr(rotary, f"{prefix}attention_scaling", 1.0))


def _settled(layers: StockLayers, table: RopeTable) -> RopeSpec:
    frequencies, scaling = next((t, s) for prefix, t, s in _tables(layers) if prefix == table.prefix)
    actual = RopeSpec(tuple(frequencies.tolist()), scaling, table.interleaved, table.passed_channels)
    return settled_rope(actual, _parameter_sets(layers.config).get(table.prefix))


def _rope_of(layers: StockLayers, layer: int, keys: Tensor, moved: Tensor, offset: int) -> RopeTable | None:
    """The table by which `keys` `[H, T, D]`, moved by `offset`, are what the layer computes there."""
    candidates: list[RopeTable | None] = [
        RopeTable(prefix, interleaved, keys.shape[-1] - 2 * len(table))
        for prefix, table, _ in _tables(layers)
        if 2 * len(table) <= keys.shape[-1]
        for interleaved in (False, True)
    ]
    candidates.append(None)
    wide = keys.float()

    def error(table: RopeTable | None) -> float:
        return _error(wide if table is None else _settled(layers, table).shift(wide, offset), moved.float())

    best = min(candidates, key=error)
    if error(best) > _tolerance(keys.dtype):
        raise EngineError(
            f"keys of layer {layer} are rotated in a way that none of the model's rope tables explains (tried: halves "
            "and neighbours, over the whole head and its first channels), so that cached keys cannot be moved"
        )
    return best


# --------------------------------------------------------------------------------------------------------- windows


class _Behind(DynamicCache):
    """A cache that claims to hold tokens, for masks of one more."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._tokens = tokens

    def get_seq_length(self, *_: Any) -> int:
        return self._tokens

    def get_query_offset(self, *_: Any) -> int:
        return self._tokens

    def get_mask_sizes(self, query_length: int | Tensor, *_: Any) -> tuple[int, int]:
        # The first releases of transformers 5 give the positions in place of their number.
        return self._tokens + (query_length if isinstance(query_length, int) else len(query_length)), 0


def _windows(layers: StockLayers, hidden: Tensor, options: Sequence[Mapping[str, Any]]) -> tuple[int | None, ...]:
    """How far back each layer sees: by the masks that the decoder makes, and by what it tells its attention."""
    total = min(context_tokens(layers.config), _MASK_TOKENS)
    seen = [_seen(layers, hidden, total), _seen(layers, hidden, total - 1)]
    windows: list[int | None] = []
    for i, (last, before) in enumerate(zip(*seen, strict=True)):
        told = options[i].get("sliding_window")
        if last is None and before is None and (told is None or told >= total):
            windows.append(told)
            continue
        if last is None or last != before or (told is not None and told != last):
            counts = ["all" if count is None else count for count in (last, before)]
            raise EngineError(
                f"attention of layer {i} sees {counts[0]} of {total} and {counts[1]} of {total - 1} tokens"
                f"{'' if told is None else f', and is told a window of {told}'}; expected all, or a sliding window "
                "(chunks of attention cannot be fused)"
            )
        windows.append(last)
    return tuple(windows)


def _seen(layers: StockLayers, hidden: Tensor, total: int) -> list[int | None]:
    """By layer, how many of `total` tokens the last one sees, itself included; None if it sees all."""
    position = torch.tensor([total - 1], device=hidden.device)
    calls = layers.calls(hidden[:1], position, implementation="eager", **{cache_argument(): _Behind(total - 1)})
    found: dict[int, int | None] = {}
    by_layer = []
    for i, (args, kwargs) in enumerate(calls):
        mask = kwargs.get("attention_mask", args[0] if args and isinstance(args[0], Tensor) else None)
        if id(mask) not in found:
            found[id(mask)] = _visible(mask, total, i)
        by_layer.append(found[id(mask)])
    return by_layer


def _visible(mask: Tensor | None, total: int, layer: int) -> int | None:
    if mask is None:
        return None
    row = mask.reshape(-1)
    row = row if row.dtype == torch.bool else row == 0
    count = int(row.sum())
    if len(row) != total or not bool(row[total - count :].all()):
        raise EngineError(f"layer {layer} is given a mask of {len(row)} tokens that is no window; expected {total}")
    return None if count == total else count


# -------------------------------------------------------------------------------------------------------- comparing


def _tolerance(dtype: torch.dtype) -> float:
    """Relative, of a step in a dtype: rounding, with a margin for the order of sums."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _error(one: Tensor, other: Tensor) -> float:
    """The relative difference `[..., T, D]` of a token, at the median: a token that a router sends elsewhere, because
    of rounding, says nothing about the others.
    """
    difference = (one - other).float().flatten(0, -3).square().sum((0, -1)).sqrt()
    size = other.float().flatten(0, -3).square().sum((0, -1)).sqrt()
    relative = (difference / size.clamp_min(torch.finfo(torch.float32).tiny)).nan_to_num(math.inf)
    return float(relative.median()) if len(relative) else 0.0


def _close(one: Tensor, expected: Tensor, given: Tensor | None = None) -> bool:
    """Whether a result is the expected one; what a layer adds to `given` is compared, not what it passes on."""
    dtype = expected.dtype
    one, expected = (t if t.ndim > 2 else t[None] for t in (one.float(), expected.float()))
    if given is None:
        return _error(one, expected) <= _tolerance(dtype)
    passed = given.float()[None]
    rounding = 4 * torch.finfo(dtype).eps * float(passed.norm()) / max(float((expected - passed).norm()), 1e-30)
    return _error(one - passed, expected - passed) <= _tolerance(dtype) + rounding
