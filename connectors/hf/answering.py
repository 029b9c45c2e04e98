"""Answers over fused documents: tokens as they come, what the cache has saved, and several questions in one batch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ..identity.requests import cut_chat

if TYPE_CHECKING:
    from .connector import FusedContext, TransformersConnector

Finish: TypeAlias = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen: greedy at temperature 0."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prompt:
    """What stands behind the documents, and what of a chat stands in front of them (a system message, for instance)."""

    text: str
    before: str = ""


@dataclass(slots=True)
class Usage:
    """What an answer took. Reused tokens were loaded, recomputed ones were documents' and computed here.

    Attributes
    ----------
    saved_s : seconds that computing the reused documents took once, less what fusing them took now; 0 if that is more.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reused_tokens: int = 0
    recomputed_tokens: int = 0
    saved_s: float = 0.0
    prompt_s: float = 0.0


@dataclass(eq=False)
class Generation:
    """A request for an answer, as the engine's thread serves it; `cancel` from any thread ends it at the next token."""

    connector: Callable[[], TransformersConnector]
    documents: Sequence[str]
    prompt: Prompt
    sampling: Sampling
    on_text: Callable[[str], None] = lambda _: None
    usage: Usage = field(default_factory=Usage)
    finish: Finish = "stop"
    is_exact: bool = True
    cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        self.cancelled.set()

    def run(self) -> str:
        """The answer. Only for the engine's thread.

        Raises
        ------
        ValueError : the prompt or a document cannot be used, or all is longer than the model's context.
        """
        import torch

        from ..identity.requests import lead_of
        from .generation import generation_call

        connector = self.connector()
        model, tokenizer = connector.model, connector.tokenizer
        began_s = time.perf_counter()
        if self.documents:
            inputs, cache = connector.as_inputs(*self.fused())
        else:
            ids = [*lead_of(tokenizer), *connector.encode_question(self.prompt.before + self.prompt.text)]
            if not ids:
                raise ValueError("the prompt is empty")
            row = torch.tensor([ids], device=model.device)
            inputs, cache = {"input_ids": row, "attention_mask": torch.ones_like(row)}, None
        self.usage.prompt_tokens = inputs["input_ids"].shape[1]
        room = connector.layers.max_tokens - self.usage.prompt_tokens
        if room < 1:
            raise ValueError(f"the prompt has {self.usage.prompt_tokens} tokens, which leaves no room for an answer")
        most = min(self.sampling.max_tokens, room)
        text = _Text(tokenizer, self.sampling.stop, self.on_text, self.cancelled.is_set, began_s)
        options: dict[str, Any] = {"stopping_criteria": [_stopping(text)], "streamer": _streamer(text)}
        if self.sampling.temperature > 0:
            options |= {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
            if self.sampling.seed is not None:
                torch.manual_seed(self.sampling.seed)
        call = generation_call(model, tokenizer, options, max_new_tokens=most)
        output = call.run(model, cache, call.criteria, **inputs)
        new_ids = output[0, self.usage.prompt_tokens :].tolist()
        self.usage.completion_tokens = len(new_ids)
        self.usage.prompt_s = (text.first_s or time.perf_counter()) - began_s
        self.finish = (
            "cancelled"
            if self.cancelled.is_set()
            else "stop"
            if text.is_stopped or (new_ids and new_ids[-1] in call.end_ids)
            else "length"
        )
        return text.finish(drop_last=bool(new_ids) and new_ids[-1] in call.end_ids)

    def _opening(self, text: str) -> list[int]:
        """Token ids of what a prompt begins with: the lead tokens if the text is theirs or empty, otherwise its own,
        behind the BOS where the lead has one.
        """
        connector = self.connector()
        lead = list(connector.lead_ids)
        ids: list[int] = connector.encode_question(text) if text else []
        bos = connector.tokenizer.bos_token_id
        if lead and lead[0] == bos and ids[:1] != [bos]:
            ids.insert(0, bos)
        return lead if not text else ids

    def fused(self) -> tuple[FusedContext, list[int]]:
        """The documents, fused, and the token ids that follow them; `usage` and `is_exact` say what that took."""
        connector = self.connector()
        encoded = [connector.encode_document(text) for text in self.documents]
        opening = self._opening(self.prompt.before)
        question_ids = connector.encode_question(self.prompt.text)
        if not question_ids:
            raise ValueError("the prompt is empty; at least one token must follow the documents")
        total = len(opening) + sum(map(len, encoded)) + len(question_ids)
        if total > connector.layers.max_tokens:
            raise ValueError(
                f"documents and prompt have {total} tokens, the model's context {connector.layers.max_tokens}"
            )
        began_s = time.perf_counter()
        context = connector.fuse(encoded, opening_ids=opening, question_ids=question_ids)
        spent_s = time.perf_counter() - began_s
        documents_tokens = sum(map(len, encoded))
        computed = context.computed_tokens - context.blended.asked_tokens  # the question is no document
        self.usage.recomputed_tokens = min(documents_tokens, round(computed))
        self.usage.reused_tokens = documents_tokens - self.usage.recomputed_tokens
        self.usage.saved_s = max(0.0, context.stored_s - spent_s)
        self.is_exact = context.is_exact
        return context, question_ids


def answer_together(generations: Sequence[Generation], *, batch_tokens: int = 16384) -> list[str]:
    """Greedy answers to several questions, decoded in batches; each is what the question gets alone.

    Layers with a sliding window count positions by columns, which padding shifts: such models answer one by one.

    Parameters
    ----------
    generations : of one connector, with documents and at temperature 0; nothing is streamed. `usage` and `finish` of
        each are set; `prompt_s` is the batch's.
    batch_tokens : a batch holds contexts of at most this many tokens, padding included.

    Raises
    ------
    ValueError : a prompt or document cannot be used, or a temperature is not 0.
    """
    import torch

    from .batching import padded_batch
    from .generation import generation_call

    if wrong := [each.sampling.temperature for each in generations if each.sampling.temperature > 0]:
        raise ValueError(f"temperature is {wrong[0]}; several questions are answered greedily")
    texts: list[str] = [""] * len(generations)
    if not generations:
        return texts
    connector = generations[0].connector()
    if any(window is not None for window in connector.layers.window_tokens):
        return [each.run() for each in generations]
    model, tokenizer = connector.model, connector.tokenizer
    for batch in _batches([sum(map(len, each.documents)) for each in generations], batch_tokens):
        began_s = time.perf_counter()
        rows = [generations[i].fused() for i in batch]
        prompt_tokens = [len(context.token_ids) + len(question) for context, question in rows]
        room = connector.layers.max_tokens - max(prompt_tokens)
        most = max(min(generations[i].sampling.max_tokens, room) for i in batch)
        if most < 1:
            raise ValueError(f"a prompt has {max(prompt_tokens)} tokens, which leaves no room for an answer")
        call = generation_call(model, tokenizer, {}, max_new_tokens=most)
        pad_id = call.config.pad_token_id or 0
        inputs, cache = padded_batch(rows, pad_id=pad_id)
        watch = [_Text(tokenizer, generations[i].sampling.stop, lambda _: None, lambda: False, began_s) for i in batch]
        columns = inputs["input_ids"].shape[1]
        limits = [generations[i].sampling.max_tokens for i in batch]
        criteria = [*call.criteria, _stopping_rows(watch, limits, columns)]
        with torch.no_grad():
            output = call.run(model, cache, type(call.criteria)(criteria), **inputs)
        for row, i in enumerate(batch):
            generation, text = generations[i], watch[row]
            new_ids = output[row, columns:].tolist()[: generation.sampling.max_tokens]
            end = next((at for at, token in enumerate(new_ids) if token in call.end_ids), None)
            new_ids = new_ids if end is None else new_ids[: end + 1]
            text.set(new_ids if end is None else new_ids[:-1])
            texts[i] = text.finish(drop_last=False)
            generation.usage.prompt_tokens = prompt_tokens[row]
            generation.usage.completion_tokens = len(new_ids)
            generation.usage.prompt_s = (text.first_s or time.perf_counter()) - began_s
            generation.finish = "stop" if end is not None or text.is_stopped else "length"
    return texts


def _batches(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Indices by size, similar ones together, so that little is padding; characters stand for tokens, three to one."""
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if batches and (len(batches[-1]) + 1) * max(1, sizes[batches[-1][0]] // 3) <= most:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


class _Text:
    """Text from token ids: what is told as soon as it cannot change any more, up to a stop string."""

    def __init__(
        self,
        tokenizer: Any,
        stop: Sequence[str],
        on_text: Callable[[str], None],
        is_cancelled: Callable[[], bool],
        began_s: float,
    ) -> None:
        self._tokenizer, self._stop, self._on_text, self._is_cancelled = tokenizer, stop, on_text, is_cancelled
        self._began_s = began_s
        self._ids: list[int] = []
        self._told = 0
        self._text = ""
        self.first_s: float | None = None
        self.is_stopped = False

    @property
    def ends(self) -> bool:
        return self.is_stopped or self._is_cancelled()

    def add(self, ids: Sequence[int]) -> None:
        self.first_s = self.first_s or time.perf_counter()
        self._ids += ids
        self._update(self._ids)
        held = max((len(each) - 1 for each in self._stop), default=0)  # what may be the start of a stop string
        if not self._text.endswith("\ufffd"):  # the rest of a character is still to come
            self._tell(len(self._text) if self.is_stopped else len(self._text) - held)

    def set(self, ids: Sequence[int]) -> None:
        """These are all tokens, whatever was added before."""
        self._ids, self.is_stopped = list(ids), False
        self._update(self._ids)

    def finish(self, *, drop_last: bool) -> str:
        """The whole text; an end token is none of it."""
        if not self.is_stopped:
            self._update(self._ids[:-1] if drop_last else self._ids)
        self._tell(len(self._text))
        return self._text

    def _update(self, ids: Sequence[int]) -> None:
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        cuts = [at for at in (text.find(each) for each in self._stop) if at >= 0]
        if cuts:
            text, self.is_stopped = text[: min(cuts)], True
        self._text = text

    def _tell(self, stop: int) -> None:
        if stop > self._told:
            self._on_text(self._text[self._told : stop])
            self._told = stop


def _streamer(text: _Text) -> Any:
    from transformers.generation.streamers import BaseStreamer

    class Streamer(BaseStreamer):
        """Gives new tokens on; the first call brings the prompt."""

        def __init__(self) -> None:
            self._is_prompt = True

        def put(self, value: Any) -> None:
            if self._is_prompt:
                self._is_prompt = False
                return
            text.add(value.reshape(-1).tolist())

        def end(self) -> None:
            """Nothing is held back here."""

    return Streamer()


def _stopping(text: _Text) -> Any:
    import torch
    from transformers import StoppingCriteria

    class Stopping(StoppingCriteria):
        """Ends after a stop string, or when nobody waits for the answer any more."""

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            del scores
            return torch.full((input_ids.shape[0],), text.ends, dtype=torch.bool, device=input_ids.device)

    return Stopping()


def _stopping_rows(watch: Sequence[_Text], limits: Sequence[int], columns: int) -> Any:
    """Ends each row of a batch after its stop string or its number of tokens; the prompt has `columns` tokens."""
    import torch
    from transformers import StoppingCriteria

    class Stopping(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            del scores
            ends = []
            for text, limit, row in zip(watch, limits, input_ids[:, columns:].tolist(), strict=True):
                if not text.is_stopped and len(row) <= limit:
                    text.add(row[-1:])
                ends.append(text.ends or len(row) >= limit)
            return torch.tensor(ends, dtype=torch.bool, device=input_ids.device)

    return Stopping()


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, str]], *, has_documents: bool) -> Prompt:
    """A chat as the model's template writes it, cut where documents belong: in front of the first user's words.

    Whole where it cannot be cut; without a template, the messages one below the other. Only for the engine's thread.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Prompt("\n".join(message["content"] for message in messages))
    bos = getattr(tokenizer, "bos_token", None) or ""
    cut = cut_chat(tokenizer, messages) if has_documents else None
    if cut is None:
        text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        return Prompt(text.removeprefix(bos))
    before, behind = cut
    return Prompt(behind, before.removeprefix(bos))
