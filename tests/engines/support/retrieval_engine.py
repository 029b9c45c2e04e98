"""As a script: one engine that decodes through retrieval, in a process of its own; prints what became of it as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import engines


def rows_of(worker: Any) -> list[int]:
    """Decoded through indexes, and refused, in each layer of a rank."""
    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    counts = [layer.impl.retrieving.counts for layer in context.values()]
    return [min(count.rows for count in counts), max(count.refused_rows for count in counts)]


def main(job: dict[str, Any]) -> dict[str, Any]:
    from kvloom.connectors.vllm.plugin import register

    register()
    try:
        llm = engines.start(Path(job["model"]), None, **job["options"])
    except Exception as exc:  # noqa: BLE001  of whatever kind: the test says which
        return {"error": type(exc).__name__, "text": str(exc)}
    texts = engines.prompts(job["seed"], job["lengths"])
    tokens = engines.tokens_of(engines.generate(llm, texts))
    return {"tokens": tokens, "rows": llm.collective_rpc(rows_of)}


if __name__ == "__main__":
    print(f"\nfound {json.dumps(main(json.loads(sys.argv[1])))}", flush=True)  # ranks go on talking
