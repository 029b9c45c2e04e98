"""Several KV cache groups, windows, and no model: vLLM's real scheduler, and both of kvloom's real halves."""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom.core import ChunkKey
from kvloom.kvstore.store import Hit, KVStore

from ...vllm.grouped import GroupedWorker, finish, plain_answer, specs_of
from ...vllm.simulated import NEEDS_SCHEDULER, forget, prompt, step_and_reset, vllm_unit
from ..support.engines import make_model

pytestmark = NEEDS_SCHEDULER

CHUNK = 32
FULL: Mapping[str, int] = {}
KINDS: dict[str, list[Mapping[str, int]]] = {
    "full, and a window of less than a chunk": [{"window": 20}, FULL],
    "full, and a window of several chunks, twice": [FULL, {"window": 80}, {"window": 80}],
    "full, and a window of whole blocks": [FULL, {"window": 64}],
    "full, and a window that ends within blocks": [FULL, {"window": 49}],
    "full, and local parts": [FULL, {"local": 64}],
    "full, and local parts that chunks do not divide": [FULL, {"local": 48}],
    "a window alone": [{"window": 70}],
    "a short window alone": [{"window": 5}],
    "full twice, and a window": [FULL, {"window": 33}, FULL],
    "larger blocks than chunks": [{"block": 64}, {"window": 40, "block": 64}],
    "full, and states": [FULL, {"state": 1}],
    "states twice, and full": [{"state": 1}, FULL, {"state": 1}],
    "states alone": [{"state": 1}],
    "full, a window, and states": [FULL, {"window": 40}, {"state": 1}],
    "states in blocks of more tokens than chunks elsewhere": [{"block": 64}, {"state": 1, "block": 64}],
}
Make = Callable[..., GroupedWorker]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the scheduler; nothing runs it."""
    return make_model(tmp_path_factory.mktemp("groups") / "model", num_hidden_layers=1)


@pytest.fixture
def make(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """An engine with these groups; without blocks to spare, if `blocks` says so."""
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    from kvloom.connectors.vllm import connector

    here: dict[str, Any] = {}
    made: list[GroupedWorker] = []
    monkeypatch.setattr(connector, "worker_here", here.get)

    def opened(
        kinds: list[Mapping[str, int]],
        *,
        blocks: int = 4000,
        batch: int = 128,
        caching: bool = True,
        at_once: bool = True,
        policy: str = "recompute",
        store: KVStore | None = None,
        nbytes: int | None = None,
    ) -> GroupedWorker:
        utils = vllm_unit("utils")
        block = kinds[0].get("block", 16)
        config = utils.create_vllm_config(
            model=str(model),
            kv_connector="KVLoomConnector",
            kv_connector_module_path="kvloom.connectors.vllm_v1",
            kv_role="kv_both",
            block_size=block,
            max_num_batched_tokens=batch,
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"chunk_tokens": CHUNK, "lead_ids": [], "load_or_recompute": "always"},
        )
        config.model_config.skip_tokenizer_init = True
        config.cache_config.enable_prefix_caching = caching
        config.cache_config.mamba_cache_mode = "align" if has_states(kinds) else "none"
        groups = [KVCacheGroupSpec([f"layer.{i}"], spec) for i, spec in enumerate(specs_of(kinds))]
        cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
        scheduler = utils.create_scheduler(config, blocks, cache)
        chunk_tokens = scheduler.connector.settings.chunk_tokens
        worker = GroupedWorker(scheduler, chunk_tokens=chunk_tokens, store=store, nbytes=nbytes)
        made.append(worker)
        if at_once:
            here[worker.token] = worker.worker
        worker.step()
        return worker

    yield opened
    for worker in made:
        worker.steps.close()


def has_states(kinds: list[Mapping[str, int]]) -> bool:
    return any("state" in kind for kind in kinds)


def reach_of(worker: GroupedWorker, text: list[int]) -> int:
    """Up to where a prompt is loaded that begins as one that was stored; with states to where a step has ended."""
    chunk_tokens = worker.chunk_tokens
    if not any(shape.keeps_state for shape in worker.shapes):
        return len(text) // chunk_tokens * chunk_tokens - (len(text) % chunk_tokens == 0)
    borders = range(0, len(text), chunk_tokens)
    return max((stop for stop in borders if tuple(text[:stop]) in worker.ends), default=0)


def ask(worker: GroupedWorker, text: list[int], count: int = 3, **more: Any) -> str:
    name = worker.add(text, tokens=count, **more)
    worker.run()
    assert worker.answers[name] == plain_answer(worker.shapes, text, count)
    worker.settle()
    return name


@pytest.mark.parametrize("kinds", KINDS)
def test_what_was_stored_is_loaded_up_to_the_last_chunk(make: Make, kinds: str) -> None:
    """Prompts that end at borders of chunks, blocks and windows, one token before and one behind them."""
    worker = make(KINDS[kinds], at_once=list(KINDS).index(kinds) % 2 == 0)
    text = prompt(3, 230)
    ask(worker, text, count=40)
    for length in (229, 225, 224, 223, 193, 192, 161, 160, 159, 97, 96, 65, 64, 33, 32, 31, 20):
        forget(worker)
        reach = reach_of(worker, text[:length])
        name = ask(worker, text[:length])
        loaded = worker.usage[name]["loaded_tokens"].get("host", 0)
        if worker.shapes[0].is_full:
            assert loaded == reach, length
        else:
            assert loaded == reach - worker.shapes[0].first_kept(reach), length
    finish(worker)


@pytest.mark.parametrize("kinds", KINDS)
def test_loads_go_on_behind_what_the_engine_has_itself(make: Make, kinds: str) -> None:
    """And what is computed behind a load, or a hit of vLLM's own cache, is stored for the next one."""
    worker = make(KINDS[kinds])
    rng = random.Random(len(kinds))
    text = prompt(5, 400)
    for _ in range(12):
        if rng.random() < 0.4:
            forget(worker)
        other = [*text[: rng.randrange(10, 400)], *prompt(rng.randrange(5), rng.randrange(60))]
        ask(worker, other, count=rng.randrange(1, 40))
    assert worker.counts["loaded_bytes"] > 0
    assert worker.counts.get("failed_loads", 0) == 0
    finish(worker)


