"""Compares answers in vLLM with and without kvloom: equal tokens where it is exact, exact match where it fuses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...evaluation.intervals import Floats, paired_bootstrap, share_of_gap
from ...evaluation.report import Metric
from .bed import CHUNK_TOKENS, KVLOOM_DISK, KVLOOM_HOST, KVLOOM_MEMORY, PLAIN, Bed
from .engine import Engine, VLLMError
from .inputs import ReferenceInputs, TokenCase, joined
from .server import Served
from .times import FUSION_RATIO, expect_loaded

BATCH = 8
NEW_TOKENS = 16
SAME_AS = ("nothing stored", "from the host tier", "from disk, by an engine started afterwards")
FULL, NAIVE, FUSED = "vLLM, everything computed", "kvloom, naive reuse", "kvloom, fusion at 15 %"


@dataclass(frozen=True, slots=True)
class Identity:
    """Whether greedy tokens with the connector were those of plain vLLM, prompt by prompt, by where KV came from."""

    same: dict[str, list[bool]]
    loaded: int  # prompts with something to load

    def metric(self) -> Metric:
        """Share of the prompts whose tokens were the same every time."""
        every = [all(of_prompt) for of_prompt in zip(*self.same.values(), strict=True)]
        return Metric.of_share(sum(every), len(every), baseline=1.0)

    def rows(self) -> list[dict[str, object]]:
        return [
            {"what": "identical tokens", "way": way, "prompts": len(same), "loaded": self.loaded, "same": sum(same)}
            for way, same in self.same.items()
        ]


def compare_tokens(bed: Bed, texts: Sequence[Sequence[int]], advance: Callable[[], object]) -> Identity:
    """Texts of mixed lengths in batches: plain, then with the connector cold, from its host tier, and from its disk.

    The engine that has them on disk only is started when the others are done.

    Raises
    ------
    VLLMError : something was not loaded from where it should have been.
    """
    whole = [len(text) // CHUNK_TOKENS * CHUNK_TOKENS for text in texts]
    plain = _in_batches(bed[PLAIN], texts, None, advance)
    same = {}
    for way, name, tier in zip(SAME_AS, (KVLOOM_HOST, KVLOOM_HOST, KVLOOM_DISK), (None, "host", "disk"), strict=True):
        served = _in_batches(
            bed[name], texts, tier, advance, [{tier: tokens} if tier and tokens else {} for tokens in whole]
        )
        same[way] = [a == b for a, b in zip(served, plain, strict=True)]
    return Identity(same, sum(map(bool, whole)))


def _in_batches(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    tier: str | None,
    advance: Callable[[], object],
    wanted: Sequence[dict[str, int]] | None = None,
) -> list[tuple[int, ...]]:
    engine.reset()
    found: list[tuple[int, ...]] = []
    for start in range(0, len(texts), BATCH):
        here = slice(start, start + BATCH)
        served = engine.generate(texts[here], new_tokens=NEW_TOKENS)
        if wanted is not None:
            expect_loaded(f"{engine.name}, {tier or 'nothing stored'}", served, wanted[here])
        found += served.tokens
        advance()
    if wanted is not None:
        engine.settle()
    return found


@dataclass(frozen=True, slots=True)
class FusedAnswers:
    """Who answered which case, in the cases' order."""

    right: dict[str, list[bool]]

    def gap_closed(self) -> Metric:
        """As in `kvloom bench blend`: share of the exact-match gap between naive reuse and full prefill."""
        samples = [[float(right) for right in self.right[way]] for way in (NAIVE, FULL, FUSED)]
        value, low, high = paired_bootstrap(*samples, statistic=_gap)
        return Metric(value, low, high, "share", "everything computed is 1, naive reuse is 0")

    def exact_match(self, way: str) -> Metric:
        return Metric.of_share(sum(self.right[way]), len(self.right[way]))

    def rows(self) -> list[dict[str, object]]:
        return [
            {"what": "records", "way": way, "cases": len(right), "right": sum(right)}
            for way, right in self.right.items()
        ]


def fuse_records(bed: Bed, inputs: ReferenceInputs, advance: Callable[[], object]) -> FusedAnswers:
    """Every record by plain vLLM, by naive reuse and fused; every document was computed alone before.

    Raises
    ------
    VLLMError : a document was not there when it was to be fused.
    """
    right: dict[str, list[bool]] = {FULL: [], NAIVE: [], FUSED: []}
    plain, kvloom = bed[PLAIN], bed[KVLOOM_MEMORY]
    for case in inputs.records:
        alone = [joined(inputs.lead_ids, [document], []) for document in case.documents]
        kvloom.generate([tokens for tokens, _ in alone], [{"documents": spans} for _, spans in alone])
        kvloom.settle()
        tokens, spans = joined(inputs.lead_ids, case.documents, case.question)
        plain.reset()
        _note(right, FULL, case, plain.generate([tokens], new_tokens=len(case.answer)))
        for way, ratio in ((NAIVE, 0.0), (FUSED, FUSION_RATIO)):
            kvloom.reset()
            options = {"documents": spans, "ratio": ratio, "save": False}
            served = kvloom.generate([tokens], options, new_tokens=len(case.answer))
            _expect_fused(way, served, ratio, sum(stop - start for start, stop in spans))
            _note(right, way, case, served)
        advance()
    return FusedAnswers(right)


def _note(right: dict[str, list[bool]], way: str, case: TokenCase, served: Served) -> None:
    right[way].append(list(served.tokens[0]) == case.answer)


def _expect_fused(way: str, served: Served, ratio: float, document_tokens: int) -> None:
    usage = served.usage[0] or {}
    loaded, computed = sum(usage["loaded_tokens"].values()), usage["computed_tokens"]
    slack = CHUNK_TOKENS  # of what the engine computes because it fills no block
    is_fused = loaded >= document_tokens - slack and abs(computed - ratio * document_tokens) <= slack
    if usage["failed"] or not is_fused:
        raise VLLMError(f"{way}: {document_tokens} tokens of documents were served otherwise: {usage}")


def _gap(naive: Floats, full: Floats, other: Floats) -> float:
    return share_of_gap(float(naive.mean()), float(full.mean()), float(other.mean()))
