"""What the scheduler's half of the vLLM connector knows and decides. Imports no engine.

The stores belong to the workers, one to each tensor-parallel rank. The scheduler's half knows tokens and keys, no
bytes: what it wants done goes to the workers in the `StepPlan` of a step of the engine, what became of it comes back in
a `StepReport`. Where scheduler and worker are one process, `ask` answers lookups at once.

    matched_tokens -> LookUp -> answer -> offer -> allocated -> Load -> Loaded -> (failed: never asked again)
    plan_step      -> Save of every chunk that the step completes
"""

from __future__ import annotations

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from ..core import ChunkKey, KVSpec
from ..kvstore.keys import content_key, prefix_keys
from .known_documents import KnownDocuments
from .vllm_due import Due
from .vllm_messages import (
    Advance,
    Answer,
    Document,
    Fusion,
    Load,
    Loaded,
    LookUp,
    Save,
    Scheduled,
    StepPlan,
    StepReport,
    both,
)
from .vllm_pace import Pace, says_much
from .vllm_settings import RequestOptions, VLLMSettings, documents_between

Fused: TypeAlias = Literal["no", "yes", "partly"]
"""Whether the span of a fusion is what one fusion makes of it; "partly": its rest was computed exactly behind it."""

_NEVER = 1 << 62  # tokens
_PLANS = 256  # fusions whose choice is remembered: four bytes for each token computed


