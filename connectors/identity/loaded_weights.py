"""What an engine in a process of its own has loaded: the files as they were, or something that has no shared name."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

_LOG = logging.getLogger("kvloom.identity")
_CLOCKS_S = 2.0  # by which a file system's clock may be behind the machine's

# Their code in vLLM was read, of which SGLang's is made: given the rope table, the longest context shapes no KV.
ANY_LENGTH = frozenset(
    {"llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "granite", "olmo2", "gemma", "glm4"}
)


def private_name(where: str, why: str) -> str:
    """A random name, under which nothing is shared; the log says why. `where`: the user's settings."""
    _LOG.warning(
        '%s: kvloom shares nothing with other engines and earlier runs; name the weights as "model_id" in %s to share',
        why,
        where,
    )
    return f"private-{secrets.token_hex(16)}"


def may_have_changed(folder: Path, files: Sequence[Path]) -> bool:
    """Whether a file was written, replaced or renamed since this process began, and may not be what it has loaded."""
    stats = [path.stat() for path in (*files, folder / "config.json") if path.exists()]
    return max(max(stat.st_mtime, stat.st_ctime) for stat in stats) > process_start_s() - _CLOCKS_S


def process_start_s() -> float:
    """Unix time."""
    return float(import_module("psutil").Process().create_time())  # vLLM and SGLang need it
