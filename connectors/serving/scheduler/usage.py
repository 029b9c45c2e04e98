"""What kvloom did for a request, as its output reports it. Imports no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..controller.decisions import Decision
from ..messages import Loaded, both
from .prefill_rate import PrefillRate


@dataclass(slots=True)
class Usage:
    """All loads and fusions of one request so far.

    `seconds_saved`: the time that computing the provided tokens would have taken, less the time from the beginning of a
    load or fusion to its end. For stored tokens, computing takes what it took when they were computed, if their chunks
    say so. For other tokens, and for those between fused documents, it is their number times the engine's seconds a
    token (`PrefillRate`). Below 0 if computing would have been faster; None if the engine has computed
    no prompt yet. `decision`: the last one about what is loaded; None if there was nothing to decide. `found`: tokens
    of the stored chunks that it was about, by tier.
    """

    loaded: Loaded | None = None
    seconds_saved: float | None = 0.0
    decision: Decision | None = None
    found: Mapping[str, int] = field(default_factory=dict)

    def add(self, loaded: Loaded, saved_s: float | None) -> None:
        """Add a load or fusion that is over and saved so many seconds, None if that is not known."""
        if saved_s is None or self.seconds_saved is None:
            self.seconds_saved = None
        else:
            self.seconds_saved += saved_s
        loaded = replace(loaded, chosen=None, failed=loaded.failed and not loaded.given_back)
        self.loaded = loaded if self.loaded is None else both(self.loaded, loaded)

    def expect(self, tokens: Mapping[str, int]) -> None:
        """Count a load, by tier, that is reported after the request is over; what it took is not known."""
        self.loaded, self.seconds_saved = Loaded(tokens, False, 0.0), None

    def as_json(self, prompt_tokens: int, *, fused: str, saved_chunks: int) -> dict[str, object]:
        """The report, with the names of `settings.USAGE_KEYS`."""
        loaded = self.loaded or Loaded({}, False, 0.0)
        return {
            "prompt_tokens": prompt_tokens,
            "found_tokens": dict(self.found),
            "loaded_tokens": dict(loaded.tokens),
            "computed_tokens": loaded.computed_tokens,
            "load_s": round(loaded.spent_s, 6),
            "seconds_saved": _rounded(self.seconds_saved),
            "failed": loaded.failed,
            "fused": fused,
            "saved_chunks": saved_chunks,
            "decision": None if self.decision is None else self.decision.reason,
            "expected_load_s": None if self.decision is None else _rounded(self.decision.load_s),
            "expected_compute_s": None if self.decision is None else _rounded(self.decision.compute_s),
        }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def seconds_saved(loaded: Loaded, rate: PrefillRate) -> float | None:
    """Seconds that one load or fusion saved, see `Usage`."""
    token_s = rate.token_s() if loaded.unpriced_tokens else 0.0
    return None if token_s is None else loaded.recompute_s + loaded.unpriced_tokens * token_s - loaded.spent_s
