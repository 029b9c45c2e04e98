"""Decoding with retrieval, turn after turn: a batch of sequences, their prompts and their answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

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
from .attention import RetrievalCache, retrieving
from .plan import Counts, Plan, Segment
from .sequence import Context

Prompt: TypeAlias = "str | Sequence[int]"

SLICE_TOKENS = 1024  # of a prompt, computed at once


@dataclass(frozen=True, slots=True)
class Generated:
    """What a turn gave.

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
    counts: tuple[Counts, ...]


class _Follow(StoppingCriteria):
    """Tells contexts what was decoded, and which of them are through. Stops nothing itself."""

    def __init__(self, contexts: Sequence[Context], end_ids: Sequence[int]) -> None:
        self._contexts, self._end_ids = contexts, end_ids

    def __call__(self, input_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        for context, token in zip(self._contexts, input_ids[:, -1].tolist(), strict=True):
            if not context.is_done:
                context.ids.append(token)
                context.is_done = token in self._end_ids
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Session:
    """A conversation, or several side by side. Not to be used from two threads at once; `close` it.

    Parameters
    ----------
    plan : how its sequences are decoded.
    encode : token ids of a prompt; the flag says whether it is the first.
    decode : text of token ids.
    history : what was said before, in tokens, for each sequence: taken from the store as far as it is there, and
        otherwise computed again. `save` makes it whole.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        plan: Plan,
        *,
        encode: Callable[[str, bool], Sequence[int]],
        decode: Callable[[Sequence[int]], str],
        max_tokens: int,
        history: Sequence[Sequence[int]] = (),
    ) -> None:
        self._model, self.plan = model, plan
        self._encode, self._decode, self._max_tokens = encode, decode, max_tokens
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvloom-index")
        self._contexts: list[Context] = []
        self._is_broken = False
        if history:
            self._take_up(history)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take_up(self, history: Sequence[Sequence[int]]) -> None:
        for ids in history:
            self._expect_room(len(ids))
        self._open(len(history))
        for context, ids in zip(self._contexts, history, strict=True):
            self._extend(context, list(ids))

    @torch.inference_mode(False)
    @torch.no_grad()
    def begin_with(self, token_ids: Tensor, keys: Tensor, values: Tensor, origin: str) -> None:
        """One sequence begins with tokens that were fused elsewhere; see `Context.adopt`."""
        self._open(1)
        self._contexts[0].adopt(token_ids, keys, values, origin)

    @property
    def token_ids(self) -> list[list[int]]:
        """Everything said so far, of each sequence."""
        return [list(context.ids) for context in self._contexts]

    @torch.inference_mode(False)
    @torch.no_grad()
    def generate(self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 64, **options: Any) -> Generated:
        """The next turn: prompts are computed densely, in slices, then answers are decoded.

        Parameters
        ----------
        prompts : for each sequence a text or token ids; one alone for one sequence.
        options : for `model.generate`; greedy unless they say otherwise. Beams are not supported.

        Raises
        ------
        ValueError : another number of prompts than last time, an empty one, or more tokens than the model's context;
            keys or queries that are not finite.
        EngineError : the session has failed before, or something else changed the model meanwhile, or its attention.
        """
        if self._is_broken:
            raise EngineError("this session failed in the middle of a turn; begin another, with its `token_ids`")
        self.plan.expect_unchanged()
        rows = self._rows(prompts)
        if not self._contexts:
            self._open(len(rows))
        if len(rows) != len(self._contexts):
            raise ValueError(f"{len(rows)} prompts for {len(self._contexts)} sequences; expected one for each")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        encoded = [self._ids(row, context) for row, context in zip(rows, self._contexts, strict=True)]
        self._is_broken = True  # until this turn is through
        for context, ids in zip(self._contexts, encoded, strict=True):
            self._extend(context, ids)
        starts = [len(context.ids) for context in self._contexts]
        for context in self._contexts:
            context.begin_answer()
        self._answer(max_new_tokens, options)
        self._is_broken = False
        answers = tuple(tuple(c.ids[start:]) for c, start in zip(self._contexts, starts, strict=True))
        return Generated(
            answers,
            tuple(map(self._decode, answers)),
            tuple(context.explain() for context in self._contexts),
            tuple(context.counts for context in self._contexts),
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def save(self) -> list[ChunkKey]:
        """Stores all that `history` needs to take the session up elsewhere without computing anything again.

        Raises
        ------
        TierError : no tier takes it.
        """
        return [context.save() for context in self._contexts]

    def close(self) -> None:
        """Lets go of what it holds of the store."""
        for context in self._contexts:
            context.close()
        self._worker.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------- prompts

    def _rows(self, prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
        if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
            return [prompts]  # type: ignore[list-item]
        return list(prompts)  # type: ignore[arg-type]

    def _ids(self, prompt: Prompt, context: Context) -> list[int]:
        ids = list(self._encode(prompt, not context.ids)) if isinstance(prompt, str) else list(map(int, prompt))
        if not ids and not context.ids:
            raise ValueError("a prompt is empty; give at least one token")
        self._expect_room(len(context.ids) + len(ids))
        return ids

    def _expect_room(self, tokens: int) -> None:
        if tokens >= self._max_tokens:
            raise ValueError(f"a sequence has {tokens} tokens, the model's context {self._max_tokens}; shorten it")

    def _open(self, count: int) -> None:
        if not count:
            raise ValueError("prompts are empty; give at least one")
        self._contexts = [Context(self.plan, self._worker) for _ in range(count)]

    def _extend(self, context: Context, ids: Sequence[int]) -> None:
        """Computes all but the last token of a context that goes on with `ids`."""
        is_new = not context.ids
        context.ids += ids
        context.is_done = False
        todo = context.take_up() if is_new else [Segment(context.length, len(context.ids) - 1, False)]
        if not any(segment.start < segment.stop for segment in todo):
            return
        with retrieving(self._model):
            for segment in todo:
                context.dense_until = segment.start if segment.is_sparse else segment.stop
                step = 1 if segment.is_sparse else SLICE_TOKENS
                for start in range(segment.start, segment.stop, step):
                    self._compute(context, start, min(start + step, segment.stop))

    def _compute(self, context: Context, start: int, stop: int) -> None:
        device = self.plan.device
        cache = RetrievalCache([context], self.plan.spec.num_layers)
        self._model.model(
            input_ids=torch.tensor([context.ids[start:stop]], device=device),
            position_ids=torch.arange(start, stop, device=device)[None],
            past_key_values=cache,
            use_cache=True,
        )
        cache.expect_end()
        context.counts.computed_tokens += stop - start

    # ------------------------------------------------------------------------------------------------- answers

    def _answer(self, max_new_tokens: int, options: dict[str, Any]) -> None:
        ends = options.get("eos_token_id", self._model.generation_config.eos_token_id)
        end_ids = [] if ends is None else ends if isinstance(ends, list) else [ends]
        pad = options.pop("pad_token_id", end_ids[0] if end_ids else 0)
        longest = max(len(context.ids) for context in self._contexts)
        input_ids = torch.full((len(self._contexts), longest), pad)
        mask = torch.zeros_like(input_ids)
        for row, context in enumerate(self._contexts):
            input_ids[row, longest - len(context.ids) :] = torch.tensor(context.ids)
            mask[row, longest - len(context.ids) :] = 1
        criteria = StoppingCriteriaList([_Follow(self._contexts, end_ids), *options.pop("stopping_criteria", ())])
        cache = RetrievalCache(self._contexts, self.plan.spec.num_layers)
        with retrieving(self._model):
            self._model.generate(  # type: ignore[operator]
                input_ids=input_ids.to(self.plan.device),
                attention_mask=mask.to(self.plan.device),
                past_key_values=cache,
                max_new_tokens=max_new_tokens,
                stopping_criteria=criteria,
                pad_token_id=pad,
                **{"do_sample": False, **options},
            )
            cache.expect_end()
