"""KV that was computed outside, a fused context for instance, put where stock SGLang finds it.

A request may carry an `extra_key`, with which SGLang begins the hashes of its pages. What is stored under such a key is
found by requests that carry it, and never by a plain prompt of the same tokens: approximate KV cannot pass for exact.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ...core import KVChunk, KVSpec
from ...kvstore.keys import page_hashes, page_keys
from ...kvstore.store import KVStore
from ..identity.requests import chunk_salt


def store_context(
    store: KVStore,
    spec: KVSpec,
    token_ids: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    page_tokens: int,
    extra_key: str,
    salt: str = "",
) -> int:
    """Store the whole pages of a context that begins at position 0; how many tokens they have.

    SGLang computes the rest of the prompt, and its last token always.

    Parameters
    ----------
    store : with a tier that SGLang reads, too.
    spec : of SGLang's rank, as chunks that it has stored have it.
    token_ids : `[S]`, as the prompt begins.
    keys, values : `[L, H, S, D]` after rotation at positions 0 to S - 1, `[L, H, S, Dv]`: a `BlendedContext` has both.
    page_tokens : SGLang's page size.
    extra_key : of the requests that may use it; a name of the documents, their order and how they were fused.
    salt : the tenant's, as in SGLang's settings.

    Raises
    ------
    ValueError : there is no extra key, or the tokens are none.
    SpecMismatchError : the KV is not what `spec` says.
    TierFullError, TierUnavailableError : see `KVStore.put`.
    """
    if not extra_key:
        raise ValueError("extra_key is empty; without one, plain prompts would find this KV")
    hashes = page_hashes(token_ids, chunk_tokens=page_tokens, after=namespace_seed(extra_key))
    names = page_keys(spec, hashes, chunk_tokens=page_tokens, salt=chunk_salt(tenant=salt.encode()))
    before = None
    for i, name in enumerate(names):
        here = slice(i * page_tokens, (i + 1) * page_tokens)
        positions = torch.arange(here.start, here.stop)
        chunk = KVChunk(spec, token_ids[here].cpu(), positions, keys[:, :, here], values[:, :, here])
        store.put(name, chunk, after=before)
        before = name
    return len(names) * page_tokens


def namespace_seed(extra_key: str) -> bytes:
    """What SGLang 0.5 begins the hashes of a request with: `storage_namespace_seed(extra_key, None)`."""
    text = extra_key.encode()
    part = b"\x01" + len(text).to_bytes(8, "little") + text
    return hashlib.sha256(b"sglang-cache-namespace-v1" + part + b"\x00").digest()
