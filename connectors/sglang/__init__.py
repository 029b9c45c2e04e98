"""kvloom as the storage of SGLang's HiCache: `--hicache-storage-backend dynamic`, see docs/sglang.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["KVLoomStorage"]


def __getattr__(name: str) -> Any:
    """`KVLoomStorage`, which needs SGLang; the rest of this folder does not."""
    if name in __all__:
        return getattr(import_module(".storage", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
