"""The groups in which vLLM keeps the KV of layers, as kvloom serves them, or why it does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import EngineError
from ..serving.groups import GroupShape

T = TypeVar("T")

_KINDS = {
    "MLAAttentionSpec": "its cache is latent (MLA)",
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
    """

    shapes: tuple[GroupShape, ...]
    numbers: tuple[int, ...]

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
    served = {"FullAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec"}
    if not kinds or not set(kinds) <= served:
        others = [kind for kind in dict.fromkeys(kinds) if kind not in served]
        reasons = " and ".join(_KINDS.get(kind, f"it has a cache of kind {kind}") for kind in others)
        raise EngineError(
            f"kvloom cannot serve this engine exactly: its KV cache groups are {', '.join(sorted(set(kinds)))}: "
            f"{reasons or 'it has no KV cache'}, which kvloom does not store; leave the connector out"
        )
    shapes = [_shape(spec) for spec in specs]
    numbers = sorted(range(len(shapes)), key=lambda number: not shapes[number].is_full)
    return EngineGroups(tuple(shapes[number] for number in numbers), tuple(numbers))


def _shape(spec: Any) -> GroupShape:
    kind, block_tokens = type(spec).__name__, int(spec.block_size)
    if kind == "SlidingWindowSpec":
        return GroupShape(block_tokens, window_tokens=int(spec.sliding_window) + int(spec.extra_retained_tokens))
    if kind == "ChunkedLocalAttentionSpec":
        return GroupShape(block_tokens, local_tokens=int(spec.attention_chunk_size))
    return GroupShape(block_tokens)
