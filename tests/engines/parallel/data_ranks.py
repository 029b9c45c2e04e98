"""An engine of two data-parallel ranks with kvloom on one folder; tells what each rank answered and loaded: FOLDER."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..support.engines import BLOCK, CHUNK, DECLINED, SETTINGS, prompts, sampling

TEXTS = prompts(51, (300, 200))
PLAIN_TO_LOADED_S = 60.0


async def serve(folder: Path) -> dict[str, Any]:
    """Text 0 is stored by rank 0 and asked of rank 1, text 1 the other way round."""
    from vllm.config import KVTransferConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    settings = {"chunk_tokens": CHUNK, "host_bytes": "64MiB", "disk_path": str(folder / "disk")}
    transfer = KVTransferConfig(
        kv_connector="KVLoomConnector",
        kv_connector_module_path="kvloom.connectors.vllm.connector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config=settings,
    )
    llm = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            str(folder / "model"),
            dtype="float32",
            max_model_len=512,
            max_num_seqs=8,
            block_size=BLOCK,
            enforce_eager=True,
            skip_tokenizer_init=True,
            data_parallel_size=2,
            kv_transfer_config=transfer,
        )
    )
    count = 0

    async def ask(text: list[int], rank: int, options: Mapping[str, Any] | None = None) -> tuple[list[int], Any]:
        nonlocal count
        count += 1
        assert await llm.reset_prefix_cache()
        last: Any = None
        async for output in llm.generate(
            {"prompt_token_ids": text}, sampling(options), f"r{count}", data_parallel_rank=rank
        ):
            last = output
        return list(last.outputs[0].token_ids), (last.kv_transfer_params or {}).get("kvloom")

    told: dict[str, Any] = {"plain": [], "computed": [], "found": [], "loaded": []}
    try:
        for rank, text in enumerate(TEXTS):
            told["plain"].append((await ask(text, rank, DECLINED))[0])
            told["computed"].append((await ask(text, rank))[0])
            until_s = time.monotonic() + PLAIN_TO_LOADED_S  # it is stored in the background
            found, usage = await ask(text, 1 - rank, {"save": False})
            while not usage["loaded_tokens"] and time.monotonic() < until_s:
                found, usage = await ask(text, 1 - rank, {"save": False})
            told["found"].append(found)
            told["loaded"].append(usage["loaded_tokens"])
    finally:
        llm.shutdown()
    return told


def main(place: str) -> None:
    os.environ.update(SETTINGS, VLLM_CPU_OMP_THREADS_BIND="0|1")
    from kvloom.bench.vllm.server import hide_fake_attributes

    hide_fake_attributes()
    told = asyncio.run(serve(Path(place)))
    Path(place, "told.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
