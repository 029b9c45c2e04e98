"""The groups in which vLLM keeps the KV of layers, as kvloom serves them, or why it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import EngineError
from ..serving.groups import GroupShape

T = TypeVar("T")

_KINDS = {
    "SlidingWindowMLASpec": "its latent cache (MLA) has windows",
    "MambaSpec": "it has recurrent states",
    "UniformTypeKVCacheSpecs": "its layers differ in the size of their heads",
}


@dataclass(frozen=True, slots=True)
class EngineGroups:
    """The KV cache groups of an engine.

    Attributes
    ----------
    shapes : of the groups in kvloom's order, those of full attention first.
    numbers : vLLM's number of each.
    is_latent : whether the cache keeps latents (MLA).
    """

    shapes: tuple[GroupShape, ...]
    numbers: tuple[int, ...]
    is_latent: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether one row of blocks holds all KV of a request."""
        return len(self.shapes) == 1 and self.shapes[0].is_full

    def in_order(self, rows: Sequence[T]) -> list[T]:
        """What vLLM gives for each of its groups, in kvloom's order."""
        return [rows[number] for number in self.numbers]


def groups_of(kv_cache_config: Any) -> EngineGroups:
    """The groups of an engine.

    Raises
    ------
    EngineError : a group is of a kind that kvloom does not store.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [type(spec).__name__ for spec in specs]  # subclasses keep other tokens than what they are derived from
    served = {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
    if not kinds or not set(kinds) <= served:
        others = [kind for kind in dict.fromkeys(kinds) if kind not in served]
        reasons = " and ".join(_KINDS.get(kind, f"it has a cache of kind {kind}") for kind in others)
        raise EngineError(
            f"kvloom cannot serve this engine exactly: its KV cache groups are {', '.join(sorted(set(kinds)))}: "
            f"{reasons or 'it has no KV cache'}, which kvloom does not store; leave the connector out"
        )
    if any(getattr(spec, "tokens_per_state", 1) != 1 for spec in specs):
        raise EngineError(
            "kvloom cannot serve this engine exactly: its cache keeps one state for several tokens; leave the "
            "connector out"
        )
    if "MLAAttentionSpec" in kinds and len(kinds) > 1:
        raise EngineError(
            f"kvloom cannot serve this engine exactly: it has latents (MLA) beside other KV cache groups "
            f"({', '.join(sorted(set(kinds)))}); leave the connector out"
        )
    shapes = [_shape(spec) for spec in specs]
    numbers = sorted(range(len(shapes)), key=lambda number: not shapes[number].is_full)
    is_latent = "MLAAttentionSpec" in kinds
    return EngineGroups(tuple(shapes[number] for number in numbers), tuple(numbers), is_latent)


def _shape(spec: Any) -> GroupShape:
    kind, block_tokens = type(spec).__name__, int(spec.block_size)
    if kind == "SlidingWindowSpec":
        return GroupShape(block_tokens, window_tokens=int(spec.sliding_window) + int(spec.extra_retained_tokens))
    if kind == "ChunkedLocalAttentionSpec":
        return GroupShape(block_tokens, local_tokens=int(spec.attention_chunk_size))
    return GroupShape(block_tokens)
