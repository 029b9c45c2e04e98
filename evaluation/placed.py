"""Questions over fused documents in the memory of the model's device: quality without a store, fast enough for many.

Every method starts from the same documents, computed alone once for each context, about which many questions are asked.
`fused_answers` measures what answering takes, with a store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..blend.blender import BlendedContext, Blender
from ..connectors.hf.model import TransformersModel
from ..connectors.hf.prefill import Prefill
from .answers import Answer, cached_logits, context_kv, score_answer
from .questions import Question


@dataclass(frozen=True, slots=True, eq=False)
class PlacedDocuments:
    """The `LayerSource` of a question's documents, each computed alone behind the lead and moved to its place.

    Attributes
    ----------
    keys, values : `[L, H, S, D]` and `[L, H, S, Dv]`, lead included.
    starts : of the lead, if there is one, and of every document.
    exact_tokens : the lead and the first document.
    """

    keys: Tensor
    values: Tensor
    starts: tuple[int, ...]
    exact_tokens: int

    def load(self, layer: int, keys: Tensor, values: Tensor) -> None:
        keys.copy_(self.keys[layer, :, : keys.shape[1]])
        values.copy_(self.values[layer, :, : values.shape[1]])


@dataclass(frozen=True, slots=True)
class MeasuredMethod:
    """One way of fusing, over all questions, in their order.

    Attributes
    ----------
    answers : scores beside full prefill's.
    computed_ratio : share of the context's tokens that ran through a layer, mean over layers and questions; the
        question that is asked for the choice included.
    """

    name: str
    answers: tuple[Answer, ...]
    computed_ratio: float


class FusionBed:
    """Answers questions over fused documents.

    Parameters
    ----------
    model : a causal language model, on any device.
    model_id : names the weights, as for `TransformersModel`.
    """

    def __init__(self, model: PreTrainedModel, *, model_id: str | None = None) -> None:
        self.model = model
        self.layers = TransformersModel(model, model_id=model_id)

    @torch.no_grad()
    def place(self, question: Question) -> PlacedDocuments:
        """Compute each document of a question alone, and move it to its place."""
        layers, lead = self.layers, question.lead
        prefill = Prefill(layers, lead_ids=lead, pack_tokens=1, to_device=None)
        chunks = prefill.behind_lead(question.documents)
        starts = list(accumulate(map(len, question.documents[:-1]), initial=len(lead)))
        keys, values = [], []
        if lead:
            first = prefill.lead()
            keys.append(first.keys)
            values.append(first.values)
        for chunk, start in zip(chunks, starts, strict=True):
            moved = torch.full((len(chunk),), start - len(lead))
            keys.append(layers.spec.shift(chunk.keys, moved))
            values.append(chunk.values)
        exact = len(lead) + len(question.documents[0])
        all_starts = (0, *starts) if lead else tuple(starts)
        return PlacedDocuments(torch.cat(keys, dim=2), torch.cat(values, dim=2), all_starts, exact)

    def fused_logits(
        self, questions: Sequence[Question], placed: PlacedDocuments, blender: Blender
    ) -> tuple[list[Tensor], float]:
        """Distributions `[A, V]` of the answers' tokens over fusions of one context, and the mean share of the context
        computed for one.

        A fusion for which no question was asked serves all of them.
        """
        blended = self._blended(questions[0], placed, blender)
        served = questions[:1] if blended.asked_tokens else questions
        logits = cached_logits(self.model, blended.keys, blended.values, served)
        computed = blended.computed_tokens * len(served)
        for question in questions[len(served) :]:
            blended = self._blended(question, placed, blender)
            logits += cached_logits(self.model, blended.keys, blended.values, [question])
            computed += blended.computed_tokens
        return logits, computed / len(questions) / len(questions[0].context)

    def _blended(self, question: Question, placed: PlacedDocuments, blender: Blender) -> BlendedContext:
        return blender.blend(
            self.layers,
            torch.tensor(question.context),
            placed.starts,
            placed,
            exact_tokens=placed.exact_tokens,
            question_ids=torch.tensor(question.asked),
            device=self.layers.device,
        )

    def measure(
        self,
        contexts: Sequence[Sequence[Question]],
        methods: dict[str, Blender],
        *,
        stop_s: float = math.inf,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
        """Full prefill and every method on every question, side by side.

        Parameters
        ----------
        contexts : the questions about each context. What depends on the context alone is computed once for all of them.
        stop_s : by `time.monotonic`; later no context begins but the first.
        advance : called after each context.
        """
        full: list[Answer] = []
        answers: dict[str, list[Answer]] = {name: [] for name in methods}
        computed = dict.fromkeys(methods, 0.0)
        for questions in contexts:
            if full and time.monotonic() >= stop_s:
                break
            exact = cached_logits(self.model, *context_kv(self.model, questions[0].context), questions)
            full += map(score_answer, questions, exact, exact)
            placed = self.place(questions[0])
            for name, blender in methods.items():
                logits, share = self.fused_logits(questions, placed, blender)
                answers[name] += map(score_answer, questions, logits, exact)
                computed[name] += share * len(questions)
            advance()
        return tuple(full), [MeasuredMethod(name, tuple(answers[name]), computed[name] / len(full)) for name in methods]
