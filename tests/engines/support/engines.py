"""Stock vLLM on a processor, with tiny random models in which context matters; as a script, an engine that is killed.

A model with default initialisation says the same token whatever came before, so that equal tokens prove nothing. Here
weights are scaled so that hidden states keep their size and attention is sharp.
"""

import json
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
VOCABULARY = 512
CHUNK, BLOCK = 64, 32
DECLINED = {"load": False, "save": False}


def make_model(folder: Path, architecture: str = "llama", **config: object) -> Path:
    """A random model of six layers, saved without a tokenizer; equal arguments, equal weights."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    kinds = {
        "llama": "LlamaConfig",
        "mistral": "MistralConfig",
        "qwen2": "Qwen2Config",
        "qwen3": "Qwen3Config",
        "phi3": "Phi3Config",
        "gemma": "GemmaConfig",
        "gemma2": "Gemma2Config",
        "gemma3": "Gemma3TextConfig",
        "gemma4": "Gemma4TextConfig",
        "gpt-oss": "GptOssConfig",
        "cohere2": "Cohere2Config",
        "llama4": "Llama4TextConfig",
        "exaone4": "Exaone4Config",
        "deepseek-v2": "DeepseekV2Config",
        "deepseek-v3": "DeepseekV3Config",
        "glm4": "Glm4Config",
    }
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **config,
    }
    model = AutoModelForCausalLM.from_config(getattr(transformers, kinds[architecture])(**settings)).float()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim == 2:
            sharp = "q_proj" in name or "k_proj" in name
            scale = 1.0 if "embed" in name else (3.0 if sharp else 1.5) / parameter.shape[1] ** 0.5
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return folder


def start(model: Path, connector: Mapping[str, Any] | None, **options: Any) -> Any:
    """An engine in this process. `connector`: kvloom's settings, None for plain vLLM."""
    ranks = options.get("tensor_parallel_size", 1)
    cores = "|".join(map(str, range(ranks))) if ranks > 1 else "auto"
    os.environ.update(SETTINGS, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND=cores)
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvloom.bench.vllm.server import hide_fake_attributes

    hide_fake_attributes()  # of what earlier tests of this process have imported
    transfer = None
    if connector is not None:
        transfer = KVTransferConfig(
            kv_connector="KVLoomConnector",
            kv_connector_module_path="kvloom.connectors.vllm.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={"chunk_tokens": CHUNK, **connector},
        )
    settings = {
        "dtype": "float32",
        "max_model_len": 1024,
        "max_num_batched_tokens": 256,  # so that longer prompts are computed in pieces
        "max_num_seqs": 8,
        "block_size": BLOCK,
        "enforce_eager": True,
        "disable_log_stats": False,
        "skip_tokenizer_init": True,
        "kv_transfer_config": transfer,
        **options,
    }
    return LLM(str(model), **settings)


def prompts(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def sampling(options: Mapping[str, Any] | None = None, *, tokens: int = 20) -> Any:
    from vllm import SamplingParams

    extra = None if options is None else {"kv_transfer_params": {"kvloom": dict(options)}}
    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args=extra)


def generate(
    llm: Any, texts: Sequence[Sequence[int]], options: Mapping[str, Any] | None = None, *, tokens: int = 20, **more: Any
) -> list[Any]:
    """All at once; greedy."""
    inputs = [{"prompt_token_ids": list(text), **more} for text in texts]
    outputs: list[Any] = llm.generate(inputs, sampling(options, tokens=tokens), use_tqdm=False)
    return outputs


def tokens_of(outputs: Sequence[Any]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def usage(output: Any) -> dict[str, Any]:
    """What kvloom says that it did for a request."""
    found: dict[str, Any] = output.kv_transfer_params["kvloom"]
    return found


def main(model: str, disk: str) -> None:
    """Answer, wait until all is stored, say what was answered, and die without a word."""
    import time

    llm = start(Path(model), {"host_bytes": "64MiB", "disk_path": disk})
    answers = tokens_of(generate(llm, prompts(11, (300, 130)), tokens=70))
    time.sleep(2)
    Path(disk, "answers.json").write_text(json.dumps(answers))
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
