"""What is loaded and saved of the groups of an engine that has several, or windows. Imports no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..groups import GroupShape
from ..keys import PrefixKeys
from ..messages import Load, LookUp


def look_up_pieces(
    request_id: str, keys: PrefixKeys, first: int, last: int, groups: int, number: int, replaces: int
) -> LookUp:
    """Ask for the pieces of chunks `[first, last)`, in so many groups."""
    further = tuple(keys.between(first, last, group) for group in range(1, groups))
    return LookUp(request_id, keys.between(first, last), number, replaces, first=first, further=further)


def load_pieces(
    request_id: str,
    keys: PrefixKeys,
    start: int,
    stop: int,
    shapes: Sequence[GroupShape],
    rows: Sequence[Sequence[int]],
    chunk_tokens: int,
    lookup: int,
) -> Load:
    """Provide tokens `[start, stop)`: of each group, what the engine keeps of them."""
    main, *further = (
        _load(request_id, keys, start, stop, shape, row, chunk_tokens, group)
        for group, (shape, row) in enumerate(zip(shapes, rows, strict=True))
    )
    return replace(main, lookup=lookup, further=tuple(further))


def _load(
    request_id: str,
    keys: PrefixKeys,
    start: int,
    stop: int,
    shape: GroupShape,
    row: Sequence[int],
    chunk_tokens: int,
    group: int,
) -> Load:
    begin = min(max(start, shape.first_kept(stop)), stop)
    first, last = begin // chunk_tokens, -(-stop // chunk_tokens) if begin < stop else begin // chunk_tokens
    # Every block that the engine keeps is filled whole: it files them under the hashes of their tokens. One that it
    # keeps although no token attends to it, or lacks although one does, is not understood: such a load has no keys.
    size = shape.block_tokens
    is_as_expected = shape.has_all(row, begin, stop) and not any(row[-(-start // size) : begin // size])
    if not is_as_expected:
        last = first
    row_keys, written = keys.between(first, last, group), tuple(row)
    return Load(request_id, row_keys, first * chunk_tokens, begin, stop, written, skipped=begin - start)
