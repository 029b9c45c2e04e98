"""In which order retrieved passages stand in a context: the one that reuses most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

_MOST_LOOKUPS = 2000


def order_for_reuse(
    items: Sequence[T], is_stored: Callable[[Sequence[T]], bool], tokens_of: Callable[[T], int]
) -> tuple[list[T], int]:
    """The items, begun with the longest run whose KV in exactly that context is stored; the others keep their order.

    KV in context is exact: nothing is approximated by putting such a run first, and it costs no computing.
    An order of the same passages that was answered before is found whatever order retrieval gives now.

    Parameters
    ----------
    items : in order of relevance.
    is_stored : whether the store has the last item's KV behind all others of this beginning.
    tokens_of : tokens of an item.

    Returns
    -------
    tuple : the new order, and how many items of it form the stored run.
    """
    best: list[int] = []
    best_tokens = 0
    lookups = 0
    waiting: list[list[int]] = [[]]
    while waiting and lookups < _MOST_LOOKUPS:
        run = waiting.pop()
        tokens = sum(tokens_of(items[i]) for i in run)
        if tokens > best_tokens:
            best, best_tokens = run, tokens
        for i in reversed(range(len(items))):
            if i not in run:
                lookups += 1
                if is_stored([items[j] for j in (*run, i)]):
                    waiting.append([*run, i])
    rest = [i for i in range(len(items)) if i not in best]
    return [items[i] for i in (*best, *rest)], len(best)
