"""Tokens: hashed at rest, read from a file that may change while the service runs.

A token is `kvl_ID_SECRET`. The file keeps, by ID, the BLAKE2b of the secret (32 random bytes: nothing that can be
guessed, so no slow hash is needed), the tenant that it speaks for, its scopes, and until when it holds.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from .json_file import JsonFile

Scope: TypeAlias = Literal["read", "write", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)

TENANT_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TOKEN = re.compile(r"kvl_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_CHECK_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class Credential:
    """Who a request comes from. `admin` is the operator of the service, whatever the tenant."""

    token_id: str
    tenant: str
    scopes: frozenset[str]


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A line of the token file. `expires_at_s` is Unix time, None for never."""

    id: str
    tenant: str
    scopes: tuple[str, ...]
    secret_hash: str
    created_at_s: float
    expires_at_s: float | None = None


def check_tenant(name: str) -> str:
    """Raises `ValueError` for what is no name of a tenant."""
    if not TENANT_NAME.fullmatch(name):
        raise ValueError(f"tenant is {name!r:.80}; expected lower-case letters, digits and dashes, at most 63")
    return name


class TokenFile:
    """The tokens of a service. Every method may be called from any thread.

    Parameters
    ----------
    path : read again whenever it changes; tokens that are added count at once, those revoked within a second.
    clock : Unix time in seconds.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._file = JsonFile(path)
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[str, TokenEntry] = {}
        self._checked_at_s = float("-inf")

    def verify(self, token: str) -> Credential | None:
        """The credential of a token, or None. A wrong secret takes the same path as an ID that nobody has."""
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        token_id, secret_hash = match[1], _hash(match[2])
        for anew in (False, True):  # it may have been made just now
            entry = self._current(anew=anew).get(token_id)
            is_right = hmac.compare_digest(secret_hash, entry.secret_hash if entry is not None else "0" * 64)
            if entry is not None and is_right:
                has_ended = entry.expires_at_s is not None and entry.expires_at_s <= self._clock()
                return None if has_ended else Credential(entry.id, entry.tenant, frozenset(entry.scopes))
        return None

    def entries(self) -> list[TokenEntry]:
        with self._lock:
            self._load()
            return list(self._entries.values())

    def create(self, tenant: str, scopes: Iterable[str], *, ttl_s: float | None = None) -> str:
        """A new token, which nobody can read out of the file again.

        Raises
        ------
        ValueError : no such scope, no name of a tenant, or `ttl_s` is not above 0.
        """
        check_tenant(tenant)
        wanted = set(scopes)
        chosen = tuple(scope for scope in SCOPES if scope in wanted)
        if not chosen or wanted - set(SCOPES):
            raise ValueError(f"scopes are {sorted(wanted)}; expected some of {', '.join(SCOPES)}")
        if ttl_s is not None and not ttl_s > 0:
            raise ValueError(f"ttl_s is {ttl_s}; expected seconds above 0, or None")
        token_id, secret, now_s = secrets.token_hex(6), secrets.token_urlsafe(32), self._clock()
        expires_at_s = None if ttl_s is None else now_s + ttl_s
        with self._lock, self._file.changing():
            self._load()
            self._entries[token_id] = TokenEntry(token_id, tenant, chosen, _hash(secret), now_s, expires_at_s)
            self._save()
        return f"kvl_{token_id}_{secret}"

    def revoke(self, token_id: str) -> bool:
        """Whether there was such a token."""
        with self._lock, self._file.changing():
            self._load()
            found = self._entries.pop(token_id, None)
            if found is not None:
                self._save()
            return found is not None

    def _current(self, *, anew: bool = False) -> dict[str, TokenEntry]:
        now_s = time.monotonic()
        with self._lock:
            if anew or now_s - self._checked_at_s >= _CHECK_INTERVAL_S:
                self._checked_at_s = now_s
                self._load()
            return self._entries

    def _load(self) -> None:
        content: Any = self._file.news()
        try:
            entries = (
                []
                if content is None
                else [TokenEntry(**{**each, "scopes": tuple(each["scopes"])}) for each in content["tokens"]]
            )
        except (LookupError, TypeError, ValueError, AttributeError):  # whoever edits it by hand must not lock out all
            return
        if content is not None:
            self._entries = {entry.id: entry for entry in entries}

    def _save(self) -> None:
        self._file.write({"tokens": [asdict(each) for each in self._entries.values()]})


def _hash(secret: str) -> str:
    return hashlib.blake2b(secret.encode(), digest_size=32, person=b"kvloom token").hexdigest()
