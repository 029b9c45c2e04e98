"""One context from independently computed chunks: CacheBlend (arXiv 2405.16444), without the errors of its code, and
with choices that it does not have: at another layer, and by what the question attends to.

Steps of one layer, for the tokens that still have a hidden state ("active"):

    load cached K, V of the layer      (a thread began to load it during the layer before)
    compute q, k, v of active tokens   -> deviation from the cached rows -> overwrite all of these rows
    keep the most deviating ones       -> only they attend, by position, over the mixed K, V, and go on

A token that drops out has no hidden state any more and cannot come back, so the sets nest. In layer 0, K and V depend
on the token alone and differ by rounding only; full layers must be computed before deviations say something. CacheBlend
looks at layer 1. What binds tokens of different documents shows in layer 2 first, because attention in layer 1 makes it
(decision 105): `check_layer` is a parameter, and `kvloom certify --fusion` finds the best one for a model. The last
layer needs its K and V, but no attention.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from ..core import LayerwiseModel
from .attention import ScatteredAttention
from .choosers import (
    CHOOSERS,
    CandidateTokens,
    Chooser,
    by_borders_and_question,
    by_deviation,
    deviation_of,
    places_in_chunks,
    squares,
    value_deviation_of,
)
from .correction import Correction
from .question import QUESTION_TOKENS, question_attention


class LayerSource(Protocol):
    """Delivers the cached KV of a context, one layer at a time."""

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Fill `keys [H, N, D]` and `values [H, N, Dv]` with the first N tokens of one layer, keys rotated to their
        positions in the context.

        Called layer by layer, from another thread, one call at a time. N is the number of all tokens, or of the exact
        ones if all others are computed.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _CorrectedSource:
    """The `LayerSource` of a context whose tokens behind the exact ones are corrected as they come.

    Attributes
    ----------
    offsets : `[S]` int64, of the context's tokens in their documents.
    """

    source: LayerSource
    correction: Correction
    offsets: Tensor
    exact_tokens: int

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        self.source.load(layer, keys, values)
        behind = slice(self.exact_tokens, keys.shape[1])
        positions = torch.arange(behind.start, behind.stop, device=keys.device)
        if len(positions):
            here = keys[None, :, behind], values[None, :, behind]
            corrected = self.correction.apply(*here, positions, self.offsets[behind], first_layer=layer)
            for cached, new in zip(here, corrected, strict=True):
                cached.copy_(new)


@dataclass(frozen=True, slots=True, eq=False)
class BlendedContext:
    """KV of a whole context.

    Attributes
    ----------
    keys : `[L, H, S, D]`, after rotary embedding at positions 0 to S - 1.
    values : `[L, H, S, Dv]`.
    attended_tokens : per layer, number of tokens that ran through its attention and feed-forward.
    fresh : per layer, positions whose K and V were computed here.
    candidates : number of tokens that could have been recomputed: all but the exact ones.
    asked_tokens : of the question, that ran through all layers for the choice.
    """

    keys: Tensor
    values: Tensor
    attended_tokens: tuple[int, ...]
    fresh: tuple[Tensor, ...]
    candidates: int
    asked_tokens: int = 0

    @property
    def computed_tokens(self) -> float:
        """Number of tokens computed rather than loaded, mean over the layers: full first layers and the question that
        was asked for the choice included.
        """
        return sum(self.attended_tokens) / len(self.attended_tokens) + self.asked_tokens


class _Question:
    """The question's attention to a context, computed when it is asked for first."""

    def __init__(
        self, model: LayerwiseModel, ids: Tensor, keys: Tensor, values: Tensor, ready: Callable[[int], object]
    ) -> None:
        self._arguments = model, ids, keys, values, ready
        self._scores: Tensor | None = None
        self._tokens = min(len(ids), QUESTION_TOKENS)

    @property
    def asked_tokens(self) -> int:
        return 0 if self._scores is None else self._tokens

    def attention(self) -> Tensor:
        """See `question_attention`."""
        if self._scores is None:
            self._scores = question_attention(*self._arguments)
        return self._scores


