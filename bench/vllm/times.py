"""Time to first token and decode speed in vLLM, by every way of having the KV of a prompt.

Every answer is checked to have been served as its row says; one that was not ends the benchmark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.progress import Progress

from ...evaluation.report import Metric
from ..harness.page_cache import drop_page_cache
from ..harness.rounds import interleave
from .bed import CHUNK_TOKENS, COPIES, KVLOOM_DISK, KVLOOM_HOST, KVLOOM_SERVICE, LMCACHE, NATIVE, PLAIN, Bed
from .engine import Engine, VLLMError
from .inputs import Prompts, joined
from .server import Served

FULL = "vLLM, nothing cached"
WARM = "vLLM, its own prefix cache warm"
OFFLOADED = "vLLM, its own CPU offloading"
COPIED = "vLLM, its own offloading, plain copies (stand-in)"
PEER = "LMCache, prefix in its server's memory"
COLD = "kvloom, nothing stored, everything saved"
HOST = "kvloom, prefix from the host tier"
DISK = "kvloom, prefix from disk, past the page cache"
SERVICE = "kvloom, prefix from a service's memory"
FUSED = "kvloom, fusion at 15 %, chunks reordered"
EXACT = "kvloom, fusion at 100 %, chunks reordered"

DECODE = "vLLM"
OTHER = "vLLM, its own offloading, plain copies (stand-in)"
IDLE = "kvloom, neither loading nor saving"
SAVING = "kvloom, default settings: saves what it computes"

FUSION_RATIO = 0.15
NOTHING = {"load": False, "save": False}
QUESTION_TOKENS = 24
_GAPS = 16  # tokens of no document, a BOS for instance, are computed whatever is chosen
_FILL_TRIES, _FILL_PAUSE_S = 10, 0.5

Way = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of every way, round by round; the same place is the same round.

    Attributes
    ----------
    what : what took the time.
    model : its title.
    tokens : of a prompt, or generated at once.
    baseline : the way that others are compared with.
    """

    what: str
    model: str
    tokens: int
    baseline: str
    seconds: Mapping[str, Sequence[float]]

    def time(self, way: str) -> Metric:
        return Metric.of_samples(self.seconds[way], unit="s")

    def ratio(self, way: str, over: str) -> Metric:
        """Time of a way over that of another: the median of the ratios within each round."""
        pairs = zip(self.seconds[way], self.seconds[over], strict=True)
        return Metric.of_samples([own / other for own, other in pairs], unit="times", baseline=over)

    def speedup(self, way: str) -> Metric:
        """Time of the baseline over that of a way, in the same manner."""
        return replace(self.ratio(self.baseline, way), baseline=self.baseline)

    def rows(self) -> list[dict[str, object]]:
        """One plain row for each way."""
        found: list[dict[str, object]] = []
        for way in self.seconds:
            spent, speedup = self.time(way), self.speedup(way)
            row: dict[str, object] = {"what": self.what, "model": self.model, "tokens": self.tokens, "way": way}
            row |= {"s": spent.value, "s_p10": spent.low, "s_p90": spent.high, "rounds": len(self.seconds[way])}
            row |= {"speedup": speedup.value, "speedup_p10": speedup.low, "speedup_p90": speedup.high}
            found.append(row)
        return found


