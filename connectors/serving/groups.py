"""Which tokens of a request an engine keeps in each group of its layers. Imports no engine.

An engine whose layers attend to different spans (all tokens, a sliding window, the part since a multiple of some
length) keeps their KV in groups, each with a row of blocks of its own. Blocks that no later token attends to are taken
back, and a null block stands in the row in their place.

Layers that keep a state (state spaces, linear attention, short convolutions) have groups, too. A block of theirs holds
the state behind its last token, if a step ended there, and counts as that token: nothing else of the block is there.

A chunk of such an engine is stored in pieces, one for each group: of the chunk's tokens those that the group still has
in the step that completes the chunk. Together with the pieces before it, as far as they are attended to, it is all that
a request needs to go on behind the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NULL_BLOCK = 0
"""Stands in a row of blocks where the engine has none (any more)."""


@dataclass(frozen=True, slots=True)
class GroupShape:
    """What the layers of a group attend to; everything before it where neither span is given.

    Attributes
    ----------
    block_tokens : of the group's blocks.
    window_tokens : a token attends to so many, itself included.
    local_tokens : a token attends to those since the last multiple of this.
    keeps_state : the layers keep a state instead of what single tokens bring.
    """

    block_tokens: int
    window_tokens: int | None = None
    local_tokens: int | None = None
    keeps_state: bool = False

    @property
    def is_full(self) -> bool:
        """Whether every token attends to all before it."""
        return self.window_tokens is None and self.local_tokens is None and not self.keeps_state

    def first_kept(self, stop: int) -> int:
        """The first token that the engine keeps of a request which goes on at token `stop`: it keeps whole blocks."""
        if self.keeps_state:
            return max(stop - 1, 0)
        first = 0
        if self.window_tokens is not None:
            first = max(stop - self.window_tokens + 1, 0)
        if self.local_tokens is not None:
            first = stop - stop % self.local_tokens
        return first - first % self.block_tokens

    def piece(self, chunk: int, chunk_tokens: int) -> tuple[int, int]:
        """Tokens `[start, stop)` of a chunk that are stored.

        Of the last chunk of a prompt the engine computes the last token once more, which attends to one token more
        than the next one.
        """
        stop = (chunk + 1) * chunk_tokens
        if self.keeps_state:
            return stop - 1, stop
        return max(stop - chunk_tokens, self.first_kept(stop - 1)), stop

    def first_chunk(self, chunk: int, chunk_tokens: int) -> int:
        """The first chunk of which a request needs the piece to go on behind `chunk`, or at its last token.

        With a state it can go on behind the chunk alone.
        """
        if self.keeps_state:
            return chunk
        return self.first_kept((chunk + 1) * chunk_tokens - 1) // chunk_tokens

    def has_all(self, blocks: Sequence[int], start: int, stop: int) -> bool:
        """Whether a row has blocks for tokens `[start, stop)`."""
        last = -(-stop // self.block_tokens)
        return len(blocks) >= last and NULL_BLOCK not in blocks[start // self.block_tokens : last]
