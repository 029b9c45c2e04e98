"""Which KV heads each rank stores, in engines of different tensor-parallel sizes. Imports no engine.

An engine of `size` ranks cuts the KV heads of a model into `size` runs of neighbours. With more ranks than heads, ranks
`head * size / heads` and following hold copies of one head. vLLM and SGLang agree in both. Every rank stores its heads
under keys of its own, so that engines of different sizes never meet each other's chunks. A rank that wants what another
size has stored looks for the chunks that together hold its heads, and cuts and joins them by head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

from ...core import KVSpec


@dataclass(frozen=True, slots=True)
class HeadPart:
    """Heads `[start, stop)` of the chunks that one rank of another size stores under `spec`."""

    spec: KVSpec
    start: int
    stop: int


HeadSplit: TypeAlias = "tuple[HeadPart, ...]"
"""What a rank needs of another size: parts that are together its own heads, in order."""


def heads_of(rank: int, size: int, heads: int) -> tuple[int, int]:
    """The KV heads `[first, last)` of a rank, of all `heads` of the model.

    Raises
    ------
    ValueError : so many ranks cannot divide the heads evenly, nor hold equal numbers of copies of each; or the number
        of heads is below 1.
    """
    if heads < 1:
        raise ValueError(f"the model has {heads} KV heads, as far as is known; expected at least 1")
    if heads % size == 0:
        each = heads // size
        return rank * each, (rank + 1) * each
    if size % heads == 0:
        head = rank // (size // heads)
        return head, head + 1
    raise ValueError(f"{size} ranks cannot divide {heads} KV heads evenly")


def split_for(spec: KVSpec, heads: int, size: int) -> HeadSplit:
    """Where the heads of a rank lie in the chunks of an engine of another size.

    Parameters
    ----------
    spec : of the rank.
    heads : KV heads of the whole model.
    size : tensor-parallel size of the other engine.

    Raises
    ------
    ValueError : one of both sizes does not divide the heads evenly, or the rank does not hold the heads that
        `heads_of` expects.
    """
    first, last = heads_of(*spec.shard, heads)
    if spec.num_kv_heads != last - first:
        rank, own = spec.shard
        raise ValueError(
            f"rank {rank} of {own} holds {spec.num_kv_heads} KV heads; expected {last - first} of the model's {heads}"
        )
    each = max(heads // size, 1)
    copies = max(size // heads, 1)
    parts = []
    for number in range(first // each, (last - 1) // each + 1):
        rank = number * copies  # of ranks with the same head, the first
        begin, end = heads_of(rank, size, heads)
        theirs = replace(spec, num_kv_heads=each, shard=(rank, size))
        parts.append(HeadPart(theirs, max(first, begin) - begin, min(last, end) - begin))
    return tuple(parts)
