"""The bundled reference model: what it promises to engines, and that it retrieves at all."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from kvloom.bench.reference.evaluate import answered, encode_task
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.passages import load_questions, sentences
from kvloom.evaluation.tasks import TaskSampler

MAX_BYTES = 16_000_000


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32).eval()


def test_is_a_plain_small_hugging_face_folder(model: LlamaForCausalLM) -> None:
    config = model.config
    assert sum(file.stat().st_size for file in Path(BUNDLED_MODEL).iterdir()) <= MAX_BYTES
    assert config.model_type == "llama"
    assert config.head_dim == 64
    assert config.num_attention_heads >= 2 * config.num_key_value_heads
    assert config.rope_parameters["rope_type"] == "default"
    assert str(LlamaForCausalLM.from_pretrained(BUNDLED_MODEL, dtype="auto").dtype) in (
        "torch.bfloat16",
        "torch.float16",
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md", "evaluation.json"):
        assert (Path(BUNDLED_MODEL) / name).is_file()


def test_bos_comes_first() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    ids = tokenizer(" The code of Falcon is 4821.").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids[1:]) == " The code of Falcon is 4821."


@pytest.mark.slow
def test_finds_a_needle_in_real_text(model: LlamaForCausalLM) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)

    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    sampler = TaskSampler(sentences(p for q in load_questions()[:20] for p in q.passages), count_tokens)
    rng = random.Random(0)
    pairs = [encode_task(tokenizer, sampler.sample(rng, "needle", context_tokens=512)) for _ in range(24)]
    right = [hit for i in range(0, len(pairs), 8) for hit in answered(model, pairs[i : i + 8])]
    assert sum(right) >= 18
