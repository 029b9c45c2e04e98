"""What a service finds out about itself before it serves."""

from __future__ import annotations

import secrets
import stat
from importlib.util import find_spec
from pathlib import Path

import torch

from ..core import ChunkKey, EncodedChunk
from ..errors import KVLoomError
from .served_store import ServedStore
from .settings import ServiceSettings

_PRIVATE = ("tokens.json", "tenants.json", "namespaces.json", "audit.jsonl*", "documents.sqlite*", "chunks", "tiers")


def check_settings(settings: ServiceSettings, *, has_tokens: bool) -> None:
    """Raises `ValueError` for an address that other machines reach without TLS or without tokens made for it.

    And for models without the packages that compute with them.
    """
    if settings.models and (find_spec("transformers") is None or find_spec("tokenizers") is None):
        raise ValueError(
            "models are given, and transformers is not installed: pip install 'kvloom[service,transformers]'"
        )
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


def check_directory(directory: Path) -> None:
    """Makes what the service keeps there its owner's alone.

    Raises
    ------
    ValueError : others may write into the directory, and so could replace its tokens; or a file cannot be made private.
    """
    if directory.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ValueError(
            f"directory is {directory}, into which other users may write: give the service a folder of its own, or run "
            f"chmod go-w {directory}"
        )
    for path in [path for pattern in _PRIVATE for path in directory.glob(pattern)]:
        if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            try:
                path.chmod(0o700 if path.is_dir() else 0o600)
            except OSError as exc:
                raise ValueError(f"{path} can be read by others, and cannot be made private: {exc.strerror}") from exc


def problems_of(store: ServedStore) -> list[str]:
    """What is wrong, in words: tiers that do not give back what they take."""
    problems = []
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
