"""Pages of SGLang's pools beside the KV (windows, recurrent states, indexers, drafts), as bytes. Imports no engine.

Only SGLang knows what they mean, so they are stored as they lie in host memory, verified as everything, under a key
that names pool, dtype, layout and size beside the page.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...core import ChunkKey, EncodedChunk
from ...kvstore.keys import derived_key
from ...kvstore.store import KVStore

_CODEC = "bytes"  # of no codec here: a store passes it through
_BYTES = "page"


class SidePool:
    """One such pool.

    Parameters
    ----------
    name : SGLang's `PoolName`.
    pool : its host pool.
    rank : of tensor parallelism, as text; the same on ranks that hold the same bytes.
    """

    def __init__(self, name: str, pool: Any, rank: str) -> None:
        self._pool = pool
        self.page_tokens = int(getattr(pool, "page_size", 1) or 1)
        self._page_bytes = int(pool.get_dummy_flat_data_page().nbytes)
        kind = f"{type(pool).__name__} {getattr(pool, 'layout', '')} {getattr(pool, 'dtype', '')} {self._page_bytes}"
        self._purpose = f"SGLang's pool {name}: {kind} {rank}"

    def key_of(self, page: ChunkKey) -> ChunkKey:
        """Key of this pool's part of a page."""
        return derived_key(page, self._purpose)

    def write(self, store: KVStore, page: ChunkKey, first_token: int) -> bool:
        """Store a page from the pool."""
        flat = self._pool.get_data_page(first_token, flat=True).contiguous()
        store.put_encoded(self.key_of(page), EncodedChunk(_CODEC, {_BYTES: flat.view(torch.uint8)}, {}, leased=True))
        return True

    def read(self, store: KVStore, page: ChunkKey, first_token: int) -> bool:
        """Copy a stored page into the pool; False if there is none."""
        blob = store.get_encoded(self.key_of(page))
        if blob is None or blob.codec != _CODEC or blob.nbytes != self._page_bytes:
            return False
        flat = self._pool.get_dummy_flat_data_page()
        flat.view(torch.uint8).copy_(blob.tensors[_BYTES])
        self._pool.set_from_flat_data_page(first_token, flat)
        return True


def restorable_prefixes(
    kv_pages: int, transfers: Sequence[Any], has_page: Callable[[str, int], bool]
) -> tuple[list[int], dict[str, int]]:
    """Prefix lengths in pages that every pool can restore, and for each pool how far it reaches.

    Parameters
    ----------
    kv_pages : leading pages whose KV is stored.
    transfers : SGLang's `PoolTransfer` of each further pool; one of an unknown policy gets no verdict, and holds
        nothing back.
    has_page : whether a pool's part of a page is stored, by the pool's name and the page's number.
    """
    restorable, reach = list(range(1, kv_pages + 1)), dict[str, int]()
    for transfer in transfers:
        name, policy = str(transfer.name), str(getattr(transfer.hit_policy, "value", transfer.hit_policy))
        if policy == "all_pages":
            until = next((page for page in range(kv_pages) if not has_page(name, page)), kv_pages)
            fits = set(range(1, until + 1))
        elif policy == "trailing_pages":
            count = max(1, len(transfer.keys or ()))
            held = [has_page(name, page) for page in range(kv_pages)]
            fits = {end for end in range(1, kv_pages + 1) if all(held[max(0, end - count) : end])}
        else:
            continue
        reach[transfer.name] = max(fits, default=0)
        restorable = [pages for pages in restorable if pages in fits]
    return restorable, reach


def transfer_pages(
    pools: Mapping[str, SidePool],
    transfer: Any,
    keys: Sequence[ChunkKey],
    move: Callable[[SidePool, ChunkKey, int], bool],
) -> list[bool]:
    """Apply `move` to the pages of a transfer, until one fails; whether each was moved."""
    pool, indices, done = pools.get(str(transfer.name)), transfer.host_indices, [False] * len(keys)
    if pool is None or indices is None or indices.numel() != len(keys) * pool.page_tokens:
        return done
    for i, key in enumerate(keys):
        if not move(pool, key, int(indices[i * pool.page_tokens])):
            break
        done[i] = True
    return done
