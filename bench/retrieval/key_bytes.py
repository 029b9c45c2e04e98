"""What ShadowKV's low-rank keys take on a device, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from ...retrieval.factor.key_factor import KeyFactor


@dataclass(frozen=True, slots=True)
class KeyBytes:
    """Bytes of one layer's keys that stay on the device, part by part, from the tensors that hold them.

    Attributes
    ----------
    rows, basis, exact : of the factor; tokens that it keeps exact have all heads and their number.
    index : of landmarks, or whatever chooses; 0 if the factor does.
    pinned : keys of sinks, outliers and window in 16 bits.
    buffer : keys of the tokens chosen last, in 16 bits, if they stay between steps (`ResidentSet`).
    dense : all keys of the context in 16 bits, what the rest is instead of.
    """

    rows: int
    basis: int
    exact: int
    index: int
    pinned: int
    buffer: int
    dense: int

    @property
    def resident(self) -> int:
        return self.rows + self.basis + self.exact + self.index + self.pinned + self.buffer

    @property
    def ratio(self) -> float:
        """How many times smaller."""
        return self.dense / self.resident


def key_bytes(
    factor: KeyFactor, *, pinned_tokens: int = 0, outlier_tokens: int = 0, buffer_tokens: int = 0, index_bytes: int = 0
) -> KeyBytes:
    """The account of a factor that covers all of a context but its pinned ends.

    Parameters
    ----------
    pinned_tokens : of sinks and window, which the factor does not cover.
    outlier_tokens : of outlier runs kept whole, which it does cover; for each KV head.
    buffer_tokens : chosen in a step, for each KV head.
    """
    token = 2 * factor.shape.kv_heads * factor.shape.head_dim
    return KeyBytes(
        rows=factor.rows_bytes,
        basis=factor.basis.nbytes,
        exact=factor.exact_bytes,
        index=index_bytes,
        pinned=(pinned_tokens + outlier_tokens) * token,
        buffer=buffer_tokens * token,
        dense=(len(factor) + pinned_tokens) * token,
    )