class FirstTokens:
    """Times to the first token of one model: the time that a request for one token takes.

    The same prompt for all that serve prefixes; chunks of it, stored each alone, in ever other orders for fusion; and
    prompts never seen for what finds nothing.

    Parameters
    ----------
    bed : engines of the model.
    prompts : for its vocabulary.
    documents, document_tokens : of a prompt.
    """

    def __init__(self, bed: Bed, prompts: Prompts, documents: int, document_tokens: int) -> None:
        self._bed, self._prompts = bed, prompts
        self._documents = prompts.documents(documents, document_tokens)
        self._question = prompts.ids(QUESTION_TOKENS)
        self.prompt, _ = joined(prompts.lead_ids, self._documents, self._question)
        # Whole chunks, and of the last of them what is left of whole blocks: what every cache can give back.
        self._found = len(self.prompt) // CHUNK_TOKENS * CHUNK_TOKENS

    def prepare(self, left_out: Collection[str]) -> dict[str, str]:
        """Start engines, but for ways that are left out, and fill their caches; by way, why it cannot be measured."""
        bed, missing = self._bed, dict[str, str]()
        bed[PLAIN].generate([self.prompt])
        kvloom = bed[KVLOOM_HOST]
        alone = [joined(self._prompts.lead_ids, [document], []) for document in self._documents]
        kvloom.generate([prompt for prompt, _ in alone], [{"documents": spans} for _, spans in alone])
        kvloom.generate([self.prompt])
        kvloom.settle()
        bed[KVLOOM_DISK].generate([self.prompt], {"save": False})
        if SERVICE not in left_out:
            bed[KVLOOM_SERVICE].generate([self.prompt])
            bed[KVLOOM_SERVICE].settle()
        self._fill(bed[COPIES])
        for way, name in ((OFFLOADED, NATIVE), (PEER, LMCACHE)):
            if way in left_out:
                continue
            try:
                self._fill(bed[name])
            except VLLMError as exc:
                missing[way] = str(exc)
        return missing

    def _fill(self, engine: Engine) -> None:
        """Wait until the prompt is found: the connector does not say when it has stored it."""
        for _ in range(_FILL_TRIES):
            engine.reset()
            (found,) = engine.generate([self.prompt]).cached_tokens
            if found >= self._found:
                return
            time.sleep(_FILL_PAUSE_S)
        raise VLLMError(f"{engine.name}: of {len(self.prompt)} tokens only {found} are found again")

    def ways(self) -> dict[str, Way]:
        """All of them; those that were left out or cannot be measured are not to be called."""
        return {
            FULL: lambda: self._ask(FULL, PLAIN, cached=0),
            WARM: self._warm,
            OFFLOADED: lambda: self._ask(OFFLOADED, NATIVE, cached=self._found),
            COPIED: lambda: self._ask(COPIED, COPIES, cached=self._found),
            PEER: lambda: self._ask(PEER, LMCACHE, cached=self._found),
            COLD: self._cold,
            HOST: lambda: self._ask(HOST, KVLOOM_HOST, cached=self._found, tier="host"),
            DISK: self._disk,
            SERVICE: lambda: self._ask(SERVICE, KVLOOM_SERVICE, cached=self._found, tier="remote"),
            FUSED: lambda: self._fuse(FUSED, FUSION_RATIO),
            EXACT: lambda: self._fuse(EXACT, 1.0),
        }

    def _ask(self, way: str, name: str, *, cached: int, tier: str | None = None) -> float:
        engine = self._bed[name]
        engine.reset()
        served = engine.generate([self.prompt])
        _expect_cached(way, served, cached)
        if tier is not None:
            expect_loaded(way, served, [{tier: self._found}])
        return served.seconds

    def _warm(self) -> float:
        engine = self._bed[PLAIN]
        engine.generate([self.prompt])
        served = engine.generate([self.prompt])
        _expect_cached(WARM, served, self._found)
        return served.seconds

    def _cold(self) -> float:
        engine = self._bed[KVLOOM_HOST]
        engine.reset()
        served = engine.generate([[*self._prompts.lead_ids, *self._prompts.ids(len(self.prompt))]])
        engine.settle()
        _expect_cached(COLD, served, 0)
        expect_loaded(COLD, served, [{}])
        return served.seconds

    def _disk(self) -> float:
        drop_page_cache(self._bed.store)
        return self._ask(DISK, KVLOOM_DISK, cached=self._found, tier="disk")

    def _fuse(self, way: str, ratio: float) -> float:
        engine = self._bed[KVLOOM_HOST]
        prompt, spans = joined(self._prompts.lead_ids, self._prompts.shuffled(self._documents), self._question)
        engine.reset()
        served = engine.generate([prompt], {"documents": spans, "ratio": ratio, "save": False})
        usage = served.usage[0] or {}
        loaded, computed = sum(usage["loaded_tokens"].values()), usage["computed_tokens"]
        if ratio == 1.0:
            # Of the same prefix, but not of the same context, is the first document alone.
            is_served = not computed and loaded <= len(self._documents[0])
        else:
            # The first document stands where it stood when it was computed: kvloom chooses among the others.
            chosen = ratio * (len(spans) - 1) * len(self._documents[0])
            is_served = loaded > 0.9 * self._found and 0.9 * chosen < computed < 1.1 * chosen + _GAPS
        if not is_served or usage["failed"] or set(usage["loaded_tokens"]) - {"host"}:
            raise VLLMError(f"{way}: a prompt of {len(prompt)} tokens was served otherwise: {usage}")
        return served.seconds