class Losing:
    """Stands before a store's `read` and loses some of what it is asked for by connectors."""

    def __init__(self, store: KVStore, rng: random.Random, ratio: float) -> None:
        self.read, self.rng, self.ratio, self.lost = store.read, rng, ratio, 0

    def __call__(self, key: ChunkKey, *args: Any, **kwargs: Any) -> Hit | None:
        if "timeout_s" in kwargs and self.rng.random() < self.ratio:
            self.lost += 1
            return None
        return self.read(key, *args, **kwargs)


@pytest.mark.parametrize("kinds", KINDS)
def test_bursts_with_losses_preemptions_and_aborts(make: Make, monkeypatch: pytest.MonkeyPatch, kinds: str) -> None:
    """Few blocks, little memory for pieces, pieces lost while they are loaded; every answer is right."""
    groups, caching = len(KINDS[kinds]), list(KINDS).index(kinds) % 2 == 0 or has_states(KINDS[kinds])
    large = KINDS[kinds][0].get("block", 16) // 16
    states = sum("state" in kind for kind in KINDS[kinds])  # of which a request has a few blocks
    blocks = (14 * (groups - states) + 6 * states) // large + 4
    worker = make(KINDS[kinds], blocks=blocks, caching=caching, nbytes=100_000, at_once=caching)
    rng = random.Random(7)
    losing = Losing(worker.kv_store, rng, 0.2)
    monkeypatch.setattr(worker.kv_store, "read", losing)
    bases, texts, aborted = [prompt(seed, 140) for seed in range(4)], {}, set()
    for _ in range(16):
        for _ in range(rng.randrange(1, 4)):
            text = [*rng.choice(bases)[: rng.randrange(20, 140)], *prompt(rng.randrange(100), 5)]
            texts[worker.add(text, tokens=rng.randrange(1, 40))] = text
        for _ in range(rng.randrange(20)):
            worker.step()
        if rng.random() < 0.3:
            name = rng.choice(sorted(worker.requests))
            aborted.add(name)
            worker.abort(name)
        if caching and rng.random() < 0.4:
            worker.run()
            forget(worker)
    worker.run()
    assert all(worker.is_right(name, text) for name, text in texts.items())
    assert not worker.failed
    assert losing.lost
    assert worker.counts["failed_loads"] > 0
    if groups > 2:  # the others hardly fill their blocks
        assert any(request.num_preemptions for request in worker.requests.values())
    losing.ratio = 0.0  # whether bursts load anything, threads decide: what is left behind is loaded as ever
    for _ in range(2):
        worker.settle()
        if caching:
            forget(worker)
        name = ask(worker, bases[0], count=1)
    assert sum(worker.usage[name]["loaded_tokens"].values()) > 0
    finish(worker)


