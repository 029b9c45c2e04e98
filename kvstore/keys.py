"""Names of chunks: chained for reuse by position, position-free for reuse by text.

Both are BLAKE3 keyed with 32 bytes derived from the spec's fingerprint and the tenant's secret salt: another model,
geometry, dtype, rope table, shard or tenant never meets the same key, and without the salt it cannot be probed what a
tenant has stored. Tokens enter as little-endian int64. Keys are part of the on-disk format and stay as they
are across releases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from ..core import ChunkKey, KVSpec

TokenIds: TypeAlias = "Tensor | NDArray[np.integer] | Sequence[int]"

KEY_BYTES = 32
_CONTEXT = "kvloom chunk keys, version 2"


def prefix_keys(
    spec: KVSpec, token_ids: TokenIds, *, chunk_tokens: int, salt: bytes = b"", after: ChunkKey | None = None
) -> list[ChunkKey]:
    """Keys of the whole chunks of a prompt, each standing for its tokens and everything before them.

    Parameters
    ----------
    token_ids : `[T]` non-negative integers; the last `T % chunk_tokens` have no key.
    chunk_tokens : tokens a chunk.
    salt : secret of the tenant.
    after : key of the chunk that `token_ids` continue, of the same spec and salt: a text that grows is hashed once.
        None if they begin it.

    Raises
    ------
    ValueError : `token_ids` are not a row of token ids, `chunk_tokens` is below 1, or `after` is no key.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    tokens = _token_row(token_ids, "token_ids")
    secret = _secret(spec, salt)
    if after is None:
        parent = blake3(b"prefix", key=secret).digest()
    else:
        check_key(after, "after")
        parent = after
    keys = []
    for end in range(chunk_tokens, len(tokens) + 1, chunk_tokens):
        parent = blake3(parent + tokens[end - chunk_tokens : end].tobytes(), key=secret).digest()
        keys.append(ChunkKey(parent))
    return keys


def content_key(spec: KVSpec, token_ids: TokenIds, *, lead_ids: TokenIds = (), salt: bytes = b"") -> ChunkKey:
    """Key of a chunk that was computed on its own and may be placed anywhere.

    Parameters
    ----------
    token_ids : `[T]` non-negative integers, the tokens whose KV the chunk holds.
    lead_ids : tokens that stood before the chunk when it was computed and were dropped (a BOS): they shape its KV.
    salt : secret of the tenant.

    Raises
    ------
    ValueError : `token_ids` or `lead_ids` are not a row of token ids, or there is no token.
    """
    lead, tokens = _token_row(lead_ids, "lead_ids"), _token_row(token_ids, "token_ids")
    if not len(tokens):
        raise ValueError("token_ids is empty; a chunk holds at least one token")
    message = b"content" + len(lead).to_bytes(8, "little") + lead.tobytes() + tokens.tobytes()
    return ChunkKey(blake3(message, key=_secret(spec, salt)).digest())


def derived_key(key: ChunkKey, purpose: str) -> ChunkKey:
    """Key of something that belongs to the chunk of `key`, or of another chunk in its place; `purpose` tells which."""
    check_key(key, "key")
    return ChunkKey(blake3(b"derived" + key + purpose.encode()).digest())


def _secret(spec: KVSpec, salt: bytes) -> bytes:
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in (spec.fingerprint(), salt))
    return blake3(framed, derive_key_context=_CONTEXT).digest()


def _token_row(token_ids: TokenIds, name: str) -> NDArray[np.int64]:
    if isinstance(token_ids, Tensor):
        token_ids = token_ids.detach().cpu().numpy()
    try:
        row = np.asarray(token_ids)
    except ValueError as exc:
        raise ValueError(f"{name} is ragged; expected a row of token ids") from exc
    if row.ndim != 1:
        raise ValueError(f"{name} has shape {list(row.shape)}; expected one dimension")
    if not row.size:
        return np.empty(0, dtype="<i8")
    if row.dtype.kind not in "iu":
        raise ValueError(f"{name} holds {row.dtype}; expected integers within int64")
    # A negative id is a placeholder (an image, padding): chunks of different meaning would share a key.
    if row.min() < 0 or row.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} reaches from {row.min()} to {row.max()}; expected token ids from 0 within int64")
    return np.ascontiguousarray(row, dtype="<i8")


def check_key(key: object, name: str) -> None:
    """Raises `ValueError` for what is no key; `name` is that of the argument."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"{name} is {key!r}; expected {KEY_BYTES} bytes made by prefix_keys or content_key")
