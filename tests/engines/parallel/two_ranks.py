"""An engine of two ranks that asks for what an engine of one has stored, and stores texts of its own: FOLDER."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.engines.support.engines import DECLINED, generate, prompts, start, tokens_of, usage

ONES, TWOS = prompts(41, (300, 130)), prompts(42, (200, 70))
DOCUMENTS = prompts(43, (150, 90))
LEAD, QUESTION = prompts(44, (35, 20))
CONTEXT = [*LEAD, *DOCUMENTS[1], 7, *DOCUMENTS[0], *QUESTION]
SETTINGS = {"host_bytes": "64MiB", "match_tokens": 32, "fusion_ratio": 0.9999, "tensor_parallel_sizes": [1, 2]}


def opened(folder: Path, size: int) -> Any:
    settings = {**SETTINGS, "disk_path": str(folder / "disk")}
    return start(folder / "model", settings, max_model_len=512, enable_prefix_caching=True, tensor_parallel_size=size)


def ask(llm: Any, texts: list[list[int]], options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Answers, and what was loaded for each; nothing of it comes from the engine's own cache."""
    assert llm.reset_prefix_cache()
    outputs = generate(llm, texts, options, tokens=16)
    told = [usage(output) if output.kv_transfer_params else {} for output in outputs]
    return {
        "answers": tokens_of(outputs),
        "loaded": [each.get("loaded_tokens") for each in told],
        "failed": [each.get("failed") for each in told],
        "fused": [each.get("fused") for each in told],
    }


def main(place: str) -> None:
    folder = Path(place)
    llm = opened(folder, 2)
    told = {
        "plain": ask(llm, [*ONES, *TWOS, CONTEXT], DECLINED),
        "found": ask(llm, ONES),
        "fused": ask(llm, [CONTEXT], {"save": False}),
        "own": ask(llm, TWOS),
    }
    until_s = time.monotonic() + 60  # both ranks write in the background
    while ask(llm, TWOS)["loaded"] != [{"host": 192}, {"host": 64}] and time.monotonic() < until_s:
        time.sleep(0.1)
    (folder / "told.json").write_text(json.dumps(told))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
