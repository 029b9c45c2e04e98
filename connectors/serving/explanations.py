"""Why a request was loaded, shortened or computed, in a line for people. Imports no engine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

WHY: Mapping[str, str] = MappingProxyType(
    {
        "nothing stored": "nothing of it was stored",
        "never stored": "its first chunk was never stored, or so long ago that it is forgotten",
        "other model": "the folder held chunks of other models only",
        "evicted": "its first chunk was evicted to make room",
        "expired": "its first chunk was stored for a time that was over",
        "removed": "its first chunk was deleted or damaged, or did not fit",
        "unavailable": "the tier of its first chunk did not answer",
        "loads": "that was expected to be fastest",
        "untried": "too little was known yet of what loading and computing cost here",
        "shortened": "the rest was expected to take longer to load than to compute",
        "too short to pay": "what a load costs whatever its size is more than computing so few tokens",
        "slow tier": "the tier gives bytes more slowly than the engine computes their tokens",
        "load queue": "too many loads waited before it",
        "trial": "what is thought slower was not observed for long, and is tried",
        "computes while waiting": "its load had not begun when computing became faster, or took longer than expected",
        "always": "the settings say so",
        "fuses": "to load and fuse its documents was expected to be fastest",
        "ratio raised": "leading documents were computed in full while the others were loaded",
        "fusion does not pay": "to load and fuse its documents was expected to take no less than to compute everything",
    }
)
"""What each word of `Reason` means."""


def explanation(record: Mapping[str, Any]) -> str:
    """In one line: what was loaded and computed of a request, why, and what was expected.

    Parameters
    ----------
    record : a line of the journal: `request`, `at_s`, and what the request's output says.
    """
    prompt, loaded = int(record.get("prompt_tokens", 0)), tokens_of(record.get("loaded_tokens"))
    found, decision = tokens_of(record.get("found_tokens")), record.get("decision")
    done = f"{loaded:,} of {prompt:,} prompt tokens were loaded{_from(record.get('loaded_tokens'))}"
    if loaded and record.get("load_s"):
        done += f" in {_seconds(record['load_s'])}"
    if not loaded:
        done = f"all {prompt:,} prompt tokens were computed"
        if found:
            done += f", though {found:,} were stored{_from(record.get('found_tokens'))}"
    parts = [f"{record['request']}, {when(record)}: {done}"]
    is_fused = record.get("fused") in ("yes", "partly")
    if isinstance(decision, str):
        parts.append(f"{decision}: {WHY.get(decision, 'an unknown reason')}")
    if is_fused:
        parts.append(f"its documents were fused, and {int(record.get('computed_tokens', 0)):,} tokens of them computed")
    elif not isinstance(decision, str):
        parts.append("nothing was to be decided: it was not to load, or is shorter than a chunk")
    load_s, compute_s = record.get("expected_load_s"), record.get("expected_compute_s")
    if load_s is not None and compute_s is not None:
        parts.append(f"expected to the first token: {_seconds(load_s)} with a load, {_seconds(compute_s)} without")
    elif compute_s is not None:
        parts.append(f"expected to the first token without a load: {_seconds(compute_s)}")
    if record.get("failed"):
        parts.append("a chunk was lost on the way, and computed")
    return "; ".join(parts)


def when(record: Mapping[str, Any]) -> str:
    """When the request was over, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(record.get("at_s", 0.0))))


def tokens_of(by_tier: object) -> int:
    """Tokens of all tiers together."""
    return sum(map(int, by_tier.values())) if isinstance(by_tier, Mapping) else 0


def _from(by_tier: object) -> str:
    if not isinstance(by_tier, Mapping) or not by_tier:
        return ""
    if len(by_tier) == 1:
        return f" ({next(iter(by_tier))})"
    return f" ({', '.join(f'{tier} {count:,}' for tier, count in by_tier.items())})"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1.0 else f"{seconds:,.3g} s"
