"""As a script, in vLLM's environment: answers prompts with kvloom, and says where their KV came from."""

import json
import sys
import time
from pathlib import Path


def main(model: str, disk: str, seed: str, tokens: str, lengths: str) -> None:
    from kvloom.tests.engines.support import engines

    llm = engines.start(Path(model), {"host_bytes": "64MiB", "disk_path": disk})
    texts = engines.prompts(int(seed), json.loads(lengths))
    outputs = engines.generate(llm, texts, tokens=int(tokens))
    time.sleep(3)
    loaded = [engines.usage(output)["loaded_tokens"] for output in outputs]
    print("RESULT " + json.dumps([engines.tokens_of(outputs), loaded]), flush=True)
    llm.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
