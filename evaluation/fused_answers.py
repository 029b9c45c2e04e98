"""One question under every way of using cached documents: time to first token, tokens, bytes, answer."""

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache

from ..blend.blender import CACHEBLEND, Blender
from ..blend.choosers import CHOOSERS
from ..connectors.hf.connector import TransformersConnector
from ..connectors.hf.generation import cache_argument
from ..kvstore.store import KVStore
from .intervals import spread
from .workload import Case

NEW_TOKENS = 6
HOST_BYTES = 4 << 30  # of the host tier in front of the disk


@dataclass(frozen=True, slots=True)
class Method:
    """A way of answering.

    Attributes
    ----------
    cached_documents : how many leading documents come from the store; None for all.
    blender : how they are fused.
    """

    name: str
    cached_documents: int | None = None
    blender: Blender | None = None


FULL = Method("full prefill", cached_documents=0)
# All but the first document computed, by the same kernels as the fusions: a dense prefill behind a cached prefix in
# transformers goes through a full mask and is slower than computing everything.
PREFIX = Method("prefix caching", blender=Blender(1.0))
NAIVE = Method("naive reuse", blender=Blender(0.0))


def blend(ratio: float, chooser: str = "deviation") -> Method:
    """CacheBlend at this recompute ratio, or another chooser of tokens in its place."""
    name = "CacheBlend" if chooser == "deviation" else {"first": "first tokens"}.get(chooser, chooser)
    blender = replace(CACHEBLEND, recompute_ratio=ratio, chooser=CHOOSERS[chooser])
    return Method(f"{name} {ratio:.0%}", blender=blender)


def own(ratio: float) -> Method:
    """The default fusion at this share of the tokens."""
    return Method(f"kvloom {ratio:.0%}", blender=replace(Blender(), recompute_ratio=ratio))


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """Outcome of one method on one case.

    Attributes
    ----------
    ttft_s : seconds from the request's token ids to the first token of the answer.
    tokens : the answer, `NEW_TOKENS` greedy tokens.
    logits : `[V]`, of the first token.
    computed_tokens : tokens that ran through a layer, mean over layers: context and question of full prefill, less of
        others.
    loaded_bytes : bytes read from each tier.
    """

    ttft_s: float
    tokens: tuple[int, ...]
    logits: Tensor
    computed_tokens: float
    loaded_bytes: dict[str, int]


@torch.no_grad()
def answer(connector: TransformersConnector, method: Method, case: Case, *, new_tokens: int = NEW_TOKENS) -> Outcome:
    """Answer one case by one method, as a server would: tokens in, tokens out."""
    documents = [connector.encode_document(document) for document in case.documents]
    question = connector.encode_question(case.question)
    before = _bytes_read(connector)
    start = time.perf_counter()
    cached = len(documents) if method.cached_documents is None else method.cached_documents
    rest = [token for ids in documents[cached:] for token in ids] + question
    if cached:
        context = connector.fuse(documents[:cached], question_ids=rest, blender=method.blender)
        inputs, cache = connector.as_inputs(context, rest)
        input_ids = inputs["input_ids"][:, cache.get_seq_length() :]
        computed = context.blended.computed_tokens + len(rest)
    else:
        input_ids = torch.tensor([[*connector.lead_ids, *rest]], device=connector.model.device)
        cache = DynamicCache(config=connector.model.config)
        computed = float(input_ids.shape[1])
    held = {cache_argument(): cache}
    logits = connector.model(input_ids, logits_to_keep=1, **held).logits[0, -1]
    tokens = [int(logits.argmax())]
    ttft = time.perf_counter() - start
    loaded = dict(_bytes_read(connector) - before)
    while len(tokens) < new_tokens:
        step = torch.tensor([tokens[-1:]], device=connector.model.device)
        tokens.append(int(connector.model(step, **held).logits[0, -1].argmax()))
    return Outcome(ttft, tuple(tokens), logits.float().cpu(), computed, loaded)


def _bytes_read(connector: TransformersConnector) -> Counter[str]:
    store = connector.store
    if not isinstance(store, KVStore):
        return Counter()  # a part of a served store, which tells nobody what it reads
    return Counter({tier.name: tier.bytes_read for tier in store.stats().tiers})


