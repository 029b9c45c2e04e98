"""Questions over fused documents in the memory of the model's device: quality without a store, fast enough for many.

Every method starts from the same documents, computed alone once for each question. `fused_answers` measures what
answering takes, with a store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ..blend.blender import Blender
from ..connectors.hf.model import TransformersModel
from ..connectors.hf.prefill import Prefill
from .answers import Answer, cached_logits, full_logits, score_answer
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
            rope = layers.spec.rope
            keys.append(chunk.keys if rope is None else rope.shift(chunk.keys, moved))
            values.append(chunk.values)
        exact = len(lead) + len(question.documents[0])
        all_starts = (0, *starts) if lead else tuple(starts)
        return PlacedDocuments(torch.cat(keys, dim=2), torch.cat(values, dim=2), all_starts, exact)

    def fused_logits(self, question: Question, placed: PlacedDocuments, blender: Blender) -> tuple[Tensor, float]:
        """Distributions `[A, V]` of the answer's tokens over a fusion, and the share of the context computed for it."""
        context, asked = torch.tensor(question.context), torch.tensor(question.asked)
        blended = blender.blend(
            self.layers,
            context,
            placed.starts,
            placed,
            exact_tokens=placed.exact_tokens,
            question_ids=asked,
            device=self.layers.device,
        )
        cache = DynamicCache([(k[None], v[None]) for k, v in zip(blended.keys, blended.values, strict=True)])
        return cached_logits(self.model, cache, question), blended.computed_tokens / len(context)

    def measure(
        self,
        questions: Sequence[Question],
        methods: dict[str, Blender],
        *,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[tuple[Answer, ...], list[MeasuredMethod]]:
        """Full prefill and every method on every question, side by side; `advance` is called after each."""
        full: list[Answer] = []
        answers: dict[str, list[Answer]] = {name: [] for name in methods}
        computed = dict.fromkeys(methods, 0.0)
        for question in questions:
            exact = full_logits(self.model, question)
            full.append(score_answer(question, exact, exact))
            placed = self.place(question)
            for name, blender in methods.items():
                logits, share = self.fused_logits(question, placed, blender)
                answers[name].append(score_answer(question, logits, exact))
                computed[name] += share / len(questions)
            advance()
        return tuple(full), [MeasuredMethod(name, tuple(answers[name]), computed[name]) for name in methods]
