"""Every call of the store raises, is late, lies or loses what it had: same tokens, counted, nothing hangs."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.kvstore.store import KVStore

from .support.engines import DECLINED, generate, make_model, prompts, start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

DOCUMENTS = prompts(5, (130, 97))
TEXTS = prompts(7, (300, 64, 190))
CONTEXT = [*prompts(6, (40,))[0], *DOCUMENTS[1], *DOCUMENTS[0], *prompts(8, (20,))[0]]
COUNTED = ("errors", "failed_loads", "failed_saves", "dropped_saves")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two chunks fit into memory: most come from disk."""
    folder = tmp_path_factory.mktemp("vllm")
    settings = {"host_bytes": "1MiB", "disk_path": str(folder / "disk"), "match_tokens": 32, "load_timeout_s": 3.0}
    engine = start(make_model(folder / "model"), settings, enable_prefix_caching=True, num_gpu_blocks_override=100)
    engine.disk = folder / "disk"
    for document in DOCUMENTS:
        generate(engine, [document], {"documents": [[0, len(document)]], "ratio": 0.5}, tokens=1)
    engine.plain = tokens_of(generate(engine, [*TEXTS, CONTEXT], DECLINED))
    generate(engine, TEXTS, tokens=1)
    settle()
    yield engine
    engine.llm_engine.engine_core.shutdown()


def transfers() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.transfers


def settle() -> None:
    assert transfers().settle(30.0)


def counted(llm: Any) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name in {f"vllm:kvloom_{name}" for name in COUNTED})


def answers(llm: Any) -> tuple[list[list[int]], list[Any]]:
    """Prefixes and a fusion that computes all, together; cold."""
    assert llm.reset_prefix_cache()
    from vllm import SamplingParams

    extra = {"kv_transfer_params": {"kvloom": {"ratio": 0.9999}}}
    settings = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, extra_args=extra)
    outputs = llm.generate([{"prompt_token_ids": t} for t in [*TEXTS, CONTEXT]], settings, use_tqdm=False)
    return tokens_of(outputs), outputs


def idle(llm: Any) -> bool:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    return not scheduler.requests and scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == 99


def raising(call: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    return fail


def delayed(call: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.3)
        return call(*args, **kwargs)

    return wait


def every_other(harm: Callable[..., Any]) -> Callable[..., Any]:
    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        harmed, calls = harm(call), [0]

        def maybe(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            return (harmed if calls[0] % 2 else call)(*args, **kwargs)

        return maybe

    return wrap


def always(value: Any) -> Callable[..., Any]:
    return lambda call: lambda *_, **__: value


def cut_short(call: Callable[..., Any]) -> Callable[..., Any]:
    def read(*args: Any, **kwargs: Any) -> Any:
        hit = call(*args, **kwargs)
        if hit is None:
            return None
        shorter = replace(
            hit.chunk,
            token_ids=hit.chunk.token_ids[1:],
            positions=hit.chunk.positions[1:],
            keys=hit.chunk.keys[:, :, 1:],
            values=hit.chunk.values[:, :, 1:],
        )
        return hit._replace(chunk=shorter)

    return read


def elsewhere(call: Callable[..., Any]) -> Callable[..., Any]:
    """Where it was not computed, and is not wanted."""

    def read(key: Any, positions: Any = None, **kwargs: Any) -> Any:
        hit = call(key, positions, **kwargs)
        return hit and hit._replace(chunk=replace(hit.chunk, positions=hit.chunk.positions + 1))

    return read


FAULTS: dict[str, tuple[str, Callable[..., Any], bool]] = {  # call, harm, whether it is counted
    "look-up raises": ("locate_prefix", raising, True),
    "look-up is late": ("locate_prefix", delayed, False),
    "look-up finds nothing": ("locate_prefix", always(()), False),
    "look-up lies": ("locate_prefix", lambda call: lambda self, keys: ("tape",) * len(keys), False),
    "pinning raises": ("pinned", raising, True),
    "pinning is late": ("pinned", delayed, False),
    "read raises": ("read", raising, True),
    "read raises at times": ("read", every_other(raising), True),
    "read is late": ("read", delayed, False),
    "read finds nothing": ("read", always(None), True),
    "read finds nothing at times": ("read", every_other(always(None)), True),
    "read gives too little": ("read", cut_short, True),
    "read gives it elsewhere": ("read", elsewhere, True),
    "put raises": ("put", raising, True),
    "put is late": ("put", delayed, False),
    "put does nothing": ("put", always(None), False),
    "contains raises": ("__contains__", raising, True),
    "contains is late": ("__contains__", delayed, False),
    "contains lies": ("__contains__", always(True), False),
    "contains finds nothing": ("__contains__", always(False), False),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_call_of_the_store(llm: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    call, harm, is_counted = FAULTS[name]
    before, begun_s = counted(llm), time.monotonic()
    if call in ("put", "__contains__"):  # only what is new is stored
        texts = [[3 + len(name) + i, *text] for i, text in enumerate(TEXTS)]
        plain = tokens_of(generate(llm, texts, DECLINED))
    monkeypatch.setattr(KVStore, call, harm(getattr(KVStore, call)))
    found, _ = answers(llm)
    assert found == llm.plain
    if call in ("put", "__contains__"):
        assert llm.reset_prefix_cache()
        assert tokens_of(generate(llm, texts)) == plain
        settle()
    assert idle(llm)
    assert time.monotonic() - begun_s < 60
    monkeypatch.undo()
    assert (counted(llm) > before) is is_counted
    found, outputs = answers(llm)
    assert found == llm.plain
    assert [sum(usage(output)["loaded_tokens"].values()) for output in outputs][:3] == [256, 64, 128], "found as ever"
    assert usage(outputs[3])["fused"] == "yes"


def test_every_byte_on_disk_is_wrong(llm: Any) -> None:
    """The last test: what was stored is lost."""
    for segment in Path(llm.disk, "segments").iterdir():
        payload = bytearray(segment.read_bytes())
        payload[64::97] = bytes(byte ^ 0x5A for byte in payload[64::97])
        with segment.open("r+b") as file:
            file.write(payload)
    before = counted(llm)
    rounds = 0
    loaded: list[int] = []
    # A load ends at its first damaged chunk and leaves those behind it; copies in memory hide damage until they leave.
    while loaded != [256, 64, 128] and rounds < 8:
        found, outputs = answers(llm)
        assert found == llm.plain
        loaded = [sum(usage(output)["loaded_tokens"].values()) for output in outputs[:3]]
        settle()
        rounds += 1
    assert counted(llm) > before and rounds > 1
    assert loaded == [256, 64, 128], "what was computed again is stored again"
    assert idle(llm)
