"""The scheduler's half of a connector: what is offered, loaded, fused and saved. Imports no engine.

The stores belong to the workers, one to each tensor-parallel rank. The scheduler's half knows tokens and keys, no
bytes: what is to be done goes to the workers in the `StepPlan` of a step of the engine, the outcome comes back in a
`StepReport`. Where scheduler and worker are one process, `look_up` answers at once.

    matched_tokens -> LookUp -> FoundTiers -> Decision -> offer -> allocated -> Load -> Loaded
                      (failed, or given back: never offered again)
    plan_step      -> Save of every chunk that the step completes

`requests.py` finds what a request consists of, `pending_transfers.py` keeps what the engine waits for, `saves.py`,
`fusions.py` and `usage.py` what was stored of it, how it is fused and what kvloom did for it; `load_control.py` decides
how much of a hit is loaded. Loads are planned here.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ....blend.method import EXACT, FusionMethod
from ....core import KVSpec
from ..controller.decisions import Decision, Missing
from ..groups import GroupShape
from ..head_splits import HeadSplit
from ..keys import Keys
from ..messages import Document, FoundTiers, Load, Loaded, LookUp, Scheduled, StepPlan, StepReport
from ..request_journal import RequestJournal
from ..settings import RequestOptions, ServingSettings
from .fusion_control import FusionControl
from .fusions import FusionTracker
from .known_documents import KnownDocuments
from .load_control import LoadControl, explained
from .pending_transfers import PendingTransfers
from .pieces import load_pieces, look_up_pieces
from .prefill_rate import PrefillRate, is_prefill_step
from .requests import Request, RequestReader
from .saves import SaveTracker
from .usage import Usage, seconds_saved

_FRESH_S = 20.0  # a result that waited longer is looked up again: its chunks are about to lose their pins


@dataclass(slots=True)
class _Tracked:
    """A request, and what is offered to the engine of its prefix or its fusion."""

    request: Request  # as it is computed
    asked: Request | None = None  # as it came, as long as it is not decided how its documents are fused
    documents_lookup: int = 0  # number of the look-up of its documents
    document_tiers: FoundTiers | None = None  # its result
    lookup: int = 0  # number of the look-up whose chunks are pinned for this request; 0 for none
    asked_from: int | None = None  # chunk from which on it asked
    tiers: FoundTiers | None = None  # its result
    missing: Missing | None = None  # why it has found nothing
    found_s: float = 0.0  # when that came
    offer: int = 0  # token up to which the last offer reaches
    hit_tokens: Mapping[str, int] = field(default_factory=dict)  # of the last offer taken, by tier
    has_failed: bool = False
    is_stale: bool = False  # opened before the last reset
    usage: Usage = field(default_factory=Usage)


class Planner:
    """The scheduler's half of the connector.

    Parameters
    ----------
    settings : the user's.
    specs : geometry of each rank's cache, by rank.
    block_tokens : of the engine.
    look_up : answers a look-up at once; None where the workers are other processes, which answer in a later step.
    why_missing : says why a look-up has found nothing, where `look_up` is given.
    splits : where else each rank's heads may be stored, see `WorkerInfo`.
    fusion : how workers fuse, with the ratio that certificates permit, for settings that ask for that.
    may_load, may_save : whether the role of this engine lets it load, and store.
    shapes : of the groups of the engine's layers, the first one's first; empty for a single one of full attention.
    further : specs of the groups behind the first, by group and rank.
    tiers : of the workers' stores; empty if they are not known.
    may_give_back : whether the engine computes what was to be loaded and is not.
    clock : monotonic seconds.
    """

    def __init__(
        self,
        settings: ServingSettings,
        specs: Sequence[KVSpec],
        block_tokens: int,
        look_up: Callable[[LookUp], FoundTiers] | None = None,
        *,
        splits: Sequence[Sequence[HeadSplit]] = (),
        fusion: FusionMethod = EXACT,
        may_load: bool = True,
        may_save: bool = True,
        shapes: Sequence[GroupShape] = (),
        further: Sequence[Sequence[KVSpec]] = (),
        why_missing: Callable[[LookUp], Missing | None] = lambda _: None,
        tiers: Sequence[str] = (),
        may_give_back: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._block_tokens = block_tokens
        self._ranks = len(specs)
        self._look_up, self._why_missing = look_up, why_missing
        given = settings.fusion_ratio
        self._fusion = fusion if given == "certified" else replace(fusion, ratio=given)
        self._may_load, self._may_save = may_load, may_save
        self._clock = clock
        journal = None if settings.disk_path is None else Path(settings.disk_path, f"documents.{settings.match_tokens}")
        known = KnownDocuments(settings.match_tokens, journal) if settings.match_tokens else None
        self._shapes = tuple(shapes)
        self._keys = Keys(settings, specs, splits, further)
        self._reader = RequestReader(settings, self._keys, known, block_tokens, self._fusion)
        folder, kept = settings.journal_path or settings.disk_path, settings.journal_requests
        self._journal = None if folder is None or not kept else RequestJournal(Path(folder), kept)
        self._rate = PrefillRate(clock)
        self._control = LoadControl(
            settings,
            specs[0].token_bytes,
            tiers,
            may_give_back=may_give_back,
            ranks=len(specs),
            shapes=self._shapes,
            clock=clock,
        )
        self._saves = SaveTracker(settings.chunk_tokens, block_tokens, known, self._shapes)
        self._fusions = FusionTracker(len(specs), block_tokens, settings.fusion_slice_tokens)
        self._fusion_control = FusionControl(
            self._control.controller,
            self._fusion,
            specs[0].num_layers,
            specs[0].token_bytes,
            block_tokens,
            clock,
        )
        self._tracked: dict[str, _Tracked] = {}
        self._pending = PendingTransfers(len(specs), block_tokens)
        self._layer_loads: dict[str, Load] = {}  # loads within a step whose outcome was not reported
        self._lookups: dict[int, str] = {}  # requests of look-ups under way, by number
        self._last_lookup = 0
        self._unwritten_blocks: set[int] = set()
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
        exact_tokens: int | None = None,
    ) -> int | None:
        """Track a request; the first token whose KV may be approximate, or None if all of it will be exact.

        A request that is open is opened anew: what was derived for it before is forgotten.

        Parameters
        ----------
        token_ids : the prompt; the engine appends what it generates.
        identity : stands for everything that shapes the request's KV beside model and tokens, and for its tenant.
        may_fuse : whether the engine can; otherwise documents are computed like everything else.
        exact_tokens : tokens from the start on that are exact, where another connector fuses the request; None if none
            does.
        """

        def is_stored(document: Document) -> bool:  # workers in other processes find out when they fetch it
            if self._look_up is None:
                return True
            keys, others = tuple((key,) for key in document.keys), tuple((other,) for other in document.others)
            return bool(self._look_up(LookUp(request_id, keys, others=others)))

        if (before := self._tracked.get(request_id)) is not None:
            self._drop_offer(before)
            self._saves.close(request_id)
            self._fusions.close(request_id)
            self._fusion_control.forget(request_id)
        options = replace(options, load=options.load and self._may_load, save=options.save and self._may_save)
        request = self._reader.read(token_ids, identity, options, is_stored, may_fuse=may_fuse and not self._shapes)
        if self._shapes:
            request = replace(request, alone=())  # of no use to an engine that does not fuse
        if exact_tokens is not None and request.inexact is None:
            request = replace(request, options=replace(options, load=False), inexact=exact_tokens)
        tracked = self._tracked[request_id] = _Tracked(request)
        if request.digest and request.options.load and self._settings.load_or_recompute == "auto":
            tracked.asked = request
            tracked.request = self._fusion_control.remembered(request, self._reader)
        self._track(request_id, tracked.request)
        return request.inexact

    def _track(self, request_id: str, request: Request) -> None:
        self._saves.open(request_id, request)
        if request.options.load:
            self._fusions.open(request_id, request)

    def fusion_name(self, request_id: str) -> tuple[int | None, bytes]:
        """The first token whose KV is not that of its tokens, None if there is none, and the digest of its fusion.

        It may change until the request is admitted; `matched_tokens` is None then, as the engine has to look again.
        """
        request = self._tracked[request_id].request
        return (request.inexact, request.digest) if request.digest else (None, b"")

    def close(self, request_id: str) -> dict[str, object] | None:
        """Forget a request; what kvloom did for it (see `Usage`), None if it is not tracked."""
        self._rate.forget(request_id)
        self._control.forget(request_id)
        self._fusion_control.forget(request_id)
        fused, saved_chunks = self._fusions.close(request_id), self._saves.close(request_id)
        tracked = self._tracked.pop(request_id, None)
        if tracked is None:
            return None
        self._drop_offer(tracked)
        if request_id in self._layer_loads:  # over within its only step; the report comes later
            tracked.usage.expect(tracked.hit_tokens)
        usage = tracked.usage.as_json(tracked.request.prompt_tokens, fused=fused, saved_chunks=saved_chunks)
        if self._journal is not None:
            self._journal.append(request_id, usage)
        return usage

    # --------------------------------------------------------------------------------------------------- reset

    def reset(self) -> None:
        """Find nothing from now on that was stored before, and store under names that no other process finds.

        Nothing that was derived for an open request outlives this. Requests are stale until they are opened anew:
        nothing is loaded for them or stored of them. Loads and fusions that the engine waits for are revoked: it learns
        that nothing was loaded.
        """
        self._keys.renew()
        # Nobody else finds what is stored from now on, so that its documents are kept out of the journal.
        known = KnownDocuments(self._settings.match_tokens) if self._settings.match_tokens else None
        self._reader = RequestReader(self._settings, self._keys, known, self._block_tokens, self._fusion)
        self._saves.reset(known)
        self._fusions.reset()
        self._lookups.clear()
        self._control.reset()
        for tracked in self._tracked.values():
            self._drop_offer(tracked)
            tracked.is_stale = True
        plan = self._plan
        plan.lookups, plan.saves, plan.advances = [], [], []
        plan.is_reset = True
        plan.revocations += self._pending.revoke()

    def is_stale(self, request_id: str) -> bool:
        """Whether a request was opened before the last reset and has to be opened anew."""
        tracked = self._tracked.get(request_id)
        return tracked is not None and tracked.is_stale

    # ------------------------------------------------------------------------------------------------- loading

    def matched_tokens(self, request_id: str, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens` that can be provided; None: not known yet, ask again in the next step.

        May be called any number of times for one admission.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return 0
        self._control.forget_decision(request_id)
        self._fusions.ask(request_id, computed_tokens)
        if tracked.has_failed or tracked.is_stale or not tracked.request.options.load:
            return 0
        if tracked.asked is not None and not self._settle_fusion(request_id, tracked, tracked.asked, computed_tokens):
            return None
        request = tracked.request
        if request.inexact is not None:
            tracked.offer = self._fusions.reach(request_id, computed_tokens)
            return max(tracked.offer - computed_tokens, 0)
        request.keys.extend()
        first = computed_tokens // self._settings.chunk_tokens
        if first >= self._chunks_of_use(request):
            return 0
        if self._is_to_be_looked_up(tracked, first):
            self._ask(request_id, tracked, first)
        if tracked.tiers is None or tracked.asked_from is None:
            return None
        chunks = self._control.decide(
            request_id, tracked.tiers, tracked.asked_from, computed_tokens, len(request.token_ids)
        )
        tracked.offer = (tracked.asked_from + chunks) * self._settings.chunk_tokens
        # A step must compute something. Of a request that has all its tokens the engine computes the last one again,
        # after it has taken back what that attends to and a next one would not.
        if self._shapes or self.is_layerwise(request_id):
            tracked.offer = min(tracked.offer, len(request.token_ids) - 1)
        return max(tracked.offer - computed_tokens, 0)

    def _settle_fusion(self, request_id: str, tracked: _Tracked, asked: Request, computed_tokens: int) -> bool:
        """Decide once how a request's documents are fused; False if the engine has to ask, and look, again."""
        before, inexact = tracked.request, tracked.request.inexact
        if inexact is not None and computed_tokens > inexact:  # it has blocks of an equal fusion, and goes on with them
            tracked.asked = None
            return True
        if not self._fusion_control.is_known:
            tracked.asked = None
            self._fusion_control.leave(request_id, asked)
            return True
        if tracked.document_tiers is None:
            if not tracked.documents_lookup:
                self._ask_documents(request_id, tracked, asked.documents)
            if tracked.document_tiers is None:
                return False
        tracked.asked = None
        for document, tier in zip(asked.documents, tracked.document_tiers, strict=False):
            if tier:
                found = tracked.usage.found.get(tier, 0) + document.stop - document.start
                tracked.usage.found = {**tracked.usage.found, tier: found}
        tracked.request = self._fusion_control.decide(
            request_id,
            asked,
            self._reader,
            tracked.document_tiers,
            computed_tokens,
            self._control.queue(request_id),
        )
        if tracked.request.digest == before.digest:
            return True
        self._saves.close(request_id)
        self._fusions.close(request_id)
        self._track(request_id, tracked.request)
        return False

    def _ask_documents(self, request_id: str, tracked: _Tracked, documents: Sequence[Document]) -> None:
        keys = tuple(zip(*(document.keys for document in documents), strict=True))
        others = tuple(zip(*(document.others for document in documents), strict=True))
        if self._look_up is not None:
            tracked.document_tiers = self._look_up(LookUp(request_id, keys, others=others, is_each=True))
            return
        self._last_lookup += 1
        tracked.documents_lookup = self._last_lookup
        self._lookups[self._last_lookup] = request_id
        self._plan.lookups.append(LookUp(request_id, keys, self._last_lookup, others=others, is_each=True))

    def _chunks_of_use(self, request: Request) -> int:
        """Leading chunks that a request may load: with states not its last token, which the engine computes again."""
        if any(shape.keeps_state for shape in self._shapes):
            return min((len(request.token_ids) - 1) // self._settings.chunk_tokens, len(request.keys))
        return len(request.keys)

    def _is_to_be_looked_up(self, tracked: _Tracked, first: int) -> bool:
        if self._look_up is not None or tracked.asked_from is None:
            return True
        if first < tracked.asked_from:  # while the result was on its way, the engine's own cache lost what came before
            return True
        return tracked.tiers is not None and self._clock() - tracked.found_s > _FRESH_S

    def _ask(self, request_id: str, tracked: _Tracked, first: int) -> None:
        """Look up the chunks from `first` on. A new look-up replaces the offer of the one before."""
        self._last_lookup += 1
        keys = tracked.request.keys
        if self._shapes:
            last, groups = self._chunks_of_use(tracked.request), len(self._shapes)
            lookup = look_up_pieces(request_id, keys, first, last, groups, self._last_lookup, tracked.lookup)
        else:
            others = keys.others_between(first)
            lookup = LookUp(request_id, keys.between(first), self._last_lookup, tracked.lookup, others)
        self._lookups.pop(tracked.lookup, None)
        tracked.lookup, tracked.asked_from, tracked.tiers, tracked.missing = lookup.number, first, None, None
        if self._look_up is None:
            self._lookups[lookup.number] = request_id
            self._plan.lookups.append(lookup)
            return
        tracked.tiers = self._look_up(lookup)
        if not tracked.tiers:
            tracked.lookup = 0
            tracked.missing = self._why_missing(lookup)

    def _drop_offer(self, tracked: _Tracked) -> None:
        """The offer of the last look-up is over: what it pinned may go."""
        if tracked.lookup:
            self._plan.released.append(tracked.lookup)
            self._lookups.pop(tracked.lookup, None)
        tracked.lookup, tracked.tiers, tracked.asked_from = 0, None, None

    def is_layerwise(self, request_id: str) -> bool:
        """Whether the request's KV is loaded within the step that uses it."""
        return self._settings.load_mode == "layerwise" and self._tracked[request_id].request.inexact is None

    def has_to_wait(self, token_ids: Sequence[int], computed_tokens: int) -> bool:
        """Whether a request's local hit may lie in blocks that another request only loads in the coming step.

        vLLM files the blocks of such loads at once. A request that shared them in the same step would be computed on KV
        that may be lost. One step later it is there, or the blocks are filed no longer.
        """
        for load in self._plan.layer_loads:
            tracked, first = self._tracked.get(load.request_id), load.start + self._block_tokens
            if tracked is None or computed_tokens <= load.start:
                continue
            if list(token_ids[:first]) == list(tracked.request.token_ids[:first]):
                return True
        return False

    def take_unwritten_blocks(self) -> set[int]:
        """Blocks that were filed under hashes of tokens whose KV was not loaded, since the last call."""
        blocks, self._unwritten_blocks = self._unwritten_blocks, set()
        return blocks

    def allocated(self, request_id: str, external_tokens: int, blocks: Sequence[int], *further: Sequence[int]) -> None:
        """The engine took the offer: `external_tokens` up to where it reaches are to be provided, in these blocks.

        `further`: blocks in further groups.
        """
        tracked = self._tracked.get(request_id)
        if tracked is None:
            return
        if tracked.is_stale:
            if external_tokens:
                self._load_nothing(request_id, tracked.offer - external_tokens, tracked.offer, blocks)
            return
        self._saves.resume(request_id)
        lookup, tiers, asked_from = tracked.lookup, tracked.tiers or (), tracked.asked_from or 0
        tracked.hit_tokens = {}
        decision = self._take_on(request_id, tracked, external_tokens)
        if not external_tokens:
            self._drop_offer(tracked)
            self._fusions.decline(request_id)
            return
        tracked.lookup, tracked.tiers, tracked.asked_from = 0, None, None  # the load has it now
        request, stop, chunk_tokens = tracked.request, tracked.offer, self._settings.chunk_tokens
        start = stop - external_tokens
        self._counts["hit_tokens"] += external_tokens
        if request.inexact is not None:
            self._plan.fusions.append(self._fusions.begin(request_id, start, stop, blocks))
            self._pending.begin(request_id, start, stop, blocks)
            return
        first, last = start // chunk_tokens, -(-stop // chunk_tokens)
        if self._shapes:
            rows = (blocks, *further)
            load = load_pieces(request_id, request.keys, start, stop, self._shapes, rows, chunk_tokens, lookup)
        else:
            keys, others = request.keys.between(first, last), request.keys.others_between(first, last)
            load = Load(request_id, keys, first * chunk_tokens, start, stop, tuple(blocks), lookup, others)
        load = replace(load, limit_s=None if decision is None else decision.limit_s)
        if self.is_layerwise(request_id):
            self._plan.layer_loads.append(load)
            self._layer_loads[request_id] = load
        else:
            self._plan.loads.append(load)
            self._pending.begin(request_id, start, stop, blocks)
        self._saves.skip(request_id, last)
        tokens: Counter[str] = Counter()
        for chunk in range(first, last):
            begin, end = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
            tokens[tiers[chunk - asked_from]] += min(end, stop) - max(begin, start)
        tracked.hit_tokens = tokens

    def _take_on(self, request_id: str, tracked: _Tracked, external_tokens: int) -> Decision | None:
        """The engine takes the request on: what was decided about its load, if that is what it loads."""
        is_prefix = tracked.request.inexact is None
        queue = self._control.queue(request_id)
        fusion = self._fusion_control.take_on(request_id, queue, fuses=bool(external_tokens) and not is_prefix)
        if fusion is not None:
            self._counts[f"decisions.{fusion.reason}"] += 1
            tracked.usage.decision = fusion
        computed = tracked.offer if external_tokens else None
        decision = self._control.take_on(
            request_id, len(tracked.request.token_ids), computed, loads=bool(external_tokens) and is_prefix
        )
        if decision is not None:
            self._control.consider_probes(tracked.tiers or (), decision, tracked.request.keys, tracked.asked_from or 0)
            decision = explained(decision, tracked.missing)
            if decision.chunks or fusion is None or fusion.reason == "nothing stored":
                tracked.usage.decision = decision
            size = self._settings.chunk_tokens
            if tracked.tiers or fusion is None:
                tracked.usage.found = {tier: size * count for tier, count in Counter(tracked.tiers).items()}
        return decision

    def _load_nothing(self, request_id: str, start: int, stop: int, blocks: Sequence[int]) -> None:
        """The engine took an offer that a reset has withdrawn since: a load without keys, which is lost."""
        self._plan.loads.append(Load(request_id, ((),) * self._ranks, start, start, stop, tuple(blocks)))
        self._pending.begin(request_id, start, stop, blocks, is_withdrawn=True)

    def hit_tokens(self, request_id: str) -> Mapping[str, int]:
        """Tokens of the last offer taken by the tier that holds them; empty for a fusion."""
        tracked = self._tracked.get(request_id)
        return {} if tracked is None else tracked.hit_tokens

    # ------------------------------------------------------------------------------------------------ outcomes

    def apply_report(self, report: StepReport) -> None:
        """Take note of what the workers did."""
        for number, tiers in report.found_prefixes.items():
            tracked = self._tracked.get(self._lookups.pop(number, ""))
            if tracked is not None and tracked.documents_lookup == number:
                tracked.document_tiers = tiers
            elif tracked is not None and tracked.lookup == number:
                tracked.tiers, tracked.found_s = tiers, self._clock()
                tracked.lookup = number if tiers else 0
                tracked.missing = report.missing.get(number)
        for request_id, masks in report.found_documents.items():
            self._fusions.add_found(request_id, masks)
        if (step := self._rate.end(report.number)) is not None:
            self._control.observe_prefill(step.tokens, step.position, step.spent_s)
        if report.probed is not None:
            self._control.end_probe(report.probed)
        for request_id in report.revoked:
            if self._pending.acknowledge(request_id):
                if self._shapes:  # whose engine learns of failures with the end of a load, not by blocks
                    self._plan.failures.append(request_id)
                else:
                    self._pending.pass_on(request_id)
        for request_id, loaded in report.loaded.items():
            self._apply_loaded(request_id, loaded)

    def arrived(self, request_ids: set[str]) -> set[str]:
        """Requests whose transfer is over for the engine, of those for which the workers say so.

        A transfer that was over on the workers before they learned that it is revoked waits here until they have
        reported its blocks as not loaded. To be called after `apply_report`, for every outcome of a step.
        """
        return self._pending.over(request_ids)

    def _apply_loaded(self, request_id: str, loaded: Loaded) -> None:
        """A load or a fusion is over, on some ranks at least."""
        if (load := self._layer_loads.pop(request_id, None)) is not None:
            self._control.end(request_id, loaded)
            if loaded.failed:
                self._unwritten_blocks.update(load.blocks[load.start // self._block_tokens :])
            self._count_loaded(request_id, loaded)
            return
        whole = self._pending.add_outcome(request_id, loaded)
        if whole is None:
            return
        self._fusion_control.end(request_id, whole, self._control.queue(request_id))
        decision, tracked = self._control.end(request_id, whole), self._tracked.get(request_id)
        if decision is not None and tracked is not None:
            tracked.usage.decision = decision
        if self._pending.end(request_id):
            self._fusions.end(request_id, whole)
            if request_id in self._tracked:  # otherwise it was aborted
                self._count_loaded(request_id, whole)

    def _count_loaded(self, request_id: str, loaded: Loaded) -> None:
        saved_s = seconds_saved(loaded, self._rate)
        if saved_s is not None:
            self._counts["seconds_saved"] += max(saved_s, 0.0)  # type: ignore[assignment]  # a Counter may count seconds
        tracked = self._tracked.get(request_id)
        if tracked is None or tracked.is_stale:  # over with the step that loaded for it
            return
        tracked.usage.add(loaded, saved_s)
        if loaded.failed:
            # The engine computes from the lost chunk on, and asks again if nothing is left: it must not be offered the
            # same chunks.
            tracked.has_failed = True
            self._saves.restart(request_id)

    # --------------------------------------------------------------------------------------------------- steps

    @property
    def is_idle(self) -> bool:
        """Whether no request is open and no load or fusion is under way."""
        return not (self._tracked or self._pending or self._layer_loads or self._fusions.is_fusing)

    def is_quiet(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether `plan_step` would give an empty plan. Call it once, before that, for every step of the engine.

        Parameters
        ----------
        new_tokens : that the step computes, for each request.
        """
        has_passed = self._saves.passes(new_tokens)
        control = self._control
        has_other = self._fusions.is_fusing or control.has_queue or control.has_probe or not self._plan.is_empty
        return has_passed and not has_other and not is_prefill_step(new_tokens)

    def plan_step(
        self, scheduled: Iterable[Scheduled], *, is_idle: bool = False, unsaved: Collection[str] = ()
    ) -> StepPlan:
        """The plan of the step, with a save of every chunk that it completes. One fusion advances at a time.

        Parameters
        ----------
        unsaved : requests whose chunks are saved by a later step.
        """
        new_tokens, positions = {}, 0.0
        for each in scheduled:
            new_tokens[each.request_id] = each.new_tokens
            positions += each.new_tokens * (each.computed_tokens - each.new_tokens / 2)
            self._control.computed(each.request_id, each.computed_tokens)
            if each.request_id not in unsaved:
                pays = self._control.pays_to_store(each.request_id, each.computed_tokens)
                self._plan.saves += self._saves.plan(each, self._rate.token_s(each.request_id), pays=pays)
        self._plan.cancelled += self._control.given_back()
        self._plan.probe = self._control.take_probe()
        if (advance := self._fusions.advance()) is not None:
            self._plan.advances.append(advance)
        plan, self._plan = self._plan, StepPlan()
        plan.is_idle = is_idle
        if not plan.advances and not plan.layer_loads:  # which take time beside the engine's own work
            plan.number = self._rate.begin(new_tokens, positions / max(sum(new_tokens.values()), 1))
        return plan

    def take_counts(self) -> dict[str, float]:
        """What was counted since the last call."""
        if not self._counts and not self._control.counts:
            return {}
        counts, self._counts = self._counts, Counter()
        counts.update(self._control.counts)
        self._control.counts.clear()
        return dict(counts)
