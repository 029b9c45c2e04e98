"""One of two engines that run at once on one folder, see test_vllm_engine_peers.py. Says what it got as JSON."""

import json
import sys
import time
from pathlib import Path
from typing import Any

from .engines import DECLINED, generate, prompts, start, tokens_of, usage

TEXTS = prompts(31, tuple(70 + (53 * i) % 260 for i in range(24)))
DOCUMENTS = prompts(32, (150, 90))
LONGEST_S = 240.0


def in_context(first: int) -> list[int]:
    lead, question = prompts(33 + first, (35, 20))
    return [*lead, *DOCUMENTS[first], 7, *DOCUMENTS[1 - first], *question]


class Peer:
    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.number = folder, number
        settings = {"host_bytes": "2MiB", "disk_path": str(folder / "disk"), "match_tokens": 32, "fusion_ratio": 0.9999}
        self.llm = start(folder / "model", settings, max_model_len=512, enable_prefix_caching=True)

    def meet(self, name: str) -> None:
        """Until the other has come as far."""
        (self.folder / f"{name}.{self.number}").touch()
        until_s = time.monotonic() + LONGEST_S
        while not (self.folder / f"{name}.{1 - self.number}").exists():
            if time.monotonic() > until_s:
                raise TimeoutError(f"the other engine has not come to {name!r}")
            time.sleep(0.05)

    def ask(self, texts: list[list[int]], options: dict[str, Any] | None = None) -> tuple[list[list[int]], list[Any]]:
        assert self.llm.reset_prefix_cache()
        outputs = generate(self.llm, texts, options, tokens=16)
        return tokens_of(outputs), outputs

    def run(self) -> dict[str, Any]:
        own, others = TEXTS[self.number :: 2], TEXTS[1 - self.number :: 2]
        contexts = [in_context(self.number), in_context(1 - self.number)]
        plain, _ = self.ask([*TEXTS, *contexts], DECLINED)
        self.meet("ready")
        computed, _ = self.ask(own)
        self.ask([DOCUMENTS[self.number]], {"documents": [[0, len(DOCUMENTS[self.number])]]})
        time.sleep(2.0)  # saves are written meanwhile
        self.meet("stored")
        found, outputs = self.ask(others)
        loaded = sum(sum(usage(output)["loaded_tokens"].values()) for output in outputs)
        fused, told = self.ask(contexts)
        self.meet("found")
        rounds = [self.ask([*TEXTS, *contexts])[0] for _ in range(2)]
        return {
            "plain": plain,
            "computed": [
                computed == plain[: len(TEXTS)][self.number :: 2],
                found == plain[: len(TEXTS)][1 - self.number :: 2],
            ],
            "fused": [fused == plain[len(TEXTS) :], *(usage(output)["fused"] for output in told)],
            "rounds": [answers == plain for answers in rounds],
            "loaded_from_the_other": loaded,
            "failed": any(usage(output)["failed"] for output in [*outputs, *told]),
        }


if __name__ == "__main__":
    place, which = Path(sys.argv[1]), int(sys.argv[2])
    (place / f"told.{which}.json").write_text(json.dumps(Peer(place, which).run()))
