"""An engine that answers, waits until all lies in the service, and says what it answered: MODEL SETTINGS OUT."""

import json
import sys
from pathlib import Path

from tests.engines.support.engines import generate, prompts, start, tokens_of

LENGTHS = (300, 130, 190)


def main(folder: str, settings: str, out: str) -> None:
    llm = start(Path(folder), json.loads(settings))
    answers = tokens_of(generate(llm, prompts(11, LENGTHS), tokens=20))
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    stored = get_kv_transfer_group().worker.transfers.settle(60.0)
    Path(out).write_text(json.dumps({"answers": answers, "stored": stored}))
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
