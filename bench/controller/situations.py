"""Situations that are brought about on purpose, and whether requests are told the right reason."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core import KVChunk, KVSpec
from ...kvstore.keys import prefix_keys
from ...kvstore.store import KVStore
from ...kvstore.tiers.disk.tier import DiskTier
from ..vllm.engine import Engine
from ..vllm.server import Served

_TTL_S = 1.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What was brought about, and what requests were told.

    `right`: some must have been told one of these; `also`: what others may have been told.
    """

    what: str
    told: tuple[str, ...]
    right: frozenset[str]
    also: frozenset[str] = frozenset()

    @property
    def is_right(self) -> bool:
        """Whether a request was told a right reason, and none a wrong one."""
        told = set(self.told)
        return bool(told & self.right) and told <= self.right | self.also


def situation(what: str, served: Served, right: Collection[str], *, also: Collection[str] = ()) -> Situation:
    """What these requests were told."""
    return Situation(what, served.decisions, frozenset(right), frozenset(also))


def store_another_model(folder: Path) -> None:
    """Put one chunk of a model that no engine serves into a disk tier."""
    spec = KVSpec("another model", 2, 2, 8, torch.float32, None)
    tokens = torch.arange(16)
    (key,) = prefix_keys(spec, tokens.tolist(), chunk_tokens=16)
    with KVStore([DiskTier(folder)]) as store:
        store.put(key, KVChunk(spec, tokens, tokens, torch.zeros(2, 2, 16, 8), torch.zeros(2, 2, 16, 8)))


def ask_expired(engine: Engine, prompt: list[int]) -> Situation:
    """A prompt that was stored with a limit of time, which is over."""
    engine.expire(_TTL_S)
    engine.generate([prompt], {"load": False})
    engine.settle()
    engine.expire(None)
    time.sleep(_TTL_S)
    return ask_new(engine, prompt, "a prompt stored for a second", "expired")


def ask_new(engine: Engine, prompt: list[int], what: str, right: str, *, save: bool = False) -> Situation:
    """A prompt that is not stored."""
    engine.reset()
    return situation(what, engine.generate([prompt], {"save": save}), [right])