@dataclass(slots=True)
class _Tracked:
    """A request that kvloom serves. `token_ids` grows as the engine generates."""

    token_ids: Sequence[int]
    prompt_tokens: int
    salt: bytes
    options: RequestOptions
    documents: tuple[Document, ...]
    ratio: float
    inexact: int | None  # the first token whose KV is not what plain computation gives
    keys: list[list[ChunkKey]]  # prefix keys of whole chunks, for each rank
    asked_from: int | None = None  # chunk from which on a lookup was made
    answer: Answer | None = None
    offer: int = 0  # tokens up to which the last answer reaches
    hit_tokens: Mapping[str, int] = field(default_factory=dict)  # of the last offer taken, by tier
    has_failed: bool = False
    saved_chunks: int = 0  # chunks from the start on that are stored or on their way
    planned_saves: int = 0
    alone: tuple[Document, ...] = ()  # documents to store that this request computes as if alone
    loaded: Loaded | None = None
    seconds_saved: float | None = 0.0  # None: not known
    plan: bytes = b""  # names the fusion, for those who share it
    local_tokens: int | None = None  # that the engine has itself, when it has asked and not yet taken the request up
    fused_from: int = 0  # where the last fusion began
    fused: Fused | None = None


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
        settings: VLLMSettings,
        specs: Sequence[KVSpec],
        block_tokens: int,
        ask: Callable[[LookUp], Answer] | None = None,
        *,
        fusion_ratio: float = 1.0,
    ) -> None:
        self._settings = settings
        self._specs = tuple(specs)
        self._block_tokens = block_tokens
        self._ask = ask
        self._fusion_ratio = fusion_ratio if settings.fusion_ratio == "certified" else settings.fusion_ratio
        self._epoch = b""
        journal = None if settings.disk_path is None else Path(settings.disk_path, f"documents.{settings.match_tokens}")
        self._known = KnownDocuments(settings.match_tokens, journal) if settings.match_tokens else None
        self._tracked: dict[str, _Tracked] = {}
        self._fusing: dict[str, tuple[tuple[bool, ...], ...]] = {}  # what each rank found, in order of arrival
        self._layerwise: dict[str, Load] = {}  # loads within a step that were not heard of
        self._spoiled: set[int] = set()
        self._choices: OrderedDict[bytes, NDArray[np.int32]] = OrderedDict()  # what fusions computed, by plan
        self._plan = StepPlan()
        self._counts: Counter[str] = Counter()
        self._pace = Pace()
        self._due = Due()  # of requests that are saved: their next chunk or document

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
        salt = b"".join(_framed(part) for part in (self._epoch, self._settings.salt.encode(), identity))
        spans = options.documents or documents_between(token_ids, self._settings.separator_ids)
        ratio = self._fusion_ratio if options.ratio is None else options.ratio
        if not spans and ratio < 1.0 and may_fuse and options.load:
            spans = self._stored_spans(request_id, token_ids, salt)
        documents = tuple(
            Document(start, stop, self._content_keys(token_ids[start:stop], salt)) for start, stop in spans
        )
        lead_ids = self._settings.lead_ids
        is_led = tuple(token_ids[: len(lead_ids)]) == lead_ids
        alone = {document for document in documents[:1] if is_led and document.start == len(lead_ids)}
        # What stands right behind the lead tokens has its KV from there: exact. A fusion that computes all is, too.
        inexact = next((each.start for each in documents if each not in alone), None) if ratio < 1.0 else None
        if inexact is not None:
            # The engine tells fused blocks from exact ones by the hash of a whole block of the prompt.
            has_whole_block = len(token_ids) // self._block_tokens > inexact // self._block_tokens
            inexact = inexact if may_fuse and has_whole_block else None
        keys: list[list[ChunkKey]] = [[] for _ in self._specs]
        self._tracked[request_id] = _Tracked(
            token_ids, len(token_ids), salt, options, documents, ratio, inexact, keys, alone=tuple(alone)
        )
        if options.save:
            self._due.expect(request_id, 0)
        if inexact is not None:
            self._tracked[request_id].plan = blake3(salt + self.fusion_digest(request_id)).digest()
        return inexact

    def fusion_digest(self, request_id: str) -> bytes:
        """32 bytes that stand for all that a fusion's KV depends on: which tokens are computed is a matter of all."""
        request, settings = self._tracked[request_id], self._settings
        spans = [(document.start, document.stop) for document in request.documents]
        plan = ("kvloom fusion", request.ratio, settings.check_layer, settings.lead_ids, spans)
        token_ids = np.asarray(request.token_ids[: spans[-1][1]], dtype="<i8")
        return blake3(repr(plan).encode() + token_ids.tobytes()).digest()

    def close(self, request_id: str) -> dict[str, object] | None:
        """Forget a request; what kvloom did for it, None if nothing is known of it.

        `seconds_saved`: what computing the tokens that kvloom provided would have taken, less the time that providing
        them took, from the beginning of a load or fusion to its end. What computing would have taken is for stored
        tokens what their chunks say that it took when they were computed; for others, and for the tokens between fused
        documents, it is their number times the engine's seconds a token (`Pace`). Below 0 if computing would have been
        faster; null if the engine has not computed a prompt yet by which to judge.
        """
        self._fusing.pop(request_id, None)
        self._pace.forget(request_id)
        self._due.forget(request_id)
        request = self._tracked.pop(request_id, None)
        if request is None:
            return None
        loaded = request.loaded or Loaded({}, False, 0.0)
        if request_id in self._layerwise:  # over within its only step, so all has come; the report comes later
            loaded, request.seconds_saved = Loaded(request.hit_tokens, False, 0.0), None
        return {
            "prompt_tokens": request.prompt_tokens,
            "loaded_tokens": dict(loaded.tokens),
            "computed_tokens": loaded.computed_tokens,
            "load_s": round(loaded.spent_s, 6),
            "seconds_saved": None if request.seconds_saved is None else round(request.seconds_saved, 6),
            "failed": loaded.failed,
            "fused": request.fused or "no",
            "saved_chunks": request.planned_saves,
        }

    def renew(self) -> None:
        """From now on nothing is found that was stored before, and no other process finds what this one stores."""
        self._epoch = secrets.token_bytes(16)

    # ------------------------------------------------------------------------------------------------- loading

    def matched_tokens(self, request_id: str, computed_tokens: int) -> int | None:
        """Tokens beyond `computed_tokens` that can be provided; None: not known yet, ask again in the next step.

        May be called any number of times for one admission.
        """
        request = self._tracked.get(request_id)
        if request is None:
            return 0
        request.local_tokens = computed_tokens
        if request.has_failed or not request.options.load:
            return 0
        if request.inexact is not None:
            if computed_tokens > request.inexact and request.plan not in self._choices:
                # The engine has fused tokens of a request like this one, or of this one before it was preempted. A
                # second choice among the rest alone would be another one than the first: the rest is computed.
                return 0
            # Whole blocks only: the engine finds them again as they are, and computes what follows in any case. One
            # token must be left to it: the first new one is sampled from what it computes.
            stop = min(request.documents[-1].stop, len(request.token_ids) - 1)
            request.offer = stop - stop % self._block_tokens
            return max(request.offer - computed_tokens, 0)
        self._extend_keys(request)
        chunk_tokens = self._settings.chunk_tokens
        first = computed_tokens // chunk_tokens
        if first >= len(request.keys[0]):
            return 0
        if self._ask is not None or request.asked_from is None or first < request.asked_from:
            # Never asked, or, while the answer was on its way, the engine's own cache lost what came before.
            request.asked_from, request.answer = first, None
            lookup = LookUp(request_id, tuple(tuple(keys[first:]) for keys in request.keys))
            if self._ask is None:
                self._plan.lookups.append(lookup)
            else:
                request.answer = self._ask(lookup)
        if request.answer is None:
            return None
        request.offer = (request.asked_from + len(request.answer)) * chunk_tokens
        if self.is_layerwise(request_id):  # the step must compute something
            request.offer = min(request.offer, len(request.token_ids) - 1)
        return max(request.offer - computed_tokens, 0)

    def is_layerwise(self, request_id: str) -> bool:
        """Whether what is loaded for it comes within the step that uses it."""
        return self._settings.load_mode == "layerwise" and self._tracked[request_id].inexact is None

    def has_to_wait(self, token_ids: Sequence[int], computed_tokens: int) -> bool:
        """Whether a request's local hit may lie in blocks that another one only loads in the coming step.

        vLLM files the blocks of such loads at once. Whoever shared them in the same step would be computed on what may
        never come. One step later it has come, or the blocks are filed no longer.
        """
        for load in self._plan.layerwise:
            request, first = self._tracked.get(load.request_id), load.start + self._block_tokens
            if request is None or computed_tokens <= load.start:
                continue
            if list(token_ids[:first]) == list(request.token_ids[:first]):
                return True
        return False

    def take_spoiled(self) -> set[int]:
        """Blocks that were filed under hashes of tokens whose KV did not come, since the last call."""
        spoiled, self._spoiled = self._spoiled, set()
        return spoiled

    def allocated(self, request_id: str, external_tokens: int, blocks: Sequence[int]) -> None:
        """The engine took the offer: `external_tokens` up to where it reaches are ours to provide."""
        request = self._tracked.get(request_id)
        if request is None:
            return
        if request.options.save:  # its tokens come from anywhere now
            self._due.expect(request_id, 0)
        answer, asked_from = request.answer or (), request.asked_from or 0
        request.answer, request.asked_from, request.hit_tokens = None, None, {}
        if request.inexact is not None:
            local, request.local_tokens = request.local_tokens, None
            if external_tokens:
                request.fused_from = request.offer - external_tokens
            elif local is not None:  # not merely back from a fusion
                request.fused = _either(request.fused, self._fused_of(request, local))
        if not external_tokens:
            return
        stop, chunk_tokens = request.offer, self._settings.chunk_tokens
        start = stop - external_tokens
        self._counts["hit_tokens"] += external_tokens
        if request.inexact is not None:
            token_ids = np.asarray(request.token_ids[:stop], dtype=np.int64)
            self._plan.fusions.append(
                Fusion(
                    request_id,
                    token_ids,
                    start,
                    stop,
                    request.inexact,
                    request.documents,
                    request.ratio,
                    tuple(blocks),
                    self._choices.get(request.plan) if start > request.inexact else None,
                )
            )
            self._fusing[request_id] = ()
            return
        first, last = start // chunk_tokens, -(-stop // chunk_tokens)
        keys = tuple(tuple(keys[first:last]) for keys in request.keys)
        load = Load(request_id, keys, first * chunk_tokens, start, stop, tuple(blocks))
        if self.is_layerwise(request_id):
            self._plan.layerwise.append(load)
            self._layerwise[request_id] = load
        else:
            self._plan.loads.append(load)
        request.saved_chunks = max(request.saved_chunks, last)
        tokens: Counter[str] = Counter()
        for chunk in range(first, last):
            tokens[answer[chunk - asked_from]] += min((chunk + 1) * chunk_tokens, stop) - max(
                chunk * chunk_tokens, start
            )
        request.hit_tokens = tokens

    def hit_tokens(self, request_id: str) -> Mapping[str, int]:
        """Of the last offer taken, where its tokens lie, by the name of the tier; empty for a fusion."""
        request = self._tracked.get(request_id)
        return {} if request is None else request.hit_tokens

    def hear(self, report: StepReport) -> None:
        """Take note of what the workers did."""
        for request_id, answer in report.answers.items():
            if (request := self._tracked.get(request_id)) is not None and request.asked_from is not None:
                request.answer = answer
        for request_id, masks in report.found.items():
            if request_id in self._fusing:
                self._fusing[request_id] += masks
        self._pace.end(report.number)
        for request_id, loaded in report.loaded.items():
            self._fusing.pop(request_id, None)
            load, request = self._layerwise.pop(request_id, None), self._tracked.get(request_id)
            if load is not None and loaded.failed:
                self._spoiled.update(load.blocks[load.start // self._block_tokens :])
            saved_s = self._seconds_saved(loaded) if load is not None or request is not None else None
            if request is None:  # aborted, or over with the step that loaded for it
                continue
            if saved_s is None or request.seconds_saved is None:
                request.seconds_saved = None
            else:
                request.seconds_saved += saved_s
            if loaded.chosen is not None:
                self._choices[request.plan] = loaded.chosen
                self._choices.move_to_end(request.plan)
                while len(self._choices) > _PLANS:
                    self._choices.popitem(last=False)
                loaded = replace(loaded, chosen=None)
            request.loaded = loaded if request.loaded is None else both(request.loaded, loaded)
            if request.inexact is not None:
                lost: Fused = "no" if request.fused_from <= request.inexact else "partly"
                request.fused = _either(request.fused, lost if loaded.failed else "yes")
            if loaded.failed:
                # vLLM computes from the lost chunk on, and asks again if nothing is left: it must not be told the same.
                request.has_failed = True
                request.saved_chunks = 0
                if request.options.save:
                    self._due.expect(request_id, 0)

    def _seconds_saved(self, loaded: Loaded) -> float | None:
        """By one load or fusion, see `close`; counts it."""
        token_s = self._pace.token_s() if loaded.unpriced_tokens else 0.0
        if token_s is None:
            return None
        saved_s = loaded.recompute_s + loaded.unpriced_tokens * token_s - loaded.spent_s
        self._counts["seconds_saved"] += max(saved_s, 0.0)  # type: ignore[assignment]  # a Counter may count seconds
        return saved_s

    # -------------------------------------------------------------------------------------------------- saving

    def is_quiet(self, new_tokens: Mapping[str, int]) -> bool:
        """Whether `plan_step` would give an empty plan. To be asked once, before it, for every step of the engine.

        Parameters
        ----------
        new_tokens : that the step computes, for each request.
        """
        has_passed = self._due.passes(new_tokens)
        return has_passed and not self._fusing and not says_much(new_tokens) and self._plan.is_empty

    def plan_step(self, scheduled: Iterable[Scheduled], *, is_idle: bool = False) -> StepPlan:
        """The plan of the step, saves of every chunk that it completes included. One fusion advances at a time."""
        new_tokens = {}
        for each in scheduled:
            new_tokens[each.request_id] = each.new_tokens
            request = self._tracked.get(each.request_id)
            if request is not None and request.options.save:
                self._plan_saves(request, each)
        ready = (name for name, masks in self._fusing.items() if len(masks) == len(self._specs))
        if (first := next(ready, None)) is not None:
            found = tuple(all(ranks) for ranks in zip(*self._fusing[first], strict=True))
            self._plan.advances.append(Advance(first, found))
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

    def _plan_saves(self, request: _Tracked, each: Scheduled) -> None:
        chunk_tokens = self._settings.chunk_tokens
        # Behind the known tokens lie placeholders of steps that are still under way.
        known = min(each.computed_tokens, len(request.token_ids))
        count = (known if request.inexact is None else min(known, request.inexact)) // chunk_tokens
        if count > request.saved_chunks:
            self._extend_keys(request)
            for chunk in range(request.saved_chunks, count):
                keys = tuple(keys[chunk] for keys in request.keys)
                after = tuple(keys[chunk - 1] for keys in request.keys) if chunk else None
                start, stop = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
                self._save(each.request_id, each.blocks, keys, after, start, stop, is_prefix=True)
            request.saved_chunks = count
        for document in request.alone:
            if document.stop <= known:
                self._save(
                    each.request_id, each.blocks, document.keys, None, document.start, document.stop, is_prefix=False
                )
                if self._known is not None:
                    token_ids = np.asarray(request.token_ids[document.start : document.stop], dtype=np.int64)
                    self._known.add(token_ids, document.keys[0])
                request.alone = ()
        # Drafted tokens may yet be accepted, beyond those that count as computed.
        self._due.expect(each.request_id, self._next_save(request) - each.computed_tokens - each.new_tokens)

    def _next_save(self, request: _Tracked) -> int:
        """How many tokens have to be computed before it is worth looking."""
        stop = (request.saved_chunks + 1) * self._settings.chunk_tokens
        stops = [document.stop for document in request.alone]
        if request.inexact is None or stop <= request.inexact:
            stops.append(stop)
        return min(stops, default=_NEVER)

    def _fused_of(self, request: _Tracked, local: int) -> Fused:
        """Of a request that gets nothing from us, as the engine has `local` tokens of it and computes the rest."""
        if request.inexact is None or local <= request.inexact:
            return "no"
        stop = request.documents[-1].stop
        return "yes" if local >= stop - stop % self._block_tokens else "partly"

    def _save(
        self,
        request_id: str,
        blocks: Sequence[int],
        keys: tuple[ChunkKey, ...],
        after: tuple[ChunkKey, ...] | None,
        start: int,
        stop: int,
        *,
        is_prefix: bool,
    ) -> None:
        request = self._tracked[request_id]
        first, last = start // self._block_tokens, -(-stop // self._block_tokens)
        token_ids = np.asarray(request.token_ids[start:stop], dtype=np.int64)
        token_s = self._pace.token_s(request_id)
        cost_s = None if token_s is None else token_s * len(token_ids)
        row = tuple(blocks[first:last])
        self._plan.saves.append(Save(keys, after, token_ids, start, row, cost_s, request_id, is_prefix))
        request.planned_saves += 1

    # --------------------------------------------------------------------------------------------------- keys

    def _stored_spans(self, request_id: str, token_ids: Sequence[int], salt: bytes) -> tuple[tuple[int, int], ...]:
        """Where stored documents stand in a prompt that names none."""
        if self._known is None:
            return ()
        row, lead_ids, ask = np.asarray(token_ids[:], dtype=np.int64), self._settings.lead_ids, self._ask

        def key_of(start: int, stop: int) -> ChunkKey:
            return content_key(self._specs[0], row[start:stop], lead_ids=lead_ids, salt=salt)

        def is_stored(key: ChunkKey) -> bool:  # workers elsewhere tell when they fetch it
            return ask is None or bool(ask(LookUp(request_id, ((key,),))))

        return tuple(self._known.find(row, key_of, is_stored))

    def _content_keys(self, token_ids: Sequence[int], salt: bytes) -> tuple[ChunkKey, ...]:
        lead_ids = self._settings.lead_ids
        return tuple(content_key(spec, token_ids, lead_ids=lead_ids, salt=salt) for spec in self._specs)

    def _extend_keys(self, request: _Tracked) -> None:
        chunk_tokens = self._settings.chunk_tokens
        done, whole = len(request.keys[0]), len(request.token_ids) // chunk_tokens
        if done < whole:
            token_ids = np.asarray(request.token_ids[done * chunk_tokens : whole * chunk_tokens], dtype=np.int64)
            for spec, keys in zip(self._specs, request.keys, strict=True):
                after = keys[-1] if keys else None
                keys += prefix_keys(spec, token_ids, chunk_tokens=chunk_tokens, salt=request.salt, after=after)


def _framed(part: bytes) -> bytes:
    return len(part).to_bytes(8, "little") + part


def _either(before: Fused | None, now: Fused) -> Fused:
    """Of a request that was taken up again: its tokens so far came of `before`."""
    return now if before is None or before == now else "partly"
