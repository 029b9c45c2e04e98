"""Pages of SGLang's host pool as keys `[L, H, T, D]` and values `[L, H, T, Dv]`, in any layout. Imports no engine.

    layer_first        [L, tokens, H, D]
    page_first         [tokens, L, H, D]
    page_first_direct  [pages, L, T, H, D]
    page_head          [pages, H, T, L, D]

A pool has such a buffer for keys and one for values; a latent (MLA) pool has one, with one head, whose pages are all
keys. A flat page, as SGLang's generic interface gives it, is the page's part of both buffers, one behind the other.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...errors import EngineError

# From a page in a layout to [L, H, T, D].
_AXES = {
    "layer_first": (0, 2, 1, 3),
    "page_first": (1, 2, 0, 3),
    "page_first_direct": (0, 2, 1, 3),
    "page_head": (2, 0, 1, 3),
}


class HostPages:
    """Views of a host pool's pages; nothing is copied.

    Parameters
    ----------
    pool : SGLang's `MHATokenToKVPoolHost`, or one of a latent cache.

    Raises
    ------
    EngineError : the pool is of another kind, or of a layout that is not known.
    """

    def __init__(self, pool: Any) -> None:
        self._layout: str = pool.layout
        self.page_tokens: int = pool.page_size
        self.is_latent = not hasattr(pool, "v_head_dim")
        if self._layout not in _AXES or (self.is_latent and self._layout == "page_head"):
            known = ", ".join(_AXES)
            raise EngineError(
                f"host memory layout {self._layout!r} is not known; give --hicache-mem-layout one of {known}"
            )
        try:
            buffers = (pool.kv_buffer,) if self.is_latent else (pool.k_buffer, pool.v_buffer)
            self._buffers: tuple[Tensor, ...] = tuple(buffers)
            views = [self._page(buffer, 0) for buffer in buffers]
            layers = int(pool.layer_num)
        except (AttributeError, TypeError, IndexError, RuntimeError) as exc:
            raise EngineError(f"host pool {type(pool).__name__} is not known: {exc}") from exc
        self.num_layers, self.num_kv_heads, _, self.head_dim = views[0].shape
        self.v_head_dim = 0 if self.is_latent else int(views[1].shape[3])
        self.dtype = views[0].dtype
        expected = (layers, self.num_kv_heads, self.page_tokens)
        if any(tuple(view.shape[:3]) != expected for view in views):
            raise EngineError(
                f"host pool {type(pool).__name__} has pages {[list(view.shape) for view in views]}; expected "
                f"[layers, heads, tokens, dim] of {list(expected)}"
            )

    def page(self, first_token: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the page that begins at this token of the pool."""
        views = [self._page(buffer, first_token) for buffer in self._buffers]
        return (views[0], views[0][..., :0]) if self.is_latent else (views[0], views[1])

    def flat_page(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a flat page of SGLang's generic interface.

        Raises
        ------
        EngineError : it has another dtype or length.
        """
        count = self.num_layers * self.num_kv_heads * self.page_tokens
        width = self.head_dim + self.v_head_dim
        if flat.dtype != self.dtype or flat.shape != (count * width,) or self.v_head_dim not in (0, self.head_dim):
            raise EngineError(f"a page is {flat.dtype} {list(flat.shape)}; expected {self.dtype} [{count * width}]")
        sizes = {"L": self.num_layers, "H": self.num_kv_heads, "T": self.page_tokens}
        axes = _AXES[self._layout]
        shape = [0, 0, 0, self.head_dim]
        for letter, axis in zip("LHT", axes, strict=False):
            shape[axis] = sizes[letter]
        views = [part.view(shape).permute(axes) for part in flat.split(count * self.head_dim)]
        return (views[0], views[0][..., :0]) if self.is_latent else (views[0], views[1])

    def _page(self, buffer: Tensor, first_token: int) -> Tensor:
        here = slice(first_token, first_token + self.page_tokens)
        if self._layout == "layer_first":
            page = buffer[:, here]
        elif self._layout == "page_first":
            page = buffer[here]
        else:
            page = buffer[first_token // self.page_tokens]
        return page.permute(_AXES[self._layout])
