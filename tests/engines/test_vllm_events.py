"""What an engine tells of kvloom: events for routers, as a subscriber hears them; what requests are said to be saved.

The engine's tier on disk is encoded without loss: equal tokens from there, too.
"""

import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

import msgspec
import zmq
from prometheus_client import REGISTRY
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from ..support.patience import at_best
from .support import engines
from .support.engines import BLOCK, CHUNK, DECLINED, generate, make_model, prompts, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

CHUNK_BYTES = CHUNK * 6 * 2 * 64 * 2 * 4
HOST_CHUNKS = 5


class Router:
    """Hears the engine's events, and knows by them which blocks are where."""

    def __init__(self, endpoint: str) -> None:
        self.socket = zmq.Context.instance().socket(zmq.SUB)
        self.socket.connect(endpoint)
        self.socket.subscribe(b"")
        self.stored: dict[bytes, BlockStored] = {}  # as last told, by the block's hash
        self.where: dict[str, set[bytes]] = {"GPU": set(), "CPU": set(), "STORAGE": set()}
        self.removed: list[BlockRemoved] = []

    def listen(self) -> None:
        decoder = msgspec.msgpack.Decoder(KVEventBatch)
        while self.socket.poll(1000):
            _, _, payload = self.socket.recv_multipart()
            for event in decoder.decode(payload).events:
                if isinstance(event, BlockStored):
                    self.where[event.medium] |= set(event.block_hashes)
                    for index, block_hash in enumerate(event.block_hashes):
                        parent = event.block_hashes[index - 1] if index else event.parent_block_hash
                        tokens = event.token_ids[index * event.block_size : (index + 1) * event.block_size]
                        fields = (parent, tokens, event.block_size, event.extra_keys and event.extra_keys[index])
                        assert self.stored.setdefault(block_hash, fields) == fields, "every medium tells the same"
                elif isinstance(event, BlockRemoved):
                    self.where[event.medium] -= set(event.block_hashes)
                    self.removed.append(event)

    def prefix(self, medium: str, tokens: list[int]) -> int:
        """Leading tokens whose blocks are there, found as a router finds them: by tokens and parents."""
        parent, found = None, 0
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            row = tokens[start : start + BLOCK]
            parent = next(
                (h for h in self.where[medium] if self.stored[h][:2] == (parent, row)),
                None,
            )
            if parent is None:
                break
            found += BLOCK
        return found


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("vllm")
    endpoint = f"ipc://{folder}/events"
    engine = engines.start(
        make_model(folder / "model"),
        {"host_bytes": HOST_CHUNKS * CHUNK_BYTES + 4096, "disk_path": str(folder / "disk"), "disk_codec": "lossless"},
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="zmq", endpoint=endpoint),
        enable_prefix_caching=True,
    )
    engine.router = Router(endpoint)
    time.sleep(0.5)
    yield engine
    engine.llm_engine.engine_core.shutdown()


def transfers_of(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.transfers


def hear(llm: Any) -> None:
    """All that is to be stored is stored, and told with the engine's next steps."""
    assert transfers_of(llm).settle(20.0)
    generate(llm, prompts(99, (5,)), DECLINED, tokens=3)
    llm.router.listen()


def test_a_router_knows_what_is_where(llm: Any) -> None:
    """Stored in both tiers, under the names of the engine's own blocks; evicted from memory; found again; reset."""
    router = llm.router
    (first,) = prompts(1, (300,))
    (plain,) = tokens_of(generate(llm, [first], DECLINED))
    hear(llm)
    assert router.prefix("CPU", first) == router.prefix("STORAGE", first) == 0
    assert router.prefix("GPU", first) >= 288
    assert llm.reset_prefix_cache()
    generate(llm, [first], cache_salt="somebody else")
    hear(llm)
    salted = [h for h in router.where["CPU"] if router.stored[h][3]]
    assert [router.stored[h][3] for h in salted] == [("somebody else",)], "only the first block says so"

    generate(llm, [first])
    hear(llm)
    assert router.prefix("STORAGE", first) == 256
    assert router.prefix("CPU", first) == 256
    gpu_names = {h for h in router.where["GPU"] if router.stored[h][1] == first[:BLOCK]}
    assert gpu_names & router.where["CPU"], "a block is called the same everywhere"
    others = prompts(2, (200, 200, 200))
    generate(llm, others)
    hear(llm)
    assert router.prefix("STORAGE", first) == 256
    assert router.prefix("CPU", first) < 256
    held = transfers_of(llm).store.stats().tiers[0].chunks
    assert len(router.where["CPU"]) == held * CHUNK // BLOCK <= HOST_CHUNKS * CHUNK // BLOCK

    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [first])
    assert tokens_of([output]) == [plain]
    assert usage(output)["loaded_tokens"]["disk"] > 0, "from the disk, through its codec, without loss"
    assert llm.llm_engine.engine_core.reset_prefix_cache(False, True)
    hear(llm)
    assert router.prefix("STORAGE", first) == router.prefix("CPU", first) == 0


def test_what_another_engine_stored_is_told_when_it_is_used(llm: Any) -> None:
    """Chunks that the engine finds in the folder: it learns their blocks by the first request for them."""
    (text,) = prompts(3, (200,))
    generate(llm, [text])
    hear(llm)
    assert llm.router.prefix("STORAGE", text) == 192
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector
    assert scheduler is not get_kv_transfer_group()
    scheduler.scheduler_half.events.residences.clear()  # as if another engine had stored them
    hear(llm)
    assert llm.router.prefix("STORAGE", text) == 0
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [text])
    assert sum(usage(output)["loaded_tokens"].values()) == 192
    hear(llm)
    assert max(llm.router.prefix("STORAGE", text), llm.router.prefix("CPU", text)) == 192


def test_seconds_saved_are_what_computing_took(llm: Any) -> None:
    texts, saved_s = iter(prompts(4, (700,) * 4)), []

    def worth() -> float:
        """Of a load, over the time that computing took."""
        text = next(texts)
        begun_s = time.monotonic()
        generate(llm, [text], DECLINED, tokens=1)
        computing_s = time.monotonic() - begun_s
        assert llm.reset_prefix_cache()
        (computed,) = generate(llm, [text], tokens=1)
        assert usage(computed)["seconds_saved"] == 0.0
        hear(llm)
        assert llm.reset_prefix_cache()
        (loaded,) = generate(llm, [text], tokens=1)
        told = usage(loaded)
        assert sum(told["loaded_tokens"].values()) == 640
        saved_s.append(told["seconds_saved"])
        return (told["seconds_saved"] + told["load_s"]) / computing_s

    assert 0.3 < at_best(worth, lambda ratio: 0.3 < ratio < 3) < 3
    store = transfers_of(llm).store
    keys = [entry.key for entry in store.tiers[0].entries()]
    assert all(known.recompute_s for known in store.explain(keys)), "all were timed"
    counted = [
        sample.value
        for metric in REGISTRY.collect()
        for sample in metric.samples
        if sample.name == "vllm:kvloom_seconds_saved_total"
    ]
    assert sum(counted) >= max(saved_s[-1], 0.0) - 1e-6
