"""Contract tests: subclass one, say how your implementation is made, and pytest runs what every other one passed.

    class TestMyTier(TierContract):
        def make_tier(self, capacity_bytes):
            return MyTier(capacity_bytes)

Importing this package needs pytest.
"""

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{part}" for part in ("codec", "policy", "selector", "tier")))

from .chunks import ROPE, SPEC, make_blob, make_chunk, make_key, same_bits, same_blob, same_chunk  # noqa: E402
from .codec import CodecContract  # noqa: E402
from .policy import PolicyContract  # noqa: E402
from .selector import SHAPE, SelectorContract, chosen_mask, make_context, recovered_mass  # noqa: E402
from .tier import TierContract, keys_of  # noqa: E402

__all__ = [
    "ROPE",
    "SHAPE",
    "SPEC",
    "CodecContract",
    "PolicyContract",
    "SelectorContract",
    "TierContract",
    "chosen_mask",
    "keys_of",
    "make_blob",
    "make_chunk",
    "make_context",
    "make_key",
    "recovered_mass",
    "same_bits",
    "same_blob",
    "same_chunk",
]
