"""Requests of a schedule, and what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

from ...connectors.serving.controller.decisions import Reason

Policy: TypeAlias = Literal["always", "never", "controller"]
POLICIES: tuple[Policy, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True)
class Job:
    """A request.

    Attributes
    ----------
    tokens : of its prompt.
    stored : leading chunks of it in each tier, the first ones' tier first.
    recompute_ratio : share of the loaded tokens that is computed all the same, by a fusion.
    output_tokens : that it generates, at least 1.
    """

    arrival_s: float
    tokens: int
    stored: Mapping[str, int] = field(default_factory=dict)
    recompute_ratio: float = 0.0
    output_tokens: int = 1

    def leading(self, chunks: int) -> dict[str, int]:
        """So many leading chunks, by tier."""
        found = {}
        for tier, count in self.stored.items():
            if taken := min(chunks, count):
                found[tier] = taken
            chunks -= taken
        return found


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request.

    Attributes
    ----------
    engine : number of the one that took it.
    chunks : that were loaded.
    reason : the controller's, "always" or "nothing stored".
    loaded_s : when they were there; the arrival if none were loaded.
    first_token_s : when its prompt was computed.
    computed_s : what computing its prompt takes alone.
    done_s : when its last token was there.
    """

    job: Job
    engine: int
    chunks: int
    reason: Reason
    loaded_s: float
    first_token_s: float
    computed_s: float
    done_s: float

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.job.arrival_s
