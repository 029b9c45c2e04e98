"""Stock vLLM on a processor, with tiny random models in which context matters; as a script, one that is killed."""

import json
import os
import random
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvloom.bench.vllm.families import VOCABULARY, make_tiny_model

make_model = make_tiny_model
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
CHUNK, BLOCK = 64, 32
ALWAYS = {"load_or_recompute": "always"}  # tiny models compute as fast as they load: tests say what is loaded
DECLINED = {"load": False, "save": False}


def start(model: Path, connector: Mapping[str, Any] | None, **options: Any) -> Any:
    """An engine in this process. `connector`: kvloom's settings, None for plain vLLM."""
    ranks = options.get("tensor_parallel_size", 1) * options.get("pipeline_parallel_size", 1)
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
            kv_connector_extra_config={"chunk_tokens": CHUNK, **ALWAYS, **connector},
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
