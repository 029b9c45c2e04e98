"""The groups in which vLLM keeps the KV of layers, as kvloom serves them, or why it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import EngineError
from ..serving.groups import NULL_BLOCK, GroupShape

T = TypeVar("T")

_KINDS = {
    "SlidingWindowMLASpec": "its latent cache (MLA) has windows",
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
    saves_within_steps : whether layers that keep states give one also from within a step, not from its end alone.
    convolves : whether states are those of short convolutions alone (LFM2).
    """

    shapes: tuple[GroupShape, ...]
    numbers: tuple[int, ...]
    is_latent: bool = False
    saves_within_steps: bool = False
    convolves: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether one row of blocks holds all KV of a request."""
        return len(self.shapes) == 1 and self.shapes[0].is_full

    @property
    def keeps_states(self) -> bool:
        """Whether layers of some group keep states."""
        return any(shape.keeps_state for shape in self.shapes)

    def in_order(self, rows: Sequence[T]) -> list[T]:
        """What vLLM gives for each of its groups, in kvloom's order."""
        return [rows[number] for number in self.numbers]

    def rows_to_save(self, rows: Sequence[T], states: Sequence[tuple[int, int, int]]) -> list[T | list[int]]:
        """The same of a step, to be saved: of a group that keeps states only blocks that vLLM says have one.

        Parameters
        ----------
        states : vLLM's number of the group, block, and tokens behind which its state is.
        """
        found: list[T | list[int]] = []
        for number, shape in zip(self.numbers, self.shapes, strict=True):
            if not shape.keeps_state:
                found.append(rows[number])
                continue
            row: list[int] = []
            for group, block, tokens in states:
                if group == number and tokens and tokens % shape.block_tokens == 0:
                    place = tokens // shape.block_tokens - 1
                    row += [NULL_BLOCK] * (place + 1 - len(row))
                    row[place] = block
            found.append(row)
        return found

    def chunk_tokens(self, wanted: int) -> int:
        """Tokens of a chunk: `wanted`, but a block's where states are.

        Of a prompt vLLM keeps the state behind its last whole block, and others where steps happen to end.
        """
        sizes = [shape.block_tokens for shape in self.shapes if shape.keeps_state]
        return math.lcm(*sizes) if sizes else wanted


def groups_of(kv_cache_config: Any) -> EngineGroups:
    """The groups of an engine.

    Raises
    ------
    EngineError : a group is of a kind that kvloom does not store.
    """
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    kinds = [type(spec).__name__ for spec in specs]  # subclasses keep other tokens than what they are derived from
    served = {"FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec"}
    if not kinds or not set(kinds) <= served:
        others = [kind for kind in dict.fromkeys(kinds) if kind not in served]
        reasons = " and ".join(_KINDS.get(kind, f"it has a cache of kind {kind}") for kind in others)
        raise EngineError(
            f"kvloom cannot serve this engine exactly: its KV cache groups are {', '.join(sorted(set(kinds)))}: "
            f"{reasons or 'it has no KV cache'}, which kvloom does not store; leave the connector out"
        )
    states = [spec for spec in specs if type(spec).__name__ == "MambaSpec"]
    if any(getattr(spec, "tokens_per_state", 1) != 1 for spec in specs if spec not in states):
        raise EngineError(
            "kvloom cannot serve this engine exactly: its cache keeps one state for several tokens; leave the "
            "connector out"
        )
    if "MLAAttentionSpec" in kinds and len(kinds) > 1:
        raise EngineError(
            f"kvloom cannot serve this engine exactly: it has latents (MLA) beside other KV cache groups "
            f"({', '.join(sorted(set(kinds)))}); leave the connector out"
        )
    for spec in states:
        _expect_states_at_borders(spec)
    shapes = [_shape(spec) for spec in specs]
    numbers = sorted(range(len(shapes)), key=lambda number: not shapes[number].is_full)
    is_latent = "MLAAttentionSpec" in kinds
    return EngineGroups(
        tuple(shapes[number] for number in numbers),
        tuple(numbers),
        is_latent,
        any(spec.num_prefill_checkpoint_blocks for spec in states),
        any(spec.mamba_type.name == "SHORT_CONV" for spec in states),
    )


def _expect_states_at_borders(spec: Any) -> None:
    """Raises `EngineError` if the engine does not keep states at the ends of blocks, as they are there."""
    why = None
    if spec.mamba_cache_mode != "align":
        why = "prefix caching is off, so that none is kept but that of a request's last token: --enable-prefix-caching"
    elif spec.num_speculative_blocks:
        why = "it drafts tokens, and their states are there before it is known which of them stay: draft none"
    if why is not None:
        raise EngineError(
            "kvloom cannot serve this engine exactly: it has layers with states (state spaces, linear attention), and "
            f"{why}; or leave the connector out"
        )


def _shape(spec: Any) -> GroupShape:
    kind, block_tokens = type(spec).__name__, int(spec.block_size)
    if kind == "SlidingWindowSpec":
        return GroupShape(block_tokens, window_tokens=int(spec.sliding_window) + int(spec.extra_retained_tokens))
    if kind == "MambaSpec":
        return GroupShape(block_tokens, keeps_state=True)
    if kind == "ChunkedLocalAttentionSpec":
        return GroupShape(block_tokens, local_tokens=int(spec.attention_chunk_size))
    return GroupShape(block_tokens)
