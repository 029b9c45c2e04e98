"""kvloom as storage below LMCache's server: `--l2-adapter` of type `plugin`, see docs/lmcache.md."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["KVLoomL2Adapter"]


def __getattr__(name: str) -> Any:
    """`KVLoomL2Adapter`, which needs LMCache; the rest of this folder does not."""
    if name in __all__:
        return getattr(import_module(".l2_adapter", __name__), name)
    raise AttributeError(f"module {__name__} has no attribute {name!r}")
