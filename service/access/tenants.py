"""Tenants: whose chunks are whose. A key as a client says it, and as the store knows it.

The store has one space of keys. A client's key is mapped into it by a permutation of all 32-byte strings that only the
service knows: four Feistel rounds (Luby and Rackoff, 1988) of BLAKE3, keyed with the secret salt of the tenant. So two
tenants that ask for the same key ask for different chunks, a tenant cannot name a chunk of another, and what the store
lists can be given back as the client's own keys without a table.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from blake3 import blake3

from ...core import ChunkKey
from ...kvstore.keys import KEY_BYTES
from .credentials import check_tenant
from .json_file import JsonFile

MOST_NAMESPACE_BYTES = 180  # of UTF-8, of the part that a client gives: the store keeps it behind the tenant's name
_HALF = KEY_BYTES // 2
_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class Tenant:
    """What the service keeps of a tenant.

    Attributes
    ----------
    pool : tenants of one pool share their chunks, which an operator decides; by default a tenant is alone in its own.
    reserve_ratio, limit_ratio : quota in every tier; None for the settings' value.
    requests_per_s : rate limit; None for the settings' value.
    """

    name: str
    pool: str
    reserve_ratio: float | None = None
    limit_ratio: float | None = None
    requests_per_s: float | None = None


class KeySpace:
    """The keys of one pool. Every method may be called from any thread."""

    def __init__(self, salt: bytes) -> None:
        self._round_keys = [
            blake3(bytes([index]) + salt, derive_key_context="kvloom service key space, version 1").digest()
            for index in range(_ROUNDS)
        ]
        self.to_store = lru_cache(maxsize=1 << 16)(self._to_store)

    def _to_store(self, key: bytes) -> ChunkKey:
        """The key under which the store knows a client's chunk."""
        left, right = int.from_bytes(key[:_HALF]), int.from_bytes(key[_HALF:])
        for round_key in self._round_keys:
            left, right = right, left ^ _round(round_key, right)
        return ChunkKey(left.to_bytes(_HALF) + right.to_bytes(_HALF))

    def to_client(self, key: ChunkKey) -> bytes:
        """The key by which the client named the chunk that the store knows as `key`."""
        left, right = int.from_bytes(key[:_HALF]), int.from_bytes(key[_HALF:])
        for round_key in reversed(self._round_keys):
            left, right = right ^ _round(round_key, left), left
        return left.to_bytes(_HALF) + right.to_bytes(_HALF)


class TenantFile:
    """Tenants and their secret salts, in a file that all workers share. Every method may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self._file = JsonFile(path)
        self._lock = threading.Lock()
        self._tenants: dict[str, Tenant] = {}
        self._salts: dict[str, bytes] = {}
        self._spaces: dict[str, KeySpace] = {}
        self._load()

    def get(self, name: str) -> Tenant:
        """The tenant; made, alone in its pool, if it is new."""
        with self._lock:
            found = self._tenants.get(name)
        return self.update(name) if found is None else found

    def all(self) -> list[Tenant]:
        with self._lock:
            self._load()
            return list(self._tenants.values())

    def update(self, name: str, **changes: float | str | None) -> Tenant:
        """Changes what is given, and returns the tenant."""
        check_tenant(name)
        with self._lock, self._file.changing():
            self._load()
            tenant = replace(self._tenants.get(name, Tenant(name, pool=name)), **changes)  # type: ignore[arg-type]
            check_tenant(tenant.pool)
            self._tenants[name] = tenant
            self._salts.setdefault(tenant.pool, secrets.token_bytes(32))
            self._file.write(
                {
                    "tenants": [asdict(each) for each in self._tenants.values()],
                    "salts": {pool: salt.hex() for pool, salt in self._salts.items()},
                }
            )
            return tenant

    def keys_of(self, name: str) -> KeySpace:
        """The key space of a tenant's pool."""
        return self.key_space(self.get(name).pool)

    def key_space(self, pool: str) -> KeySpace:
        with self._lock:
            if pool not in self._spaces:
                self._spaces[pool] = KeySpace(self._salts[pool])
            return self._spaces[pool]

    def _load(self) -> None:
        content: Any = self._file.news()
        if content is None:
            return
        self._tenants = {each["name"]: Tenant(**each) for each in content["tenants"]}
        self._salts = {pool: bytes.fromhex(salt) for pool, salt in content["salts"].items()}


def store_namespace(pool: str, namespace: str) -> str:
    """The namespace of the store in which a tenant's namespace lies."""
    if len(namespace.encode()) > MOST_NAMESPACE_BYTES:
        raise ValueError(f"namespace is {namespace!r:.40}; expected at most {MOST_NAMESPACE_BYTES} bytes of UTF-8")
    return f"{pool}/{namespace}" if namespace else pool


def client_namespace(stored: str) -> tuple[str, str]:
    """Pool and namespace, from what the store keeps."""
    pool, _, namespace = stored.partition("/")
    return pool, namespace


def pools(tenants: Iterable[Tenant]) -> dict[str, list[Tenant]]:
    """The tenants of each pool."""
    found: dict[str, list[Tenant]] = {}
    for tenant in tenants:
        found.setdefault(tenant.pool, []).append(tenant)
    return found


def _round(round_key: bytes, half: int) -> int:
    return int.from_bytes(blake3(half.to_bytes(_HALF), key=round_key).digest(_HALF))
