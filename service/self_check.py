"""What a service finds out about itself before it serves."""

from __future__ import annotations

import secrets
import stat

import torch

from ..core import ChunkKey, EncodedChunk
from ..errors import KVLoomError
from .served_store import ServedStore
from .settings import ServiceSettings


def check_settings(settings: ServiceSettings, *, has_tokens: bool) -> None:
    """Raises `ValueError` for an address that other machines reach without TLS or without tokens made for it."""
    if settings.is_loopback:
        return
    if not settings.uses_tls:
        raise ValueError(
            f"host is {settings.host}, which other machines may reach: give tls_certificate and tls_key, or listen on "
            "127.0.0.1 behind a proxy that has them"
        )
    if not has_tokens:
        raise ValueError(
            f"host is {settings.host}, which other machines may reach, and there are no tokens: make some with "
            "`kvloom token create` first"
        )


def problems_of(settings: ServiceSettings, store: ServedStore) -> list[str]:
    """What is wrong, in words: private files that others may read, and tiers that do not give back what they take."""
    private = (settings.directory, settings.directory / "tokens.json", settings.directory / "tenants.json")
    problems = [
        f"{path} can be read by other users of this machine; run: chmod go= {path}"
        for path in private
        if path.exists() and path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    ]
    for tier in store.tiers:
        key = ChunkKey(secrets.token_bytes(32))
        data = torch.randint(0, 256, (1000,), dtype=torch.uint8)
        try:
            tier.put(key, EncodedChunk("self-check", {"data": data}, {}))
            found = tier.get(key)
            if found is None or not torch.equal(found.tensors["data"], data):
                problems.append(f"tier {tier.name!r} does not give back what it has taken")
            tier.delete(key)
        except KVLoomError as exc:
            problems.append(f"tier {tier.name!r} fails: {exc}")
    return problems
