"""How long the parts of a prompt take: computing it, and loading what is stored of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace


@dataclass(frozen=True, slots=True)
class PrefillCost:
    """Seconds that a piece of a prompt takes to compute.

    Attributes
    ----------
    fixed_s : of every piece, however short.
    token_s : of a token, beside attention.
    pair_s : of a token and one that it attends to, in all layers.
    floor_s : least time of a piece's work, in which the weights are read.
    behind_s : of a token that the piece stands behind, whose KV is read, or copied.
    windows : per layer, how many tokens back attention reaches, itself included; None for all. Empty for no windows.
    """

    fixed_s: float
    token_s: float
    pair_s: float
    floor_s: float = 0.0
    behind_s: float = 0.0
    windows: tuple[int | None, ...] = ()

    def seconds(self, new_tokens: float, behind_tokens: float = 0.0) -> float:
        """Of `new_tokens` behind `behind_tokens` whose KV is there; 0 for none."""
        return self.step_s([(new_tokens, behind_tokens)]) if new_tokens > 0 else 0.0

    def step_s(self, pieces: Sequence[tuple[float, float]]) -> float:
        """Of one step with pieces of several requests, each so many new tokens behind so many; 0 for none."""
        if not pieces:
            return 0.0
        windows = self.windows or (None,)
        new = behind = attended = 0.0
        for count, before in pieces:
            new += count
            behind += before
            for window in windows:
                attended += pairs(count, before, window)
        work_s = max(self.floor_s, self.token_s * new + self.pair_s * attended / len(windows))
        return self.fixed_s + self.behind_s * behind + work_s

    def added_s(self, new_tokens: float, behind_tokens: float) -> float:
        """That a piece adds to a step whose weights are read anyway, as a token of an answer does among others."""
        one = replace(self, fixed_s=0.0, floor_s=0.0)
        return one.seconds(new_tokens, behind_tokens)

    def scattered_s(self, tokens: float, context_tokens: float) -> float:
        """Of tokens spread over a context whose KV is there, each attending to what is before it."""
        if tokens <= 0:
            return 0.0
        pairs_each = min(context_tokens, *(window or context_tokens for window in self.windows or (None,))) / 2
        return self.fixed_s + max(self.floor_s, self.token_s * tokens + self.pair_s * tokens * pairs_each)


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Seconds that chunks of one size take from a tier into the engine's cache, in one thread.

    Attributes
    ----------
    read_s : of a chunk: to find it and read it into the host's memory.
    decode_s : of a chunk.
    copy_s : of a chunk: into the engine's cache.
    overlaps : whether a chunk is copied while the next one is read and decoded.
    shared_s : of a chunk: for how long the tier serves nobody else; 0 if loads from it are not in each other's way.
    start_s : of a load, whatever its size.
    """

    read_s: float
    decode_s: float = 0.0
    copy_s: float = 0.0
    overlaps: bool = False
    shared_s: float = 0.0
    start_s: float = 0.0

    @property
    def chunk_s(self) -> float:
        """Of one chunk among many."""
        host_s = self.read_s + self.decode_s
        return max(host_s, self.copy_s) if self.overlaps else host_s + self.copy_s

    def seconds(self, chunks: float) -> float:
        """Of so many chunks, one after the other; 0 for none."""
        if chunks <= 0:
            return 0.0
        return self.start_s + (chunks - 1) * self.chunk_s + self.read_s + self.decode_s + self.copy_s


@dataclass(frozen=True, slots=True)
class Costs:
    """What a machine takes for one model.

    Attributes
    ----------
    chunk_tokens : of every stored chunk.
    chunk_bytes : of its keys and values as the engine has them.
    loads : by tier.
    call_s : of a request for which something is loaded, beside its loads.
    lanes : loads that run at once in an engine at their full speed; of more, as many as `LOADERS`, each is slower.
    step_tokens : that a step of the engine computes at most, of all its requests.
    most_running : requests that it computes at once.
    kv_tokens : for which it has memory.
    """

    prefill: PrefillCost
    chunk_tokens: int
    chunk_bytes: int
    loads: Mapping[str, LoadCost] = field(default_factory=dict)
    call_s: float = 0.0
    lanes: float = 4.0
    step_tokens: int = 2048
    most_running: int = 256
    kv_tokens: float = math.inf

    def load_s(self, chunks: Mapping[str, int]) -> float:
        """Seconds to load so many chunks of each tier, one tier after the other; 0 for none."""
        spent = sum(self.loads[tier].seconds(count) for tier, count in chunks.items() if count)
        return spent + self.call_s if spent else 0.0


def pairs(new_tokens: float, behind_tokens: float = 0.0, window: int | None = None) -> float:
    """Pairs of a new token and one that it attends to in a layer, itself included."""
    if window is None or new_tokens + behind_tokens <= window:
        return new_tokens * behind_tokens + new_tokens * (new_tokens + 1) / 2
    growing = min(max(window - behind_tokens, 0.0), new_tokens)  # new tokens whose window is not full
    return growing * behind_tokens + growing * (growing + 1) / 2 + (new_tokens - growing) * window
