"""Under which keys the KV of an engine's requests is stored, on every rank. Imports no engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np

from ...core import ChunkKey, KVSpec
from ...kvstore.keys import TokenIds, content_key, page_hashes, page_keys
from ..identity.requests import chunk_salt
from .messages import RankKeys
from .settings import ServingSettings


class Keys:
    """Of all requests of one engine.

    Parameters
    ----------
    settings : the user's.
    specs : geometry of each rank's cache, by rank.
    """

    def __init__(self, settings: ServingSettings, specs: Sequence[KVSpec]) -> None:
        self._settings = settings
        self._specs = tuple(specs)
        self._epoch = b""
        self.lead_ids = settings.lead_ids or ()

    def renew(self) -> None:
        """From now on nothing is found that was stored before, and no other process finds what this one stores."""
        self._epoch = secrets.token_bytes(16)

    def salt(self, identity: bytes) -> bytes:
        """For the keys of everything in a request; `identity` is the request's own part of a `chunk_salt`."""
        return chunk_salt(tenant=self._settings.salt.encode(), epoch=self._epoch) + identity

    def content(self, token_ids: TokenIds, salt: bytes, rank: int = 0) -> ChunkKey:
        """Of a document, on one rank."""
        return content_key(self._specs[rank], token_ids, lead_ids=self.lead_ids, salt=salt)

    def contents(self, token_ids: TokenIds, salt: bytes) -> tuple[ChunkKey, ...]:
        """Of a document, for each rank."""
        return tuple(self.content(token_ids, salt, rank) for rank in range(len(self._specs)))

    def prefixes(self, token_ids: Sequence[int], salt: bytes) -> PrefixKeys:
        """Of the chunks of a request, none of them yet: see `PrefixKeys.extend`."""
        return PrefixKeys(self._specs, token_ids, salt, self._settings.chunk_tokens)


class PrefixKeys:
    """Of the whole chunks of one request, from its first token on. `token_ids` grows as the engine generates."""

    def __init__(self, specs: Sequence[KVSpec], token_ids: Sequence[int], salt: bytes, chunk_tokens: int) -> None:
        self._specs = specs
        self._token_ids = token_ids
        self._salt = salt
        self._chunk_tokens = chunk_tokens
        self._last_hash: bytes | None = None
        self._rows: list[list[ChunkKey]] = [[] for _ in specs]

    def __len__(self) -> int:
        """Chunks whose keys are known."""
        return len(self._rows[0])

    def extend(self) -> None:
        """To every chunk that is whole by now."""
        size = self._chunk_tokens
        done, whole = len(self), len(self._token_ids) // size
        if done < whole:
            row = np.asarray(self._token_ids[done * size : whole * size], dtype=np.int64)
            hashes = page_hashes(row, chunk_tokens=size, after=self._last_hash)
            self._last_hash = hashes[-1]
            for spec, keys in zip(self._specs, self._rows, strict=True):
                keys += page_keys(spec, hashes, chunk_tokens=size, salt=self._salt)

    def of(self, chunk: int) -> tuple[ChunkKey, ...]:
        """Of one chunk, for each rank."""
        return tuple(keys[chunk] for keys in self._rows)

    def between(self, first: int, last: int | None = None) -> RankKeys:
        """Of chunks `[first, last)`; None for `last`: to the end of what is known."""
        return tuple(tuple(keys[first:last]) for keys in self._rows)
