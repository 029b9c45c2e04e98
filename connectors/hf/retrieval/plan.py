"""What the sequences of a session have in common, what is still to be computed of one, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ....core import KVSpec
from ....errors import EngineError
from ....kvstore.store import KVStore
from ....retrieval.selector import LayerShape
from ....retrieval.settings import Retrieval


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the sequences of a session have in common.

    Attributes
    ----------
    shapes : the attention of every layer.
    window_tokens : per layer, how many tokens back the model's own attention reaches; None for all.
    break_even_tokens : shorter contexts are attended to densely.
    current_spec : of the KV that the model would compute now.
    """

    spec: KVSpec
    shapes: Sequence[LayerShape]
    window_tokens: Sequence[int | None]
    retrieval: Retrieval
    break_even_tokens: int
    store: KVStore
    salt: bytes
    device: torch.device
    current_spec: Callable[[], KVSpec]

    def expect_unchanged(self) -> None:
        """Raises `EngineError` if the model would compute other KV by now than the session holds."""
        if self.current_spec() != self.spec:
            raise EngineError(
                "the model or its adapters have changed since this session began; begin another, with its `token_ids`"
            )

    @property
    def retrieving_shapes(self) -> list[LayerShape | None]:
        """None for layers that attend to everything."""
        return [shape if self.retrieves(layer) else None for layer, shape in enumerate(self.shapes)]

    def retrieves(self, layer: int) -> bool:
        return layer >= self.retrieval.dense_layers and self.window_tokens[layer] is None


@dataclass(slots=True)
class Counts:
    """What became of one sequence, in tokens, chunks and steps.

    Attributes
    ----------
    reused_tokens, computed_tokens : of prompts; replayed tokens count as computed.
    lost_chunks : that the store should have had, and had not: their tokens were computed again.
    unstored_chunks : that the store did not take; they stay in memory of the session's own.
    rebuilt_chunks : stored chunks whose part of the index was missing or foreign.
    has_index_state : the index of the sequence as a whole was read, and not built again.
    sparse_steps : tokens decoded with retrieval; dense_steps : without.
    chosen_tokens, read_bytes : by selectors, over all layers and KV heads.
    """

    reused_tokens: int = 0
    computed_tokens: int = 0
    lost_chunks: int = 0
    unstored_chunks: int = 0
    rebuilt_chunks: int = 0
    has_index_state: bool = False
    sparse_steps: int = 0
    dense_steps: int = 0
    chosen_tokens: int = 0
    read_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `[start, stop)` to be computed: densely, or one after the other with retrieval."""

    start: int
    stop: int
    is_sparse: bool
