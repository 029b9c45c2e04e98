"""KV from outside in stock SGLang: exact at ratio 1, used by requests that carry its key, invisible to all others."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "sglang", reason="stock SGLang is not installed here; `make test-engines` runs this in its own environment"
)

import torch

from kvloom.compress.raw import RawCodec
from kvloom.connectors.sglang.contexts import namespace_seed, store_context
from kvloom.core import KVSpec
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier

from ..support.engines import make_model, prompts
from .support.engine import PAGE, engine, generate, settle

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTH = 300


def with_key(running: Any, prompt: list[int], extra_key: str) -> tuple[list[int], dict[str, Any]]:
    """As `generate`, with what `sglang.Engine.generate` has no argument for; over HTTP it is a field of the request."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    request = GenerateReqInput(input_ids=prompt, sampling_params=sampling, extra_key=extra_key)
    answers = running.tokenizer_manager.generate_request(request, None)
    output = running.loop.run_until_complete(answers.__anext__())
    return list(output["output_ids"]), dict(output["meta_info"].get("cached_tokens_details") or {})


def stored_spec(disk: Path) -> KVSpec:
    """Of SGLang's own chunks."""
    tier = DiskTier(disk, read_only=True)
    try:
        blob = tier.get(tier.entries()[0].key)
        assert blob is not None
        return RawCodec().decode(blob).spec
    finally:
        tier.close()


def prefilled(model: Path, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values `[L, H, S, D]` by transformers: what a fusion at ratio 1 gives."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        cache = network(torch.tensor([prompt]), use_cache=True).past_key_values
    return torch.cat([layer.keys for layer in cache.layers]), torch.cat([layer.values for layer in cache.layers])


def test_the_seed_is_sglangs() -> None:
    from sglang.srt.mem_cache.utils import storage_namespace_seed

    for text in ("a", "fused: ä 1", "x" * 300):
        assert namespace_seed(text).hex() == storage_namespace_seed(text, None)


def test_a_context_from_outside(tmp_path: Path) -> None:
    model, disk = make_model(tmp_path / "model"), tmp_path / "kv"
    (first, other) = prompts(5, (LENGTH, LENGTH))
    whole = (LENGTH - 1) // PAGE * PAGE
    with engine(model, {"disk_path": str(disk), "model_id": "tiny"}) as running:
        exact, _ = generate(running, first)
        settle(disk, whole // PAGE)
        spec = stored_spec(disk)
        keys, values = prefilled(model, other)
        with KVStore([DiskTier(disk)]) as store:
            ids = torch.tensor(other)
            assert store_context(store, spec, ids, keys, values, page_tokens=PAGE, extra_key="ratio 1") == whole
            wrong = torch.zeros_like(values)
            store_context(store, spec, torch.tensor(first), keys, wrong, page_tokens=PAGE, extra_key="rough")
        answer, details = with_key(running, other, "ratio 1")
        assert details["storage"] == whole, "it entered"
        plain, details = generate(running, other)
        assert not any(details.get(name) for name in ("device", "host", "storage")), "a plain prompt finds none of it"
        assert answer == plain, "and it is exact"
        rough, details = with_key(running, first, "rough")
        assert details["storage"] == whole and rough != exact, "what is stored is what is used"
        assert generate(running, first)[0] == exact, "the approximation stays behind its key"
        assert not any(with_key(running, other, "ratio 2")[1].get(name) for name in ("device", "host", "storage"))
