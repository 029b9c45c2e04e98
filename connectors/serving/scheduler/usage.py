"""What kvloom did for a request, as it is told with its output. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..messages import Loaded, both
from .prefill_rate import PrefillRate


@dataclass(slots=True)
class Usage:
    """Of one request: its loads and fusions so far, together.

    `seconds_saved`: what computing the tokens that kvloom provided would have taken, less the time that providing
    them took, from the beginning of a load or fusion to its end. What computing would have taken is for stored
    tokens what their chunks say that it took when they were computed; for others, and for the tokens between fused
    documents, it is their number times the engine's seconds a token (`PrefillRate`). Below 0 if computing would have
    been faster; null if the engine has not computed a prompt yet by which to judge.
    """

    loaded: Loaded | None = None
    seconds_saved: float | None = 0.0

    def add(self, loaded: Loaded, saved_s: float | None) -> None:
        """A load or fusion is over; it saved so many seconds, None if that is not known."""
        if saved_s is None or self.seconds_saved is None:
            self.seconds_saved = None
        else:
            self.seconds_saved += saved_s
        loaded = replace(loaded, chosen=None)
        self.loaded = loaded if self.loaded is None else both(self.loaded, loaded)

    def expect(self, tokens: Mapping[str, int]) -> None:
        """All of a load will have come, by tier; what it took is told too late."""
        self.loaded, self.seconds_saved = Loaded(tokens, False, 0.0), None

    def told(self, prompt_tokens: int, *, fused: str, saved_chunks: int) -> dict[str, object]:
        """As JSON."""
        loaded = self.loaded or Loaded({}, False, 0.0)
        return {
            "prompt_tokens": prompt_tokens,
            "loaded_tokens": dict(loaded.tokens),
            "computed_tokens": loaded.computed_tokens,
            "load_s": round(loaded.spent_s, 6),
            "seconds_saved": None if self.seconds_saved is None else round(self.seconds_saved, 6),
            "failed": loaded.failed,
            "fused": fused,
            "saved_chunks": saved_chunks,
        }


def seconds_saved(loaded: Loaded, pace: PrefillRate) -> float | None:
    """By one load or fusion, see `Usage`."""
    token_s = pace.token_s() if loaded.unpriced_tokens else 0.0
    return None if token_s is None else loaded.recompute_s + loaded.unpriced_tokens * token_s - loaded.spent_s
