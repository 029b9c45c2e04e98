"""SGLang and vLLM on one folder: what one has computed, the other loads, and says the same."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "sglang", reason="stock SGLang is not installed here; `make test-engines` runs this in its own environment"
)

from ..support.engines import CHUNK, make_model, prompts
from .support import vllm_side
from .support.engine import engine, generate, settle

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

VLLM = Path(sys.prefix).parent / "vllm" / "bin" / "python"
LENGTHS = (300, 140)


def vllm(model: Path, disk: Path, seed: int) -> tuple[list[list[int]], list[dict[str, int]]]:
    """What vLLM answers to the prompts of a seed, and the tokens that it loaded."""
    command = [str(VLLM), vllm_side.__file__, str(model), str(disk), str(seed), "12", json.dumps(LENGTHS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    assert result is not None, done.stderr[-3000:]
    answers, loaded = json.loads(result.removeprefix("RESULT "))
    return answers, loaded


@pytest.mark.skipif(not VLLM.exists(), reason="vLLM's environment is not beside this one")
def test_both_ways(tmp_path: Path) -> None:
    model, disk = make_model(tmp_path / "model"), tmp_path / "kv"
    time.sleep(3)  # so that no file is younger than the engines
    of_vllm, loaded = vllm(model, disk, 11)
    assert loaded == [{}, {}]
    found = [{"storage": length // CHUNK * CHUNK} for length in LENGTHS]
    with engine(model, {"disk_path": str(disk)}, page_size=CHUNK) as running:
        for prompt, answer, expected in zip(prompts(11, LENGTHS), of_vllm, found, strict=True):
            tokens, details = generate(running, prompt)
            assert tokens == answer
            assert {name: n for name, n in details.items() if isinstance(n, int) and n} == expected
        of_sglang = [generate(running, prompt)[0] for prompt in prompts(12, LENGTHS)]
        settle(disk, 12)
    answers, loaded = vllm(model, disk, 12)
    assert answers == of_sglang
    assert loaded == [{"disk": expected["storage"]} for expected in found]
