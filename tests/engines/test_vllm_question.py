"""Fusions of stock vLLM that choose by their question: its pass is the model's own, and other questions fuse anew."""

from collections.abc import Sequence

import pytest
import torch

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from transformers import AutoModelForCausalLM

from kvloom.blend.question import question_attention
from kvloom.connectors.hf.model import TransformersModel

from .support.engines import BLOCK, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_question_chooses(tmp_path: object) -> None:
    """What it attends to is what the transformers model attends to over the same cache; equal prompts share."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    folder = make_model(tmp_path / "model")  # type: ignore[operator]
    llm = start(
        folder,
        {"host_bytes": "256MiB", "fusion_select": "first+question"},
        num_gpu_blocks_override=96,
        enable_prefix_caching=True,
    )
    try:
        documents, questions = prompts(5, (BLOCK * 3, BLOCK * 4)), prompts(6, (9, 9))
        for document in documents:
            generate(llm, [document], {"documents": [[0, len(document)]], "ratio": 0.0}, tokens=1)
        connector = get_kv_transfer_group()
        assert connector.worker.transfers.settle(30.0)
        passes, seen = connector.worker.fuser.passes, []
        ask = passes.question_attention

        def noted(ids: object, first: int, tokens: int, blocks: Sequence[int]) -> torch.Tensor:
            keys, values = passes._cache.read(blocks, 0, tokens)
            seen.append((ids, first, keys.float(), values.float(), ask(ids, first, tokens, blocks)))
            return seen[-1][-1]

        passes.question_attention = noted
        row = [*prompts(7, (BLOCK,))[0], *documents[1], *documents[0]]
        spans = [[BLOCK, BLOCK * 5], [BLOCK * 5, BLOCK * 8]]
        options = {"documents": spans, "ratio": 0.2}
        outputs = [generate(llm, [[*row, *question]], options, tokens=6)[0] for question in (*questions, questions[0])]
        assert len(seen) == 2, "an equal prompt shares the fusion of the first, another question does not"
        assert usage(outputs[1])["loaded_tokens"] and usage(outputs[2])["computed_tokens"] == 0
        assert tokens_of([outputs[0]]) == tokens_of([outputs[2]])
        layers = TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
        for question, (ids, first, keys, values, found) in zip(questions, seen, strict=True):
            assert (ids.tolist(), first) == (list(question), len(row))
            with torch.no_grad():
                expected = question_attention(layers, torch.tensor(question), keys, values, lambda _: None)
            assert torch.allclose(found.cpu(), expected, rtol=0.02, atol=0.02)
    finally:
        llm.llm_engine.engine_core.shutdown()
