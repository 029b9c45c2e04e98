"""What the scheduler's half of the vLLM connector knows and decides. Imports no engine.

The stores belong to the workers, one to each tensor-parallel rank. The scheduler's half knows tokens and keys, no
bytes: what it wants done goes to the workers in the `StepPlan` of a step of the engine, what became of it comes back in
a `StepReport`. Where scheduler and worker are one process, `ask` answers lookups at once.

    matched_tokens -> LookUp -> answer -> offer -> allocated -> Load -> Loaded -> (failed: never asked again)
    plan_step      -> Save of every chunk that the step completes

What a request consists of is found by `vllm_request`, under keys of `vllm_keys`; `vllm_saves`, `vllm_fusion_plan` and
`vllm_usage` know what it has stored, how it is fused and what kvloom did for it. Loads are planned here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ....core import ChunkKey, KVSpec
from ..keys import Keys
from ..messages import Answer, Load, Loaded, LookUp, Scheduled, StepPlan, StepReport
from ..settings import RequestOptions, ServingSettings
from .fusions import Fusions
from .known_documents import KnownDocuments
from .prefill_rate import PrefillRate, says_much
from .requests import Request, RequestReader
from .saves import Saves
from .usage import Usage, seconds_saved


@dataclass(slots=True)
class _Tracked:
    """A request and what is offered to the engine of its prefix or its fusion."""

    request: Request
    asked_from: int | None = None  # chunk from which on a lookup was made
    answer: Answer | None = None
    offer: int = 0  # tokens up to which the last answer reaches
    hit_tokens: Mapping[str, int] = field(default_factory=dict)  # of the last offer taken, by tier
    has_failed: bool = False
    usage: Usage = field(default_factory=Usage)


class Planner:
    """The scheduler's half of the connector.

    Parameters
    ----------
    settings : the user's.
    specs : geometry of each rank's cache, by rank.
    block_tokens : of the engine.
    fusion_ratio : what certificates permit, for settings that ask for that.
    ask : answers a lookup at once; None where the workers are other processes, which answer in a later step.
    """

    def __init__(
        self,
        settings: ServingSettings,
        specs: Sequence[KVSpec],
        block_tokens: int,
        ask: Callable[[LookUp], Answer] | None = None,
        *,
        fusion_ratio: float = 1.0,
    ) -> None:
        self._settings = settings
        self._block_tokens = block_tokens
        self._ask = ask
        journal = None if settings.disk_path is None else Path(settings.disk_path, f"documents.{settings.match_tokens}")
        known = KnownDocuments(settings.match_tokens, journal) if settings.match_tokens else None
        ratio = fusion_ratio if settings.fusion_ratio == "certified" else settings.fusion_ratio
        self._keys = Keys(settings, specs)
        self._reader = RequestReader(settings, self._keys, known, block_tokens, ratio)
        self._pace = PrefillRate()
        self._saves = Saves(settings.chunk_tokens, block_tokens, known)
        self._fusions = Fusions(len(specs), block_tokens)
        self._tracked: dict[str, _Tracked] = {}
        self._layerwise: dict[str, Load] = {}  # loads within a step that were not heard of
        self._spoiled: set[int] = set()
        self._plan = StepPlan()
        self._counts: Counter[str] = Counter()

    # ------------------------------------------------------------------------------------------------ requests

    def open(
        self,
        request_id: str,
        token_ids: Sequence[int],
        identity: bytes,
        options: RequestOptions,
        *,
        may_fuse: bool = True,
    ) -> int | None:
        """Track a request; the first token whose KV may be approximate, or None if all of it will be exact.

        Parameters
        ----------
        token_ids : the prompt; what is generated is appended by the engine.
        identity : of all that shapes its KV beside model and tokens, and of its tenant: adapter, cache salt.
        may_fuse : whether the engine can; otherwise documents are computed like everything else.
        """

        def is_stored(key: ChunkKey) -> bool:  # workers elsewhere tell when they fetch it
            return self._ask is None or bool(self._ask(LookUp(request_id, ((key,),))))

        request = self._reader.read(token_ids, identity, options, is_stored, may_fuse=may_fuse)
        self._tracked[request_id] = _Tracked(request)
        self._saves.open(request_id, request)
        self._fusions.open(request_id, request)
        return request.inexact

    def fusion_digest(self, request_id: str) -> bytes:
        """32 bytes that stand for all that a fusion's KV depends on; see `Request`."""
        return self._tracked[request_id].request.digest

    def close(self, request_id: str) -> dict[str, object] | None:
        """Forget a request; what kvloom did for it (see `Usage`), None if nothing is known of it."""
        self._pace.forget(request_id)
        fused, saved_chunks = self._fusions.close(request_id), self._saves.close(request_id)
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        if request_id in self._layerwise:  # over within its only step; the report comes later
            tracked.usage.expect(tracked.hit_tokens)
        return tracked.usage.told(tracked.request.prompt_tokens, fused=fused, saved_chunks=saved_chunks)

    def renew(self) -> None:
        """From now on nothing is found that was stored before, and no other process finds what this one stores."""
        self._keys.renew()

    # ------------------------------------------------------------------------------------------------- loading

    def matched_tokens(self, request_id: str, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens` that can be provided; None: not known yet, ask again in the next step.

        May be called any number of times for one admission.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return 0
        request = tracked.request
        self._fusions.ask(request_id, computed_tokens)
        if tracked.has_failed or not request.options.load:
            return 0
        if request.inexact is not None:
            tracked.offer = self._fusions.reach(request_id, computed_tokens)
            return max(tracked.offer - computed_tokens, 0)
        request.keys.extend()
        chunk_tokens = self._settings.chunk_tokens
        first = computed_tokens // chunk_tokens
        if first >= len(request.keys):
            return 0
        if self._ask is not None or tracked.asked_from is None or first < tracked.asked_from:
            # Never asked, or, while the answer was on its way, the engine's own cache lost what came before.
            tracked.asked_from, tracked.answer = first, None
            lookup = LookUp(request_id, request.keys.between(first))
            if self._ask is None:
                self._plan.lookups.append(lookup)
            else:
                tracked.answer = self._ask(lookup)
        if tracked.answer is None:
            return None
        tracked.offer = (tracked.asked_from + len(tracked.answer)) * chunk_tokens
        if self.is_layerwise(request_id):  # the step must compute something
            tracked.offer = min(tracked.offer, len(request.token_ids) - 1)
        return max(tracked.offer - computed_tokens, 0)

    def is_layerwise(self, request_id: str) -> bool:
        """Whether what is loaded for it comes within the step that uses it."""
        return self._settings.load_mode == "layerwise" and self._tracked[request_id].request.inexact is None

    def has_to_wait(self, token_ids: Sequence[int], computed_tokens: int) -> bool:
        """Whether a request's local hit may lie in blocks that another one only loads in the coming step.

        vLLM files the blocks of such loads at once. Whoever shared them in the same step would be computed on what may
        never come. One step later it has come, or the blocks are filed no longer.
        """
        for load in self._plan.layerwise:
            tracked, first = self._tracked.get(load.request_id), load.start + self._block_tokens
            if tracked is None or computed_tokens <= load.start:
                continue
            if list(token_ids[:first]) == list(tracked.request.token_ids[:first]):
                return True
        return False

    def take_spoiled(self) -> set[int]:
        """Blocks that were filed under hashes of tokens whose KV did not come, since the last call."""
        spoiled, self._spoiled = self._spoiled, set()
        return spoiled

    def allocated(self, request_id: str, external_tokens: int, blocks: Sequence[int]) -> None:
        """The engine took the offer: `external_tokens` up to where it reaches are ours to provide."""
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        self._saves.resume(request_id)
        answer, asked_from = tracked.answer or (), tracked.asked_from or 0
        tracked.answer, tracked.asked_from, tracked.hit_tokens = None, None, {}
        if not external_tokens:
            self._fusions.decline(request_id)
            return
        request, stop, chunk_tokens = tracked.request, tracked.offer, self._settings.chunk_tokens
        start = stop - external_tokens
        self._counts["hit_tokens"] += external_tokens
        if request.inexact is not None:
            self._plan.fusions.append(self._fusions.begin(request_id, start, stop, blocks))
            return
        first, last = start // chunk_tokens, -(-stop // chunk_tokens)
        load = Load(request_id, request.keys.between(first, last), first * chunk_tokens, start, stop, tuple(blocks))
        if self.is_layerwise(request_id):
            self._plan.layerwise.append(load)
            self._layerwise[request_id] = load
        else:
            self._plan.loads.append(load)
        self._saves.skip(request_id, last)
        tokens: Counter[str] = Counter()
        for chunk in range(first, last):
            tokens[answer[chunk - asked_from]] += min((chunk + 1) * chunk_tokens, stop) - max(
                chunk * chunk_tokens, start
            )
        tracked.hit_tokens = tokens

    def hit_tokens(self, request_id: str) -> Mapping[str, int]:
        """Of the last offer taken, where its tokens lie, by the name of the tier; empty for a fusion."""
        tracked = self._tracked.get(request_id)
        return {} if tracked is None else tracked.hit_tokens

    def hear(self, report: StepReport) -> None:
        """Take note of what the workers did."""
        for request_id, answer in report.answers.items():
            if (tracked := self._tracked.get(request_id)) is not None and tracked.asked_from is not None:
                tracked.answer = answer
        for request_id, masks in report.found.items():
            self._fusions.fetched(request_id, masks)
        self._pace.end(report.number)
        for request_id, loaded in report.loaded.items():
            self._hear_of(request_id, loaded)

    def _hear_of(self, request_id: str, loaded: Loaded) -> None:
        """A load or a fusion is over."""
        self._fusions.end(request_id, loaded)
        load, tracked = self._layerwise.pop(request_id, None), self._tracked.get(request_id)
        if load is not None and loaded.failed:
            self._spoiled.update(load.blocks[load.start // self._block_tokens :])
        if load is None and tracked is None:  # aborted
            return
        saved_s = seconds_saved(loaded, self._pace)
        if saved_s is not None:
            self._counts["seconds_saved"] += max(saved_s, 0.0)  # type: ignore[assignment]  # a Counter may count seconds
        if tracked is None:  # over with the step that loaded for it
            return
        tracked.usage.add(loaded, saved_s)
        if loaded.failed:
            # vLLM computes from the lost chunk on, and asks again if nothing is left: it must not be told the same.
            tracked.has_failed = True
            self._saves.restart(request_id)

    # --------------------------------------------------------------------------------------------------- steps

    def is_quiet(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether `plan_step` would give an empty plan. To be asked once, before it, for every step of the engine.

        Parameters
        ----------
        new_tokens : that the step computes, for each request.
        """
        has_passed = self._saves.passes(new_tokens)
        return has_passed and not self._fusions.is_fusing and not says_much(new_tokens) and self._plan.is_empty

    def plan_step(
        self, scheduled: Iterable[Scheduled], *, is_idle: bool = False, unsaved: Collection[str] = ()
    ) -> StepPlan:
        """The plan of the step, saves of every chunk that it completes included. One fusion advances at a time.

        Parameters
        ----------
        unsaved : requests whose chunks are saved by a later step.
        """
        new_tokens = {}
        for each in scheduled:
            new_tokens[each.request_id] = each.new_tokens
            if each.request_id not in unsaved:
                self._plan.saves += self._saves.plan(each, self._pace.token_s(each.request_id))
        if (advance := self._fusions.advance()) is not None:
            self._plan.advances.append(advance)
        plan, self._plan = self._plan, StepPlan()
        plan.is_idle = is_idle
        if not plan.advances and not plan.layerwise:  # which take time beside the engine's own work
            plan.number = self._pace.begin(new_tokens)
        return plan

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        if not self._counts:
            return {}
        counts, self._counts = self._counts, Counter()
        return dict(counts)