def decode_ways(bed: Bed, prompts: Prompts, *, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Way]:
    """Seconds in which every one of `batch` requests gets `new_tokens` after its first; short prompts, never seen."""

    def decode(way: str, name: str, options: Mapping[str, object] | None, *, saves: bool | None) -> float:
        engine = bed[name]
        engine.reset()
        served = engine.generate([prompts.ids(prompt_tokens) for _ in range(batch)], options, new_tokens=new_tokens + 1)
        if saves is not None:
            engine.settle()
            expect_loaded(way, served, [{}] * batch)
            if any(bool((usage or {})["saved_chunks"]) is not saves for usage in served.usage):
                raise VLLMError(f"{way}: chunks saved are {[(usage or {})['saved_chunks'] for usage in served.usage]}")
        return served.decode_s

    return {
        DECODE: lambda: decode(DECODE, PLAIN, None, saves=None),
        OTHER: lambda: decode(OTHER, COPIES, None, saves=None),
        IDLE: lambda: decode(IDLE, KVLOOM_HOST, NOTHING, saves=False),
        SAVING: lambda: decode(SAVING, KVLOOM_HOST, None, saves=True),
    }


def time_first_tokens(
    bed: Bed,
    prompts: Prompts,
    *,
    documents: int,
    document_tokens: int,
    rounds: int,
    left_out: Collection[str],
    bar: Progress,
) -> tuple[Timed, dict[str, str]]:
    """Every way that is not left out and can be measured, in turn; and of those that cannot, why not."""
    first = FirstTokens(bed, prompts, documents, document_tokens)
    missing = first.prepare(left_out)
    ways = {name: way for name, way in first.ways().items() if name not in missing and name not in left_out}
    seconds = interleave(ways, rounds, bar, f"time to first token, {bed.title}")
    return Timed("time to first token", bed.title, len(first.prompt), FULL, seconds), missing


def time_decoding(bed: Bed, prompts: Prompts, *, batch: int, new_tokens: int, rounds: int, bar: Progress) -> Timed:
    """The ways of decoding in turn. A row for another backend of attention is one more way here."""
    ways = decode_ways(bed, prompts, batch=batch, prompt_tokens=CHUNK_TOKENS - new_tokens // 2, new_tokens=new_tokens)
    return Timed(
        "decoding", bed.title, batch * new_tokens, DECODE, interleave(ways, rounds, bar, f"decode, {bed.title}")
    )


def _expect_cached(way: str, served: Served, tokens: int) -> None:
    """All of it came from a cache, or none."""
    (found,) = served.cached_tokens
    if (found > 0) if tokens == 0 else (found < tokens):
        raise VLLMError(f"{way}: {found} tokens came from a cache; expected {tokens or 'none'}")


def expect_loaded(way: str, served: Served, wanted: Sequence[Mapping[str, int]]) -> None:
    """For every request kvloom loaded just this, by tier.

    Raises
    ------
    VLLMError : it did not.
    """
    found = [None if usage is None else usage["loaded_tokens"] for usage in served.usage]
    if found != list(wanted) or any(usage is None or usage["failed"] for usage in served.usage):
        raise VLLMError(f"{way}: kvloom loaded {found}; expected {list(wanted)}")
