"""One context from independently computed chunks: CacheBlend (arXiv 2405.16444), without the errors of its code.

Steps of one layer, for the tokens that still have a hidden state ("active"):

    load cached K, V of the layer      (a thread began to load it during the layer before)
    compute q, k, v of active tokens   -> deviation from the cached rows -> overwrite all of these rows
    keep the most deviating ones       -> only they attend, by position, over the mixed K, V, and go on

A token that drops out has no hidden state any more and cannot come back, so the sets nest. In layer 0, K and V depend
on the token alone and differ by rounding only; one full layer must be computed before tokens can be chosen. The last
layer needs its K and V, but no attention.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from ..core import LayerwiseModel
from .attention import causal_attention
from .choosers import CHOOSERS, CandidateTokens, Chooser, by_deviation, kv_deviation


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
class BlendedContext:
    """KV of a whole context.

    Attributes
    ----------
    keys : `[L, H, S, D]`, after rotary embedding at positions 0 to S - 1.
    values : `[L, H, S, Dv]`.
    attended_tokens : per layer, number of tokens that ran through its attention and feed-forward.
    fresh : per layer, positions whose K and V were computed here.
    candidates : number of tokens that could have been recomputed: all but the exact ones.
    """

    keys: Tensor
    values: Tensor
    attended_tokens: tuple[int, ...]
    fresh: tuple[Tensor, ...]
    candidates: int

    @property
    def computed_tokens(self) -> float:
        """Number of tokens computed rather than loaded, mean over the layers, the full first layer included."""
        return sum(self.attended_tokens) / len(self.attended_tokens)


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
    """

    recompute_ratio: float = 0.15
    chooser: Chooser = by_deviation
    spread_ratio: float = 0.3

    def __post_init__(self) -> None:
        for name in ("recompute_ratio", "spread_ratio"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"{name} is {value!r}; expected a number between 0 and 1")
            if not 0.0 <= float(value) <= 1.0:
                raise ValueError(f"{name} is {value}; expected a share between 0 and 1")
        if not callable(self.chooser):
            known = ", ".join(CHOOSERS)
            raise TypeError(
                f"chooser is {self.chooser!r}; expected a function, such as blend.choosers.CHOOSERS has: {known}"
            )

    def layer_ratio(self, layer: int, num_layers: int) -> float:
        """Share of the candidates that is computed in `layer`: falls over layers 1 to L - 2, mean `recompute_ratio`."""
        ratio = self.recompute_ratio
        spread = min(self.spread_ratio, (1.0 - ratio) / ratio if ratio else 0.0)
        steps = max(1, num_layers - 3)
        place = min(max(layer - 1, 0), steps) / steps
        return ratio * (1.0 + spread * (1.0 - 2.0 * place)) if num_layers > 3 else ratio

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

        Raises
        ------
        ValueError : `chunk_starts` or `exact_tokens` do not fit `token_ids`, or the chooser returns something else than
            ascending indices of its tokens.
        TypeError : `token_ids` is no one-dimensional tensor of integers.
        """
        if not isinstance(token_ids, Tensor) or token_ids.ndim != 1 or token_ids.is_floating_point():
            raise TypeError(f"token_ids is {_described(token_ids)}; expected a tensor [S] of integers")
        spec, total = model.spec, len(token_ids)
        starts = torch.tensor(list(chunk_starts), dtype=torch.int64)
        if not len(starts) or int(starts[0]) != 0 or bool((starts.diff() <= 0).any()) or int(starts[-1]) >= total:
            raise ValueError(f"chunk_starts is {list(chunk_starts)}; expected ascending positions from 0 below {total}")
        if not 0 <= exact_tokens <= total:
            raise ValueError(f"exact_tokens is {exact_tokens}; expected 0 to {total}")
        layers = spec.num_layers
        keys = torch.empty(layers, spec.num_kv_heads, total, spec.head_dim, dtype=spec.dtype, device=device)
        values = torch.empty(layers, spec.num_kv_heads, total, spec.value_dim, dtype=spec.dtype, device=device)
        chunk_of = torch.searchsorted(starts, torch.arange(total), right=True) - 1
        offsets = (torch.arange(total) - starts[chunk_of]).to(device)
        candidates = total - exact_tokens
        active = torch.arange(exact_tokens, total, device=device)
        active = active[self._keep(CandidateTokens(active, offsets[active], None), 0, layers, candidates)]
        hidden = model.embed(token_ids.to(device)[active])
        attended: list[int] = []
        fresh: list[Tensor] = []
        needed = exact_tokens if self.recompute_ratio >= 1.0 else total  # what is computed anyway need not be loaded
        with ThreadPoolExecutor(1, thread_name_prefix="kvloom-load") as loader:
            pending = loader.submit(source.load, 0, keys[0, :, :needed], values[0, :, :needed])
            for layer in range(layers):
                pending.result()
                if layer + 1 < layers:
                    ahead = layer + 1
                    pending = loader.submit(source.load, ahead, keys[ahead, :, :needed], values[ahead, :, :needed])
                fresh.append(active)
                attended.append(0)
                if not len(active):
                    continue
                q, k, v = model.qkv(layer, hidden, active)
                cached_k, cached_v = keys[layer][:, active], values[layer][:, active]
                keys[layer][:, active] = k
                values[layer][:, active] = v
                if layer + 1 == layers:
                    break
                if layer > 0 and needed == total:
                    tokens = CandidateTokens(active, offsets[active], kv_deviation(k, cached_k, v, cached_v))
                    kept = self._keep(tokens, layer, layers, candidates)
                    if len(kept) < len(active):
                        active, hidden, q = active[kept], hidden[kept], q[:, kept]
                attended[layer] = len(active)
                if len(active):
                    window = model.window_tokens[layer]
                    out = causal_attention(
                        q, keys[layer], values[layer], active, scale=model.scale, window_tokens=window
                    )
                    hidden = model.finish(layer, hidden, out)
        return BlendedContext(keys, values, tuple(attended), tuple(fresh), candidates)

    def _keep(self, tokens: CandidateTokens, layer: int, num_layers: int, candidates: int) -> Tensor:
        """Indices of the tokens that go through the attention of `layer`."""
        everything = torch.arange(len(tokens), device=tokens.positions.device)
        if self.recompute_ratio >= 1.0:
            return everything
        count = min(len(tokens), math.ceil(self.layer_ratio(layer, num_layers) * candidates))
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


def _described(found: object) -> str:
    """A tensor's dtype and shape, or the type of anything else."""
    return f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
