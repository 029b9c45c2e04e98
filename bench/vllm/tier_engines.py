"""Engines over one tier that differ in what they load: by cost, or all that they find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from .bed import CHUNK_TOKENS, NO_HOST_BYTES
from .engine import KVLOOM, Engine
from .inputs import Shape
from .server import Setup

HOST, DISK, SLOW = "host", "disk", "slow disk"
SMALL = Shape(layers=4, hidden=512, intermediate=1536, heads=8, kv_heads=4, vocabulary=2048, max_tokens=4096)
TINY = Shape(layers=2, hidden=128, intermediate=256, heads=4, kv_heads=2, vocabulary=512, max_tokens=2048)


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Of all engines.

    Attributes
    ----------
    model : folder of the model.
    shape : of it.
    max_tokens : of a request.
    extra : kvloom's settings beside those of the tier.
    options : vLLM's.
    environment, prefix_caching : as of `Setup`.
    """

    model: Path
    shape: Shape
    max_tokens: int
    extra: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    prefix_caching: bool = True


class TierEngines:
    """Engines over equal stores, closed with `stack`. Chunks have `bed.CHUNK_TOKENS` tokens.

    Parameters
    ----------
    tier : `HOST`, or any other name for one whose chunks come from `folder`.
    folder : for the store and the logs; there already.
    texts : that are to be stored.
    choices : `load_or_recompute` of each.
    """

    def __init__(
        self,
        stack: ExitStack,
        settings: TierSettings,
        tier: str,
        folder: Path,
        texts: Sequence[Sequence[int]],
        choices: Sequence[str],
    ) -> None:
        self._tier, self._texts = tier, texts
        nbytes = sum(map(len, texts)) * settings.shape.token_bytes

        def engine(choice: str) -> Engine:
            extra: dict[str, object] = {"chunk_tokens": CHUNK_TOKENS, "load_or_recompute": choice, "lead_ids": []}
            extra["host_bytes"] = nbytes * 5 // 4 if tier == HOST else NO_HOST_BYTES
            if tier != HOST:
                extra["disk_path"] = str(folder / "store")
            setup = Setup(
                settings.model,
                {**KVLOOM, "kv_connector_extra_config": {**extra, **settings.extra}},
                settings.max_tokens,
                cache_gib=1,
                log=folder / f"{choice}.log",
                prefix_caching=settings.prefix_caching,
                options=settings.options,
                environment=settings.environment,
            )
            return stack.enter_context(Engine(f"{tier}, {choice}", setup))

        self.all = [engine(choice) for choice in choices]

    def store(self) -> None:
        """Store the texts, so that all engines find them: on a disk, each finds what the first one has stored."""
        for engine in self.all if self._tier == HOST else self.all[:1]:
            engine.generate(self._texts, {"load": False})
            engine.settle()

    def slow_down(self, latency_s: float, byte_s: float) -> None:
        """As `Engine.slow_down`, in all."""
        for engine in self.all:
            engine.slow_down(latency_s, byte_s)
