"""Keys and values of one layer in pages of memory that others own, and attention over chosen tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .attention import PartialAttention, attend, empty_attention
from .kernels.ops import check_ids, compiled_for_cpu


class PagedKV:
    """The tokens of one layer of one sequence, in pages; nothing is copied.

    Ownership: the object refers to the tensors of its pages, so their memory lives as long as it does. Writing to them
    changes the result of attention.

    Parameters
    ----------
    page_tokens : tokens of a page. The last page may be shorter; then no page can be appended.
    """

    def __init__(self, page_tokens: int) -> None:
        if page_tokens < 1:
            raise ValueError(f"page_tokens is {page_tokens}; expected at least 1")
        self.page_tokens = page_tokens
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._table = np.empty((0, 6), np.int64)  # of the first pages, made longer when it is next needed
        self._tokens = 0

    def __len__(self) -> int:
        return self._tokens

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds the next tokens, `[H, N, D]` and `[H, N, Dv]` on the cpu, as one or more pages.

        Raises `ValueError` for other shapes and dtypes than those of the first page, for rows that are not contiguous,
        and after a page that is not full.
        """
        for name, tensor, of_first in (("keys", keys, self._keys), ("values", values, self._values)):
            expected = of_first[0] if of_first else keys
            if tensor.ndim != 3 or tensor.shape[:2] != (expected.shape[0], keys.shape[1]) or tensor.is_cuda:
                raise ValueError(f"{name} are {list(tensor.shape)} on {tensor.device}; expected [H, N, D] on the cpu")
            if of_first and (tensor.dtype, tensor.shape[2]) != (expected.dtype, expected.shape[2]):
                raise ValueError(
                    f"{name} are {tensor.dtype} {list(tensor.shape)}; expected {expected.dtype} of {expected.shape[2]}"
                )
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ValueError(f"{name} are {tensor.dtype}; expected floats of 16 or 32 bits")
            if tensor.shape[2] > 1 and tensor.stride(2) != 1:
                raise ValueError(f"{name} lie in steps of {list(tensor.stride())}; expected contiguous rows")
        if not keys.shape[1]:
            return
        if self._tokens % self.page_tokens:
            raise ValueError(
                f"the last page has {self._tokens % self.page_tokens} tokens; only full ones of {self.page_tokens} "
                "can be followed by others"
            )
        for page in zip(keys.split(self.page_tokens, 1), values.split(self.page_tokens, 1), strict=True):
            self._keys.append(page[0])
            self._values.append(page[1])
        self._tokens += keys.shape[1]

    def gather(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of the rows `ids` (`[H, K]` int64, -1 for none): `[H, K, D]` and `[H, K, Dv]`; rows of -1 are zeros.

        Raises `ValueError` for ids that are no tokens, and if there are no pages.
        """
        self._check(ids)
        keys, values = (rows[0].new_zeros(*ids.shape, rows[0].shape[2]) for rows in (self._keys, self._values))
        kernel = compiled_for_cpu()
        if kernel is not None:
            kernel.gather_rows(self._addresses(), self.page_tokens, ids, keys, values)
            return keys, values
        of_page, token = ids // self.page_tokens, ids % self.page_tokens
        for page in of_page[ids >= 0].unique().tolist():
            head, place = (of_page == page).nonzero(as_tuple=True)
            keys[head, place] = self._keys[page][head, token[head, place]]
            values[head, place] = self._values[page][head, token[head, place]]
        return keys, values

    def keys_at(self, ids: Tensor) -> Tensor:
        """Copies of the keys of rows `ids`, `[H, K, D]`; see `gather`."""
        self._check(ids)
        keys = self._keys[0].new_zeros(*ids.shape, self._keys[0].shape[2])
        kernel = compiled_for_cpu()
        if kernel is None:
            return self.gather(ids)[0]
        kernel.gather_rows(self._addresses(), self.page_tokens, ids, keys)
        return keys

    def attend(self, queries: Tensor, ids: Tensor, *, scale: float) -> PartialAttention:
        """Attention of one query token (`[Hq, D]`) over the rows `ids`, see `gather_attend` of ops.py."""
        self._check(ids)
        H, _, D = self._keys[0].shape
        if queries.ndim != 2 or queries.shape[1] != D or queries.shape[0] % H or not queries.is_floating_point():
            raise ValueError(f"queries are {queries.dtype} {list(queries.shape)}; expected floats [Hq, {D}] for {H}")
        if not ids.numel():
            return empty_attention(queries.shape[0], self._values[0].shape[2])
        kernel = compiled_for_cpu()
        if kernel is None:
            return attend(queries, *self.gather(ids), scale=scale, visible=ids >= 0)
        dtypes, v_dim = (self._keys[0].dtype, self._values[0].dtype), self._values[0].shape[2]
        found: PartialAttention = kernel.gather_attend(
            queries, self._addresses(), self.page_tokens, dtypes, v_dim, ids, scale
        )
        return found

    def _check(self, ids: Tensor) -> None:
        if not self._keys:
            raise ValueError("there are no pages; append some first")
        check_ids(ids, self._keys[0].shape[0], self._tokens)

    def _addresses(self) -> np.ndarray:
        """Addresses of the pages, `[P, 6]` int64: `row_addresses` of keys and of values."""
        from .kernels.ops_numba import row_addresses

        known = len(self._table)
        if known < len(self._keys):
            new = [
                (*row_addresses(k), *row_addresses(v))
                for k, v in zip(self._keys[known:], self._values[known:], strict=True)
            ]
            self._table = np.concatenate((self._table, np.array(new, np.int64)))
        return self._table
