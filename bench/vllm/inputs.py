"""Inputs of `kvloom bench vllm`: a random model worth caching for, prompts, and cases in tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

from ...connectors.hf.connector import TransformersConnector
from ...evaluation.models import load_model, token_counter
from ...evaluation.passages import load_questions
from ...evaluation.workload import task_cases
from ...kvstore.store import KVStore
from ...kvstore.tiers.host import HostTier

RESERVED_IDS = 8  # the first ones, which are special in most vocabularies


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a random Llama."""

    layers: int = 8
    hidden: int = 768
    intermediate: int = 2048
    heads: int = 12
    kv_heads: int = 4
    vocabulary: int = 4096
    max_tokens: int = 8192

    @property
    def token_bytes(self) -> int:
        """Of keys and values in float32."""
        return 2 * 4 * self.layers * self.kv_heads * (self.hidden // self.heads)


def make_model(folder: Path, shape: Shape) -> None:
    """Save a random model; equal shapes, equal weights.

    Weights are scaled so that hidden states keep their size and attention is sharp. With the usual initialisation a
    model says the same token whatever came before, and a wrong cache could not be told from a right one.
    """
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_tokens,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_config(config).float()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            is_sharp = "q_proj" in name or "k_proj" in name
            scale = 1.0 if "embed" in name else (3.0 if is_sharp else 1.5) / parameter.shape[1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


class Prompts:
    """Random ids: equal work for every token, and nothing that any cache could know by chance.

    Parameters
    ----------
    lead_ids : in front of every prompt.
    """

    def __init__(self, vocabulary: int, lead_ids: Sequence[int], seed: int) -> None:
        self.lead_ids = list(lead_ids)
        self._vocabulary = vocabulary
        self._random = random.Random(seed)

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(RESERVED_IDS, self._vocabulary) for _ in range(count)]

    def documents(self, count: int, tokens: int) -> list[list[int]]:
        return [self.ids(tokens) for _ in range(count)]

    def shuffled(self, documents: Sequence[list[int]]) -> list[list[int]]:
        """In another order, the first one not first again."""
        order = list(documents)
        while order[0] == documents[0]:
            self._random.shuffle(order)
        return order


def joined(
    lead_ids: Sequence[int], documents: Sequence[Sequence[int]], question: Sequence[int]
) -> tuple[list[int], list[list[int]]]:
    """A prompt, and the `[start, stop)` of its documents."""
    tokens, spans = list(lead_ids), []
    for document in documents:
        spans.append([len(tokens), len(tokens) + len(document)])
        tokens += document
    return tokens + list(question), spans


@dataclass(frozen=True, slots=True)
class TokenCase:
    """A question over documents whose answer is known."""

    documents: tuple[list[int], ...]
    question: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class ReferenceInputs:
    """For the bundled model: `texts` of mixed lengths, and cross-document `records`, those of `kvloom bench blend`."""

    lead_ids: tuple[int, ...]
    texts: list[list[int]]
    records: list[TokenCase]


def reference_inputs(*, texts: int, max_text_tokens: int, records: int, context_tokens: int) -> ReferenceInputs:
    """Natural text cut anywhere, 5 tokens to `max_text_tokens`, and the first `records` of the records."""
    model, tokenizer = load_model(None)
    with KVStore([HostTier(1 << 20)]) as store:
        encoder = TransformersConnector(model, tokenizer, store)
        cases = task_cases(
            None, token_counter(tokenizer), kind="record", count=records, context_tokens=context_tokens, seed=1
        )
        return ReferenceInputs(
            encoder.lead_ids,
            _cut_texts(encoder, texts, max_text_tokens),
            [
                TokenCase(
                    tuple(encoder.encode_document(document) for document in case.documents),
                    encoder.encode_question(case.question),
                    encoder.encode_question(case.answer or ""),
                )
                for case in cases
            ],
        )


def _cut_texts(encoder: TransformersConnector, count: int, max_tokens: int) -> list[list[int]]:
    pool = encoder.encode_question("\n".join(passage for each in load_questions()[:40] for passage in each.passages))
    draw = random.Random(0)
    found = []
    for _ in range(count):
        length = draw.randint(5, max_tokens)
        start = draw.randrange(len(pool) - length)
        found.append([*encoder.lead_ids, *pool[start : start + length]])
    return found
