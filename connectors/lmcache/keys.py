"""Names of LMCache's objects in a `KVStore`. They are part of what lies on disk."""

from __future__ import annotations

from typing import Protocol

from blake3 import blake3

from ...core import ChunkKey

_CONTEXT = "kvloom objects of LMCache, version 1"


class ObjectName(Protocol):
    """LMCache's `ObjectKey`.

    Attributes
    ----------
    chunk_hash : hash of the tokens of a chunk and of all before them.
    model_name : as the engine was told it.
    kv_rank : world size and rank, a byte each, of the world and of the host.
    object_group_id : which of the engine's groups of layers.
    cache_salt : the tenant, as the request says.
    """

    @property
    def chunk_hash(self) -> bytes: ...
    @property
    def model_name(self) -> str: ...
    @property
    def kv_rank(self) -> int: ...
    @property
    def object_group_id(self) -> int: ...
    @property
    def cache_salt(self) -> str: ...


def object_key(name: ObjectName, *, model_id: str, salt: str) -> ChunkKey:
    """Key of one object.

    Precision and shape are not part of it, as LMCache does not tell them at every look-up; they are stored with the
    object and compared at every load.

    Parameters
    ----------
    model_id : what the user calls the weights; empty if nothing is said beside `model_name`.
    salt : the user's secret, without which it cannot be probed what is stored.
    """
    numbers = (name.kv_rank, name.object_group_id)
    parts = (
        salt.encode(),
        model_id.encode(),
        name.model_name.encode(),
        *(number.to_bytes(8, "little") for number in numbers),
        name.cache_salt.encode(),
        name.chunk_hash,
    )
    framed = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
    return ChunkKey(blake3(framed, derive_key_context=_CONTEXT).digest())
