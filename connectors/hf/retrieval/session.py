"""Decoding with retrieval, turn after turn: a batch of sequences, their prompts and their answers."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

try:
    from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
except ImportError as error:
    raise ImportError(
        'kvloom.connectors.hf.retrieval.session needs transformers: pip install "kvloom[transformers]"'
    ) from error

from ....core import ChunkKey
from ....errors import EngineError
from ..generation import GenerationCall, cache_argument, generation_call
from ..prompts import Prompts, TokenIds, positive_count, prompt_rows, token_ids
from ..tokenization import Tokenization
from .attention import RetrievalCache, with_retrieval
from .chunks import SequenceCounts
from .plan import RetrievalPlan
from .sequence import DecodedSequence, TokenSpan

SLICE_TOKENS = 1024  # of a prompt, computed at once


@dataclass(frozen=True, slots=True)
class Generated:
    """The answers of a turn.

    Attributes
    ----------
    token_ids : new tokens of each sequence, its end token included.
    texts : the same as text, without special tokens.
    explanations : for each sequence, whether attention was dense or retrieved, and why.
    counts : for each sequence, since the session began.
    """

    token_ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]
    explanations: tuple[str, ...]
    counts: tuple[SequenceCounts, ...]


class _TokenRecorder(StoppingCriteria):
    """Appends decoded tokens to their sequences, and marks sequences that have ended by any criterion."""

    def __init__(self, sequences: Sequence[DecodedSequence], call: GenerationCall) -> None:
        self._sequences, self._call = sequences, call

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        tokens = input_ids[:, -1]
        ended = torch.isin(tokens, torch.tensor(self._call.end_ids, dtype=tokens.dtype, device=tokens.device))
        for criterion in self._call.criteria:
            ended = ended | criterion(input_ids, scores, **options)
        for sequence, token, has_ended in zip(self._sequences, tokens.tolist(), ended.tolist(), strict=True):
            if not sequence.is_done:
                sequence.ids.append(token)
                sequence.is_done = has_ended
        return ended


class Session:
    """A conversation, or several side by side. Not to be used from two threads at once; `close` it.

    A turn that fails or is interrupted in the middle ends the session: further turns raise `EngineError`, and its
    `token_ids` can begin another one.

    Parameters
    ----------
    plan : how its sequences are decoded.
    tokenization, lead_ids : make token ids of a text; the lead tokens precede the first one.
    max_tokens, vocabulary : of the model: longest context, number of token ids.
    is_length_bound : tokens beyond `max_tokens` would be computed with another rope table, so that none may be decoded.

    Attributes
    ----------
    sequences : of this session, in the order of their prompts.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: RetrievalPlan,
        tokenization: Tokenization,
        *,
        lead_ids: Sequence[int],
        max_tokens: int,
        vocabulary: int,
        is_length_bound: bool = False,
    ) -> None:
        self._model, self.plan = model, plan
        self._is_length_bound = is_length_bound
        self._tokenization, self._lead_ids = tokenization, list(lead_ids)
        self._max_tokens, self._vocabulary = max_tokens, vocabulary
        self.sequences: list[DecodedSequence] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvloom-index")
        self._is_released = self._is_broken = False
        # A session that nobody closes, since an interrupt came before `with`, unpins when it is garbage-collected.
        self._finalizer = weakref.finalize(self, _release, self._worker, self.sequences)
        self._finalizer.atexit = False

    @torch.inference_mode(False)
    @torch.no_grad()
    def resume(self, history: Iterable[TokenIds]) -> None:
        """Begin with what was said before: token ids of each sequence.

        The store's part of them is not computed again; after `save`, that is all.
        """
        if not isinstance(history, Iterable):
            raise TypeError(f"history is of type {type(history).__name__}; expected token ids of each sequence")
        rows = [token_ids(ids, f"history[{i}]", vocabulary=self._vocabulary) for i, ids in enumerate(history)]
        for i, ids in enumerate(rows):
            self._expect_room(len(ids), f"history[{i}]")
        self._open(len(rows))
        for sequence, ids in zip(self.sequences, rows, strict=True):
            self._extend(sequence, ids)

    @torch.inference_mode(False)
    @torch.no_grad()
    def start_with(self, token_ids: Tensor, keys: Tensor, values: Tensor, origin: str) -> None:
        """Begin one sequence with tokens that were computed elsewhere, see `DecodedSequence.start_with`."""
        self._open(1)
        self.sequences[0].start_with(token_ids, keys, values, origin)

    @property
    def token_ids(self) -> list[list[int]]:
        """Everything said so far, of each sequence."""
        return [list(sequence.ids) for sequence in self.sequences]

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(self, prompts: Prompts, *, max_new_tokens: int = 64, **options: Any) -> Generated:
        """The next turn: prompts are computed densely, in slices, then answers are decoded.

        Parameters
        ----------
        prompts : for each sequence a text or token ids; one alone for one sequence. See `prompt_rows`.
        options : for `model.generate`, see `generation_call`; greedy unless they ask for something else.

        Raises
        ------
        TypeError : prompts or an option of the wrong type.
        ValueError : another number of prompts than last time, an empty one, or more tokens than the model's context; an
            option that does not work here; keys or queries that are not finite.
        EngineError : the session is closed or failed before, or something else changed the model or its attention
            meanwhile.
        """
        self._expect_usable()
        self.plan.expect_unchanged()
        max_new_tokens = positive_count(max_new_tokens, "max_new_tokens")
        rows = prompt_rows(prompts, vocabulary=self._vocabulary)
        known = self.token_ids or [[] for _ in rows]
        if len(rows) != len(known):
            raise ValueError(f"{len(rows)} prompts for {len(known)} sequences; expected one for each")
        new = [self._ids(row, before, i) for i, (row, before) in enumerate(zip(rows, known, strict=True))]
        longest = max((len(before) + len(row) for row, before in zip(new, known, strict=True)), default=0)
        if self._is_length_bound and longest + max_new_tokens > self._max_tokens:
            raise ValueError(
                f"prompt and answer may take {longest + max_new_tokens} tokens; from {self._max_tokens} on the model "
                "rotates with another table, so that earlier keys are of no use: give fewer max_new_tokens"
            )
        call = generation_call(self._model, self._tokenization.tokenizer, options, max_new_tokens=max_new_tokens)
        self._is_broken = True  # until this turn is complete
        if not self.sequences:
            self._open(len(rows))
        for sequence, ids in zip(self.sequences, new, strict=True):
            self._extend(sequence, ids)
        starts = [len(sequence.ids) for sequence in self.sequences]
        for sequence in self.sequences:
            sequence.begin_answer()
        self._answer(call)
        self._is_broken = False
        answers = tuple(tuple(s.ids[start:]) for s, start in zip(self.sequences, starts, strict=True))
        return Generated(
            answers,
            tuple(map(self._tokenization.decode, answers)),
            tuple(sequence.explain() for sequence in self.sequences),
            tuple(sequence.counts for sequence in self.sequences),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def save(self) -> list[ChunkKey]:
        """Store all that `resume` needs to go on elsewhere without computing anything again.

        Raises
        ------
        TierError : no tier takes it.
        EngineError : the session is closed or failed before.
        """
        self._expect_usable()
        return [sequence.save() for sequence in self.sequences]

    def close(self) -> None:
        """Unpin what the session uses of the store. May be called again, also after an interrupt of this call."""
        try:
            self._release()
        finally:
            self._release()  # completes what a Ctrl-C cut short; otherwise does nothing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _release(self) -> None:
        if not self._is_released:
            for sequence in self.sequences:
                sequence.close()
            self._is_released = True
        self._worker.shutdown()
        self._finalizer.detach()

    # ------------------------------------------------------------------------------------------------- prompts

    def _expect_usable(self) -> None:
        if self._is_released:
            raise EngineError("this session is closed; begin another, with its `token_ids` as history")
        if self._is_broken:
            raise EngineError("this session failed in the middle of a turn; begin another, with its `token_ids`")

    def _ids(self, row: str | list[int], before: Sequence[int], place: int) -> list[int]:
        """Token ids of a prompt behind those said before."""
        if isinstance(row, str):
            row = [*([] if before else self._lead_ids), *self._tokenization.encode_text(row)]
        if not row and not before:
            raise ValueError(f"prompts[{place}] is empty; give at least one token")
        self._expect_room(len(before) + len(row), f"sequence {place}")
        return row

    def _expect_room(self, tokens: int, name: str) -> None:
        if tokens >= self._max_tokens:
            raise ValueError(f"{name} has {tokens} tokens, the model's context {self._max_tokens}; shorten it")

    def _open(self, count: int) -> None:
        self.sequences.extend(DecodedSequence(self.plan, self._worker) for _ in range(count))

    def _extend(self, sequence: DecodedSequence, ids: Sequence[int]) -> None:
        """Compute all but the last token of a sequence that goes on with `ids`."""
        is_new = not sequence.ids
        sequence.ids += ids
        sequence.is_done = False
        spans = sequence.resume() if is_new else [TokenSpan(sequence.length, len(sequence.ids) - 1, False)]
        if any(span.start < span.stop for span in spans):
            with_retrieval(self._model, lambda: self._compute(sequence, spans))

    def _compute(self, sequence: DecodedSequence, spans: Sequence[TokenSpan]) -> None:
        for span in spans:
            sequence.dense_until = span.start if span.is_sparse else span.stop
            step = 1 if span.is_sparse else SLICE_TOKENS
            for start in range(span.start, span.stop, step):
                self._forward(sequence, start, min(start + step, span.stop))

    def _forward(self, sequence: DecodedSequence, start: int, stop: int) -> None:
        device = self.plan.device
        began_s = time.perf_counter()
        cache = RetrievalCache([sequence], self.plan.spec.num_layers)
        self._model.get_decoder()(
            input_ids=torch.tensor([sequence.ids[start:stop]], device=device),
            position_ids=torch.arange(start, stop, device=device)[None],
            use_cache=True,
            **{cache_argument(): cache},
        )
        cache.expect_end()
        sequence.counts.computed_tokens += stop - start
        if self.plan.choice.decides:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            self.plan.choice.observe_prefill(stop - start, (start + stop) / 2, time.perf_counter() - began_s)

    # ------------------------------------------------------------------------------------------------- answers

    def _answer(self, call: GenerationCall) -> None:
        """Decode the next tokens of all sequences, from the last token of each on."""
        longest = max(len(sequence.ids) for sequence in self.sequences)
        # In front of a shorter row stands its own first token: penalties meet no token that the row does not have.
        rows = [[s.ids[0]] * (longest - len(s.ids)) + s.ids for s in self.sequences]
        mask = [[0] * (longest - len(s.ids)) + [1] * len(s.ids) for s in self.sequences]
        device = self.plan.device
        cache = RetrievalCache(self.sequences, self.plan.spec.num_layers)
        recorder = StoppingCriteriaList([_TokenRecorder(self.sequences, call)])

        def decode() -> None:
            call.run(
                self._model,
                cache,
                recorder,
                input_ids=torch.tensor(rows, device=device),
                attention_mask=torch.tensor(mask, device=device),
            )
            cache.expect_end()

        with_retrieval(self._model, decode)


def _release(worker: Executor, sequences: Sequence[DecodedSequence]) -> None:
    """Unpin what a lost session used, without waiting."""
    for sequence in sequences:
        sequence.close()
    worker.shutdown(wait=False)
