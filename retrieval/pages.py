"""One layer's keys and values where they lie: equal pieces in somebody else's memory, gathered by token."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import Partial, attend


class Pages:
    """Keys and values of the tokens `[0, len)` of one layer, as references to pieces of `page_tokens` tokens.

    Parameters
    ----------
    page_tokens : tokens of every piece.
    """

    def __init__(self, page_tokens: int) -> None:
        if page_tokens < 1:
            raise ValueError(f"page_tokens is {page_tokens}; expected at least 1")
        self.page_tokens = page_tokens
        self._pages: list[tuple[Tensor, Tensor]] = []

    def __len__(self) -> int:
        return len(self._pages) * self.page_tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """The next piece, `[H, page_tokens, D]` and `[H, page_tokens, Dv]`; kept, not copied."""
        if keys.ndim != 3 or keys.shape[:2] != values.shape[:2] or keys.shape[1] != self.page_tokens:
            raise ValueError(
                f"keys are {list(keys.shape)}, values {list(values.shape)}; expected [H, {self.page_tokens}, D] each"
            )
        self._pages.append((keys, values))

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys `[H, K, D]` and values `[H, K, Dv]` of the tokens `ids` (`[H, K]` int64); of -1, those of some token.

        Raises
        ------
        IndexError : an id is not below `len`.
        """
        if ids.numel() and (int(ids.max()) >= len(self) or int(ids.min()) < -1):
            raise IndexError(f"ids reach from {int(ids.min())} to {int(ids.max())}; there are {len(self)} tokens")
        rows = ids.clamp(min=0)
        pages, places = rows // self.page_tokens, rows % self.page_tokens
        heads = torch.arange(ids.shape[0])[:, None].expand_as(ids)
        keys = values = None
        for page in pages.unique().tolist():
            here = pages == page
            of_keys, of_values = self._pages[page]
            if keys is None or values is None:
                keys = of_keys.new_empty(*ids.shape, of_keys.shape[-1])
                values = of_values.new_empty(*ids.shape, of_values.shape[-1])
            keys[here] = of_keys[heads[here], places[here]]
            values[here] = of_values[heads[here], places[here]]
        if keys is None or values is None:
            raise IndexError("ids are empty; there is nothing to gather")
        return keys, values

    def attend(self, queries: Tensor, ids: Tensor, *, scale: float) -> Partial:
        """Attention of one query token `[Hq, D]` over the tokens `ids`; -1 for none."""
        keys, values = self.gather(ids)
        return attend(queries, keys, values, scale=scale, visible=ids >= 0)
