"""Names of chunks: chained for reuse by position, position-free for reuse by text.

Both are BLAKE3 keyed with 32 bytes derived from the spec's fingerprint and the tenant's secret salt: another model,
geometry, dtype, rope table, shard or tenant never meets the same key, and without the salt it cannot be probed what a
tenant has stored. Keys are part of the on-disk format and stay as they are across releases.

The chain of a prefix is made of page hashes, which name tokens alone: SGLang's, as it tells a storage backend nothing
else of a request. A chunk is named alike by an engine that has the tokens and by one that only gives their hashes.
"""

from __future__ import annotations

import hashlib
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
_MAX_UINT32 = 2**32 - 1


def page_hashes(token_ids: TokenIds, *, chunk_tokens: int, after: bytes | None = None) -> list[bytes]:
    """SHA-256 of every whole chunk of a prompt and everything before it: of the hash before and the tokens, uint32.

    These are the hashes of SGLang 0.5 (`srt/mem_cache/cpp_utils/hash_binding.cpp`) for a page of `chunk_tokens`. A page
    with a token beyond 32 bits is hashed as a byte 0xff and uint64; all are little-endian.

    Parameters
    ----------
    token_ids : `[T]` non-negative integers; the last `T % chunk_tokens` have no hash.
    chunk_tokens : tokens a chunk.
    after : hash of the chunk that `token_ids` continue: a text that grows is hashed once. None if they begin it.

    Raises
    ------
    ValueError : `token_ids` are not a row of token ids, `chunk_tokens` is below 1, or `after` is no hash.
    """
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; expected at least 1")
    if after is not None:
        _check_page_hash(after, "after")
    tokens = _token_row(token_ids, "token_ids")
    whole = len(tokens) - len(tokens) % chunk_tokens
    pages = tokens[:whole].reshape(-1, chunk_tokens)
    is_wide: NDArray[np.bool_] = np.any(pages > _MAX_UINT32, axis=1)
    narrow = pages.astype("<u4").tobytes()
    parent, hashes, step = after or b"", [], 4 * chunk_tokens
    for i, wide in enumerate(is_wide):
        row = b"\xff" + pages[i].tobytes() if wide else narrow[i * step : (i + 1) * step]
        parent = hashlib.sha256(parent + row).digest()
        hashes.append(parent)
    return hashes


def page_keys(spec: KVSpec, hashes: Sequence[bytes], *, chunk_tokens: int, salt: bytes = b"") -> list[ChunkKey]:
    """Keys of the chunks of a prompt whose `page_hashes` are known; see `prefix_keys`.

    Raises
    ------
    ValueError : a hash is none.
    """
    for each in hashes:
        _check_page_hash(each, "hashes")
    secret, domain = _secret(spec, salt), b"prefix, version 3" + chunk_tokens.to_bytes(8, "little")
    return [ChunkKey(blake3(domain + each, key=secret).digest()) for each in hashes]


def prefix_keys(spec: KVSpec, token_ids: TokenIds, *, chunk_tokens: int, salt: bytes = b"") -> list[ChunkKey]:
    """Keys of the whole chunks of a prompt, each standing for its tokens and everything before them.

    Parameters
    ----------
    token_ids : `[T]` non-negative integers; the last `T % chunk_tokens` have no key.
    chunk_tokens : tokens a chunk.
    salt : secret of the tenant.

    Raises
    ------
    ValueError : `token_ids` are not a row of token ids, or `chunk_tokens` is below 1.
    """
    return page_keys(spec, page_hashes(token_ids, chunk_tokens=chunk_tokens), chunk_tokens=chunk_tokens, salt=salt)


def content_key(spec: KVSpec, token_ids: TokenIds, *, lead_ids: TokenIds = (), salt: bytes = b"") -> ChunkKey:
    """Key of a chunk that was computed on its own and may be placed anywhere. Tokens enter as little-endian int64.

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


def _check_page_hash(value: object, name: str) -> None:
    if not isinstance(value, bytes) or len(value) != hashlib.sha256().digest_size:
        raise ValueError(f"{name} has {value!r}; expected 32 bytes made by page_hashes")


def check_key(key: object, name: str) -> None:
    """Raises `ValueError` for what is no key; `name` is that of the argument."""
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"{name} is {key!r}; expected {KEY_BYTES} bytes made by prefix_keys or content_key")