@dataclass(frozen=True, slots=True)
class Score:
    """One method over all cases, in their order.

    Attributes
    ----------
    kinds : of the cases.
    exact : whether the answer was right word for word; None where no answer is known.
    kl : see `Summary`.
    """

    method: Method
    kinds: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    exact: tuple[bool | None, ...]
    kl: tuple[float, ...]

    def speedups(self, full: "Score") -> list[float]:
        """Full prefill's time over this method's, case by case."""
        return [a.ttft_s / b.ttft_s for a, b in zip(full.outcomes, self.outcomes, strict=True)]

    @property
    def known(self) -> list[bool]:
        return [right for right in self.exact if right is not None]

    @property
    def exact_match(self) -> dict[str, float]:
        """Share of right answers by kind of case, where answers are known."""
        by_kind: dict[str, list[bool]] = {}
        for kind, right in zip(self.kinds, self.exact, strict=True):
            if right is not None:
                by_kind.setdefault(kind, []).append(right)
        return {kind: sum(rights) / len(rights) for kind, rights in by_kind.items()}

    def summary(self, full: "Score") -> "Summary":
        """The method's line of the table, beside full prefill's."""
        ttft, low, high = spread([o.ttft_s for o in self.outcomes])
        count = len(self.outcomes)
        loaded: Counter[str] = Counter()
        for outcome in self.outcomes:
            loaded.update(outcome.loaded_bytes)
        return Summary(
            method=self.method.name,
            ttft_s=ttft,
            ttft_s_p10=low,
            ttft_s_p90=high,
            speedup=spread(self.speedups(full))[0],
            computed_tokens=sum(o.computed_tokens for o in self.outcomes) / count,
            loaded_bytes={tier: total / count for tier, total in loaded.items() if total},
            exact_match=self.exact_match,
            kl=sum(self.kl) / count,
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """One method in figures: medians of times and of ratios to full prefill, means of the rest.

    Attributes
    ----------
    ttft_s, ttft_s_p10, ttft_s_p90 : median, 10th and 90th percentile.
    exact_match : share of right answers by kind of case, where answers are known.
    kl : nats, of the next-token distribution to full prefill's.
    """

    method: str
    ttft_s: float
    ttft_s_p10: float
    ttft_s_p90: float
    speedup: float
    computed_tokens: float
    loaded_bytes: dict[str, float]
    exact_match: dict[str, float]
    kl: float


def score(
    connector: TransformersConnector,
    cases: Sequence[Case],
    methods: Sequence[Method],
    *,
    warm_up: bool = True,
    before_case: Callable[[Case], object] = lambda _: None,
    before_each: Callable[[], None] = lambda: None,
    advance: Callable[[], object] = lambda: None,
    stop_s: float = math.inf,
) -> list[Score]:
    """Every method on every case, side by side: case by case, full prefill first.

    Parameters
    ----------
    methods : begins with `FULL`, which the others are compared with.
    warm_up : answer the first case by every method before, untimed.
    before_case : called before the answers to a case, to compute its documents for instance.
    before_each : called before every timed answer, to empty the page cache for instance.
    advance : called after every case.
    stop_s : of the monotonic clock: no case but the first begins after it.
    """
    if warm_up:
        before_case(cases[0])
    for method in methods if warm_up else ():
        answer(connector, method, cases[0], new_tokens=1)
    outcomes: list[list[Outcome]] = [[] for _ in methods]
    exact: list[list[bool | None]] = [[] for _ in methods]
    kl: list[list[float]] = [[] for _ in methods]
    for case in cases:
        if outcomes[0] and time.monotonic() >= stop_s:
            cases = cases[: len(outcomes[0])]
            break
        before_case(case)
        gold = None if case.answer is None else tuple(connector.encode_question(case.answer))
        for i, method in enumerate(methods):
            before_each()
            outcome = answer(connector, method, case, new_tokens=max(NEW_TOKENS, len(gold or ())))
            outcomes[i].append(outcome)
            exact[i].append(None if gold is None else outcome.tokens[: len(gold)] == gold)
            kl[i].append(kl_divergence(outcomes[0][-1].logits, outcome.logits))
        advance()
    kinds = tuple(case.kind for case in cases)
    return [Score(method, kinds, tuple(outcomes[i]), tuple(exact[i]), tuple(kl[i])) for i, method in enumerate(methods)]


def kl_divergence(reference: Tensor, other: Tensor) -> float:
    """KL of next-token distributions in nats, from logits `[V]`: how surprised `other` is by `reference`."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return max(0.0, float((p.exp() * (p - q)).sum()))
