"""Under which keys the KV of an engine's requests is stored, on every rank. Imports no engine."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from functools import cache
from typing import TypeAlias

import numpy as np

from ...core import ChunkKey, KVSpec
from ...kvstore.keys import TokenIds, content_key, page_hashes, page_keys
from ..identity.requests import chunk_salt
from .head_splits import HeadSplit
from .messages import Document, OtherKeys, RankKeys, RankOthers
from .settings import ServingSettings

_Numbers: TypeAlias = "tuple[tuple[tuple[int, ...], ...], ...]"


class _Specs:
    """All specs under which KV of an engine may be stored: those of its ranks, and of the parts of other sizes.

    Attributes
    ----------
    all : each once.
    own : of each rank, its number in `all`.
    parts : the same for `parts[rank][split][part]`; empty if no rank has splits.
    """

    def __init__(self, specs: Sequence[KVSpec], splits: Sequence[Sequence[HeadSplit]]) -> None:
        others = [part.spec for rank in splits for split in rank for part in split]
        self.all = tuple(dict.fromkeys([*specs, *others]))
        numbers = {spec: number for number, spec in enumerate(self.all)}
        self.own = tuple(numbers[spec] for spec in specs)
        self.parts: _Numbers = ()
        if others:
            self.parts = tuple(tuple(tuple(numbers[part.spec] for part in split) for split in rank) for rank in splits)


class Keys:
    """Of all requests of one engine.

    Parameters
    ----------
    settings : the user's.
    specs : geometry of each rank's cache, by rank; of its first group, where it has several.
    splits : where else each rank's heads may be stored, by rank, see `WorkerInfo`; empty to look nowhere else.
    further : specs of further groups of layers, by group and rank.
    """

    def __init__(
        self,
        settings: ServingSettings,
        specs: Sequence[KVSpec],
        splits: Sequence[Sequence[HeadSplit]] = (),
        further: Sequence[Sequence[KVSpec]] = (),
    ) -> None:
        self._settings = settings
        self._specs = _Specs(specs, splits)
        self._further = tuple(map(tuple, further))
        self._epoch = b""
        self.lead_ids = settings.lead_ids or ()

    def renew(self) -> None:
        """From now on nothing is found that was stored before, and no other process finds what this one stores."""
        self._epoch = secrets.token_bytes(16)

    def salt(self, identity: bytes) -> bytes:
        """For the keys of everything in a request; `identity` is the request's own part of a `chunk_salt`."""
        return chunk_salt(tenant=self._settings.salt.encode(), epoch=self._epoch) + identity

    def content(self, token_ids: TokenIds, salt: bytes) -> list[ChunkKey]:
        """Of a document, on the first rank: its own key, and those of the first ranks of other sizes."""
        first = [self._specs.own[0], *(split[0] for split in (self._specs.parts or ((),))[0])]
        return [self._content(number, token_ids, salt) for number in first]

    def document(self, start: int, stop: int, token_ids: TokenIds, salt: bytes) -> Document:
        """The document `token_ids`, which stands at tokens `[start, stop)` of a prompt."""
        key_of = cache(lambda number: self._content(number, token_ids, salt))
        own = tuple(key_of(number) for number in self._specs.own)
        others = tuple(tuple(tuple(key_of(number) for number in split) for split in rank) for rank in self._specs.parts)
        return Document(start, stop, own, others)

    def _content(self, number: int, token_ids: TokenIds, salt: bytes) -> ChunkKey:
        return content_key(self._specs.all[number], token_ids, lead_ids=self.lead_ids, salt=salt)

    def prefixes(self, token_ids: Sequence[int], salt: bytes) -> PrefixKeys:
        """Of the chunks of a request, none of them yet: see `PrefixKeys.extend`."""
        return PrefixKeys(self._specs, self._further, token_ids, salt, self._settings.chunk_tokens)


class PrefixKeys:
    """Of the whole chunks of one request, from its first token on. `token_ids` grows as the engine generates.

    `further`: specs of further groups, by group and rank. Each group names its pieces by its own spec and the same
    hashes of tokens.
    """

    def __init__(
        self,
        specs: _Specs,
        further: Sequence[Sequence[KVSpec]],
        token_ids: Sequence[int],
        salt: bytes,
        chunk_tokens: int,
    ) -> None:
        self._specs = specs
        self._further = further
        self._token_ids = token_ids
        self._salt = salt
        self._chunk_tokens = chunk_tokens
        self._last_hash: bytes | None = None
        self._rows: list[list[ChunkKey]] = [[] for _ in specs.all]
        self._further_rows: list[list[list[ChunkKey]]] = [[[] for _ in group] for group in further]

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
            for spec, keys in zip(self._specs.all, self._rows, strict=True):
                keys += page_keys(spec, hashes, chunk_tokens=size, salt=self._salt)
            for group, rows in zip(self._further, self._further_rows, strict=True):
                for spec, keys in zip(group, rows, strict=True):
                    keys += page_keys(spec, hashes, chunk_tokens=size, salt=self._salt)

    def of(self, chunk: int, group: int = 0) -> tuple[ChunkKey, ...]:
        """Of one chunk, for each rank."""
        return tuple(keys[chunk] for keys in self._rows_of(group))

    def between(self, first: int, last: int | None = None, group: int = 0) -> RankKeys:
        """Of chunks `[first, last)`; None for `last`: to the end of what is known."""
        return tuple(tuple(keys[first:last]) for keys in self._rows_of(group))

    def _rows_of(self, group: int) -> Sequence[Sequence[ChunkKey]]:
        """By rank."""
        return self._further_rows[group - 1] if group else [self._rows[number] for number in self._specs.own]

    def others_between(self, first: int, last: int | None = None) -> RankOthers:
        """Of the same chunks in other sizes."""
        chunks = range(len(self))[first:last]
        return tuple(tuple(self._others(rank, chunk) for chunk in chunks) for rank in self._specs.parts)

    def _others(self, rank: tuple[tuple[int, ...], ...], chunk: int) -> OtherKeys:
        return tuple(tuple(self._rows[number][chunk] for number in split) for split in rank)