def test_with_policy_fail_a_lost_piece_ends_its_request(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = make([FULL, {"window": 40}], policy="fail")
    text = prompt(1, 120)
    ask(worker, text)
    forget(worker)
    monkeypatch.setattr(worker.kv_store, "read", Losing(worker.kv_store, random.Random(0), 1.0))
    name = worker.add(text)
    worker.run()
    assert worker.failed == {name}
    monkeypatch.undo()
    finish(worker)


def test_a_missing_piece_costs_its_chunk_and_no_more(make: Make) -> None:
    """Pieces are asked for before they are offered: a hit ends behind the last chunk of which all is there."""
    worker = make([FULL, {"window": 40}])
    text = prompt(1, 230)
    ask(worker, text, count=1)
    forget(worker)
    keys = worker.scheduler.connector.scheduler_half._planner._keys.prefixes(text, salt_of(worker))
    keys.extend()
    for chunk, reach in ((6, 192), (3, 192), (5, 96)):  # a window of 40 reaches into two chunks behind the last
        worker.kv_store.delete(keys.of(chunk, 1)[0])
        name = worker.add([*text], {"save": False})
        worker.run()
        assert worker.usage[name]["loaded_tokens"] == {"host": reach}
        assert worker.answers[name] == plain_answer(worker.shapes, text, 4)
        forget(worker)
    finish(worker)


def salt_of(worker: GroupedWorker) -> bytes:
    from kvloom.connectors.identity.requests import chunk_salt

    half = worker.scheduler.connector.scheduler_half
    salt: bytes = half._planner._keys.salt(chunk_salt(cache_salt=b"", adapter=b"", decoding=b""))
    return salt


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("steps", range(1, 6))
@pytest.mark.parametrize("is_in_flight", [False, True], ids=["between steps", "while a step is under way"])
def test_a_reset_revokes_loads_under_way(make: Make, at_once: bool, steps: int, is_in_flight: bool) -> None:
    """Also one that is over, and vLLM not know of it yet. One that vLLM knows of has its KV and goes on with that."""
    worker = make([FULL, {"window": 40}], caching=False, at_once=at_once)
    text, other = prompt(1, 120), prompt(2, 90)
    ask(worker, text)
    name, beside = worker.add(text), worker.add(other)
    if not step_and_reset(worker, name, steps, is_in_flight=is_in_flight):
        assert worker.is_right(name, text)
    again = worker.add(text), worker.add(other)
    worker.run()
    assert worker.is_right(again[0], text), "nothing old was stored under a new name"
    assert worker.is_right(again[1], other)
    assert worker.answers[beside]
    finish(worker)
