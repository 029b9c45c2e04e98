"""Equal tokens over a hundred prompts in batches, computed, stored and loaded, with features of vLLM on and off.

Prefix caching on, 32-bit numbers, no compiler and middling pieces of prompts are what test_vllm_engine.py has.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from .support.engines import BLOCK, CHUNK, DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTHS = tuple(1 + (37 * i) % 263 for i in range(100))
CASES: dict[str, dict[str, Any]] = {
    "no prefix caching": {"enable_prefix_caching": False},
    "pieces of less than a block": {"enable_prefix_caching": True, "max_num_batched_tokens": 24},
    "compiled": {"enforce_eager": False},
    "compiled, no prefix caching, small pieces": {
        "enforce_eager": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 80,
    },
}


def settle() -> None:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    transfers = get_kv_transfer_group().worker.transfers
    assert transfers.settle(30.0)


def open_engine(folder: Path, **options: Any) -> Any:
    return start(make_model(folder / "model"), {"host_bytes": "512MiB"}, max_model_len=512, **options)


@pytest.fixture(params=CASES)
def llm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    engine = open_engine(tmp_path, **CASES[request.param])
    yield engine
    engine.llm_engine.engine_core.shutdown()


def test_computed_stored_and_loaded(llm: Any) -> None:
    texts = prompts(17, LENGTHS)
    plain = tokens_of(generate(llm, texts, DECLINED, tokens=12))
    assert len({tuple(answer) for answer in plain}) > 90, "a model that says the same to all would prove nothing"
    llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts, tokens=12)) == plain
    settle()
    llm.reset_prefix_cache()
    warm = generate(llm, texts, tokens=12)
    assert tokens_of(warm) == plain
    assert [sum(usage(output)["loaded_tokens"].values()) for output in warm] == [n // CHUNK * CHUNK for n in LENGTHS]
    mixed = generate(llm, [[*text, 9] for text in texts[::3]], tokens=6), generate(llm, texts[::2], DECLINED, tokens=12)
    assert tokens_of(mixed[1]) == plain[::2]
    llm.reset_prefix_cache()
    assert tokens_of(mixed[0]) == tokens_of(generate(llm, [[*text, 9] for text in texts[::3]], DECLINED, tokens=6))


def test_sixteen_bits(tmp_path: Path) -> None:
    """In 16 bits plain vLLM itself answers otherwise when a prompt is computed in other pieces, or beside others.

    So requests come one by one, and plain vLLM finds in its own cache what kvloom loads: equal pieces, equal bits.
    """
    llm = open_engine(
        tmp_path, dtype="bfloat16", max_num_seqs=1, enable_prefix_caching=True, max_num_batched_tokens=512
    )
    texts = [text for text in prompts(18, LENGTHS) if len(text) % CHUNK]
    heads = [text[: len(text) // CHUNK * CHUNK] for text in texts if len(text) > CHUNK]
    generate(llm, heads, tokens=1)
    settle()
    assert llm.reset_prefix_cache()
    plain = []
    for text in texts:  # one at a time: the cache holds what the last few have left
        head = text[: len(text) // CHUNK * CHUNK]
        if head:
            generate(llm, [head], DECLINED, tokens=1)
        (output,) = generate(llm, [text], DECLINED, tokens=12)
        assert output.num_cached_tokens == len(head)
        plain += tokens_of([output])
    assert llm.reset_prefix_cache()
    warm = generate(llm, texts, tokens=12)
    assert tokens_of(warm) == plain
    assert [sum(usage(o)["loaded_tokens"].values()) for o in warm] == [len(text) // CHUNK * CHUNK for text in texts]
    assert len({tuple(answer) for answer in plain}) > 80
    assert len(texts) >= 95
    assert CHUNK % BLOCK == 0
    llm.llm_engine.engine_core.shutdown()
