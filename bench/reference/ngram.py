"""An interpolated modified Kneser-Ney n-gram model over token ids: what the reference model's English must beat."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.float64]
_FALLBACK_DISCOUNT = 0.5  # of every count, where a text is too short to estimate one


@dataclass(frozen=True, slots=True, eq=False)
class _Level:
    """Probabilities of one order, without what is interpolated from the order below.

    Attributes
    ----------
    grams : n-grams seen, packed, ascending.
    shares : discounted relative count of each, given its context.
    contexts : contexts seen (the n-grams without their last token), packed, ascending.
    weights : share of each context that goes to the order below.
    """

    grams: Ids
    shares: Floats
    contexts: Ids
    weights: Floats


def _discounts(counts: Ids) -> Floats:
    """What counts 0, 1, 2 and 3 or more lose (Chen & Goodman 1999, eq. 26)."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    if not n[1:5].all():
        return np.array([0.0] + 3 * [_FALLBACK_DISCOUNT])
    unit = n[1] / (n[1] + 2 * n[2])
    estimates = [k - (k + 1) * unit * n[k + 1] / n[k] for k in (1, 2, 3)]
    return np.array([0.0, *(max(0.0, e) for e in estimates)])


def _level(grams: Ids, counts: Ids, vocab_size: int) -> _Level:
    contexts, starts = np.unique(grams // vocab_size, return_index=True)
    sizes = np.diff(np.append(starts, len(grams)))
    totals = np.add.reduceat(counts, starts).astype(np.float64)
    lost = _discounts(counts)[np.minimum(counts, 3)]
    shares = (counts - lost) / np.repeat(totals, sizes)
    return _Level(grams, shares, contexts, np.add.reduceat(lost, starts) / totals)


def _find(wanted: Ids, keys: Ids, values: Floats, missing: float) -> Floats:
    """`values` of the `wanted` among ascending `keys`."""
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], missing)


class NgramModel:
    """Interpolated modified Kneser-Ney (Chen & Goodman 1999, section 3): the strongest of the classical smoothings.

    An n-gram is one integer in base `vocab_size`, so the tables are sorted arrays without collisions. Lower orders
    count the different tokens seen before an n-gram; the lowest is interpolated with the uniform distribution. Given
    any context, the probabilities of all tokens sum to one.

    Parameters
    ----------
    ids : `[T]`, the training text as one stream.
    vocab_size : ids are below it; `vocab_size ** order` must fit 63 bits.
    order : tokens of the longest n-gram, the predicted one included.
    """

    def __init__(self, ids: Ids, *, vocab_size: int, order: int = 5) -> None:
        if order < 1 or vocab_size**order >= 2**63:
            raise ValueError(
                f"order is {order} with {vocab_size} tokens; expected n-grams of 1 token or more and of 63 bits or less"
            )
        if len(ids) < order or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
            raise ValueError(f"ids has {len(ids)} tokens; expected at least {order}, each from 0 to {vocab_size - 1}")
        self.vocab_size = vocab_size
        self.order = order
        self._levels: list[_Level] = []
        grams, counts = np.unique(self._packed(ids, order), return_counts=True)
        self._levels.insert(0, _level(grams, counts, vocab_size))
        for n in range(order - 1, 0, -1):
            grams, counts = np.unique(grams % vocab_size**n, return_counts=True)
            self._levels.insert(0, _level(grams, counts, vocab_size))

    def _packed(self, ids: Ids, n: int) -> Ids:
        """All n-grams of a stream, `[T - n + 1]`."""
        packed = np.zeros(len(ids) - n + 1, dtype=np.int64)
        for i in range(n):
            packed = packed * self.vocab_size + ids[i : len(ids) - n + 1 + i]
        return packed

    def log_probabilities(self, ids: Ids) -> Floats:
        """Natural logarithm of each token's probability, `[T]`, given up to `order - 1` tokens before it."""
        probabilities = np.full(len(ids), 1.0 / self.vocab_size)
        for n, level in enumerate(self._levels[: len(ids)], start=1):
            grams = self._packed(np.asarray(ids, dtype=np.int64), n)
            weights = _find(grams // self.vocab_size, level.contexts, level.weights, 1.0)
            shares = _find(grams, level.grams, level.shares, 0.0)
            probabilities[n - 1 :] = shares + weights * probabilities[n - 1 :]
        logarithms: Floats = np.log(probabilities)
        return logarithms