@dataclass(frozen=True, slots=True)
class Blender:
    """Fuses cached chunks, recomputing a share of their tokens.

    Attributes
    ----------
    recompute_ratio : mean share of the candidate tokens recomputed in the layers after the choice, 0 to 1; 1 equals
        full prefill, 0 is naive reuse.
    chooser : which tokens those are, see `choosers`.
    spread_ratio : the share falls linearly over the layers, from `(1 + spread_ratio)` to `(1 - spread_ratio)` times
        `recompute_ratio` (the paper's gradual filter); less where that would exceed all tokens.
    check_layer : the first layer whose deviations are looked at, from 1 on; all layers before it are computed for all
        tokens by choosers that need deviations.
    correction : of cached tokens that are not exact, before anything is chosen; None for none.
    """

    recompute_ratio: float = 0.15
    chooser: Chooser = by_borders_and_question
    spread_ratio: float = 0.0
    check_layer: int = 2
    correction: Correction | None = None

    def __post_init__(self) -> None:
        for name in ("recompute_ratio", "spread_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}; expected a number between 0 and 1")
            if not 0.0 <= float(value) <= 1.0:
                raise ValueError(f"{name} is {value}; expected a share between 0 and 1")
        if isinstance(self.check_layer, bool) or not isinstance(self.check_layer, int):
            raise TypeError(f"check_layer is {self.check_layer!r}; expected an integer from 1")
        if self.check_layer < 1:
            raise ValueError(f"check_layer is {self.check_layer}; expected a layer from 1: layer 0 never deviates")
        if self.correction is not None and not isinstance(self.correction, Correction):
            raise TypeError(f"correction is a {type(self.correction).__name__}; expected a Correction or None")
        if not callable(self.chooser):
            known = ", ".join(CHOOSERS)
            raise TypeError(
                f"chooser is {self.chooser!r}; expected a function, such as blend.choosers.CHOOSERS has: {known}"
            )

    def layer_ratio(self, layer: int, num_layers: int) -> float:
        """Share of the candidates that is computed in `layer`: falls from the check layer to layer L - 2, mean
        `recompute_ratio`.
        """
        ratio, first = self.recompute_ratio, self._first_check(num_layers)
        spread = min(self.spread_ratio, (1.0 - ratio) / ratio if ratio else 0.0)
        steps = num_layers - 2 - first
        if steps < 1:
            return ratio
        place = min(max(layer - first, 0), steps) / steps
        return ratio * (1.0 + spread * (1.0 - 2.0 * place))

    def _first_check(self, num_layers: int) -> int:
        """The check layer of a model of so many layers: one after it must have attention that is worth leaving out."""
        return max(1, min(self.check_layer, num_layers - 2))

    @torch.inference_mode(False)  # the loader's thread has modes of its own and may not write into inference tensors
    @torch.no_grad()
    def blend(
        self,
        model: LayerwiseModel,
        token_ids: Tensor,
        chunk_starts: Sequence[int],
        source: LayerSource,
        *,
        exact_tokens: int = 0,
        question_ids: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> BlendedContext:
        """Fuse the chunks of one context.

        Parameters
        ----------
        model : the engine's layers.
        token_ids : `[S]` int64, the whole context.
        chunk_starts : first position of every chunk, ascending from 0; all tokens are cached.
        source : delivers the cached KV, keys rotated to their positions in this context.
        exact_tokens : leading tokens whose cached KV is that of this very context (a prefix hit); never recomputed.
        question_ids : `[Q]` int64, what follows the context, for choosers that go by it; None if it is not known.

        Raises
        ------
        ValueError : `chunk_starts` or `exact_tokens` do not fit `token_ids`, the chooser needs a question and there is
            none, or it returns something else than ascending indices of its tokens.
        TypeError : `token_ids` or `question_ids` is no one-dimensional tensor of integers.
        SpecMismatchError : the correction was fitted to another model than `model` is now.
        """
        for name, ids in (("token_ids", token_ids), ("question_ids", question_ids)):
            is_row = isinstance(ids, Tensor) and ids.ndim == 1 and not ids.is_floating_point()
            if not is_row and not (ids is None and name == "question_ids"):
                raise TypeError(f"{name} is {_described(ids)}; expected a tensor [S] of integers")
        spec, total = model.spec, len(token_ids)
        starts = torch.tensor(list(chunk_starts), dtype=torch.int64)
        if not len(starts) or int(starts[0]) != 0 or bool((starts.diff() <= 0).any()) or int(starts[-1]) >= total:
            raise ValueError(f"chunk_starts is {list(chunk_starts)}; expected ascending positions from 0 below {total}")
        if not 0 <= exact_tokens <= total:
            raise ValueError(f"exact_tokens is {exact_tokens}; expected 0 to {total}")
        layers = spec.num_layers
        keys = torch.empty(layers, spec.num_kv_heads, total, spec.head_dim, dtype=spec.dtype, device=device)
        values = torch.empty(layers, spec.num_kv_heads, total, spec.value_dim, dtype=spec.dtype, device=device)
        offsets, to_next = (each.to(device) for each in places_in_chunks(torch.arange(total), starts))
        needed = exact_tokens if self.recompute_ratio >= 1.0 else total  # what is computed anyway need not be loaded
        if self.correction is not None:
            self.correction.check_serves(spec)
            source = _CorrectedSource(source, self.correction, offsets, exact_tokens)
        loader = ThreadPoolExecutor(1, thread_name_prefix="kvloom-load")
        try:
            loads = [
                loader.submit(source.load, layer, keys[layer, :, :needed], values[layer, :, :needed])
                for layer in range(layers)
            ]
            question = None
            if question_ids is not None and len(question_ids):
                question = _Question(model, question_ids, keys, values, lambda layer: loads[layer].result())
            attended, fresh = self._compute(
                model,
                token_ids.to(device),
                offsets,
                to_next,
                exact_tokens,
                keys,
                values,
                lambda n: loads[n].result(),
                question,
            )
        finally:
            loader.shutdown(cancel_futures=True)
        asked = 0 if question is None else question.asked_tokens
        return BlendedContext(keys, values, tuple(attended), tuple(fresh), total - exact_tokens, asked)

    def _compute(
        self,
        model: LayerwiseModel,
        token_ids: Tensor,
        offsets: Tensor,
        to_next: Tensor,
        exact_tokens: int,
        keys: Tensor,
        values: Tensor,
        ready: Callable[[int], object],
        question: _Question | None,
    ) -> tuple[list[int], list[Tensor]]:
        """Compute and choose, layer by layer, into `keys` and `values`; `attended_tokens` and `fresh` of the context.

        `ready` is called before a layer of the cached KV is read.
        """
        layers, total = model.spec.num_layers, len(token_ids)
        candidates, check = total - exact_tokens, self._first_check(layers)
        active = torch.arange(exact_tokens, total, device=token_ids.device)

        def tokens(rows: Tensor | None) -> CandidateTokens:
            now = active
            attention = None if question is None else lambda: question.attention()[:, now]
            if rows is None:
                return CandidateTokens(now, offsets[now], None, attention, to_next=to_next[now])
            deviations = deviation_of(rows), attention, value_deviation_of(rows)
            return CandidateTokens(now, offsets[now], *deviations, to_next[now])

        active = active[self._keep(tokens(None), 0, layers, candidates)]
        hidden = model.embed(token_ids[active])
        attended: list[int] = []
        fresh: list[Tensor] = []
        attentions: dict[int | None, ScatteredAttention] = {}  # by window, of the active tokens
        for layer in range(layers):
            ready(layer)
            fresh.append(active)
            attended.append(0)
            if not len(active):
                continue
            q, k, v = model.qkv(layer, hidden, active)
            # A slice is copied many times faster than rows by index.
            place = active if len(active) < candidates else slice(exact_tokens, total)
            can_choose = layer >= check and self._count(layer, layers, candidates) < len(active)
            rows = None
            if can_choose and layer + 1 < layers:
                rows = squares(k, keys[layer][:, place], v, values[layer][:, place])
            keys[layer][:, place] = k
            values[layer][:, place] = v
            if layer + 1 == layers:
                break
            if rows is not None:
                kept = self._keep(tokens(rows), layer, layers, candidates)
                if len(kept) < len(active):
                    active, hidden, q = active[kept], hidden[kept], q[:, kept]
                    attentions.clear()
            attended[layer] = len(active)
            if len(active):
                here = model.attention[layer]
                window = here.window_tokens
                if window not in attentions:
                    attentions[window] = ScatteredAttention(active, window_tokens=window)
                out = attentions[window](
                    q, keys[layer], values[layer], scale=here.scale, softcap=here.softcap, sinks=here.sinks
                )
                hidden = model.finish(layer, hidden, out)
        return attended, fresh

    def _count(self, layer: int, num_layers: int, candidates: int) -> int:
        """How many tokens go through the attention of `layer`."""
        return (
            candidates if self.recompute_ratio >= 1.0 else math.ceil(self.layer_ratio(layer, num_layers) * candidates)
        )

    def _keep(self, tokens: CandidateTokens, layer: int, num_layers: int, candidates: int) -> Tensor:
        """Indices of the tokens that go through the attention of `layer`."""
        everything = torch.arange(len(tokens), device=tokens.positions.device)
        if self.recompute_ratio >= 1.0:
            return everything
        count = min(len(tokens), self._count(layer, num_layers, candidates))
        kept = self.chooser(tokens, count) if count else everything[:0]
        if kept is None:
            return everything
        # Attention relies on ascending positions: anything else would give wrong keys without an error.
        is_sound = isinstance(kept, Tensor) and kept.dtype == torch.int64 and kept.ndim == 1
        if not is_sound or (
            len(kept) and not (int(kept[0]) >= 0 and int(kept[-1]) < len(tokens) and bool((kept.diff() > 0).all()))
        ):
            raise ValueError(
                f"the chooser returned {_described(kept)} for layer {layer}; expected ascending int64 indices below "
                f"{len(tokens)}, or None"
            )
        return kept


CACHEBLEND = Blender(0.15, by_deviation, spread_ratio=0.3, check_layer=1)
"""As published: tokens are chosen by deviation, first at layer 1, and become fewer from layer to layer."""


def _described(found: object) -> str:
    """A tensor's dtype and shape, or the type of anything else."""
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
