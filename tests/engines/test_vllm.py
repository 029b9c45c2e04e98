"""KVLoomConnector in stock vLLM: equal tokens with and without it, and what became of chunks when things go wrong.

One engine serves all tests of this file; before it, another one was killed that had the same folder on disk.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)

from kvloom import cli
from kvloom.kvstore.store import KVStore

from .support import engines
from .support.engines import BLOCK, CHUNK, DECLINED, generate, make_model, prompts, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

BLOCKS = 72  # 2,304 tokens: eight long requests do not fit, and preempt one another


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine that finds the folder of one that was killed."""
    folder = tmp_path_factory.mktemp("vllm")
    model = make_model(folder / "model")
    disk = folder / "disk"
    victim = subprocess.run(
        [sys.executable, engines.__file__, str(model), str(disk)], capture_output=True, text=True, check=False
    )
    assert victim.returncode == -9, victim.stderr[-3000:]
    engine = engines.start(
        model,
        {"host_bytes": "256MiB", "disk_path": str(disk), "load_timeout_s": 2.0},
        num_gpu_blocks_override=BLOCKS,
        enable_prefix_caching=True,
    )
    engine.answers = json.loads((disk / "answers.json").read_text())
    yield engine
    engine.llm_engine.engine_core.shutdown()


@pytest.fixture(autouse=True)
def a_cold_engine(llm: Any) -> Iterator[None]:
    """Nothing in vLLM's own prefix cache; afterwards no block is still held."""
    assert llm.reset_prefix_cache()
    yield
    assert idle(llm), "blocks are still held"


def store_of(llm: Any) -> KVStore:
    return connector_of(llm).worker.transfers.store


def connector_of(llm: Any) -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def scheduler_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


def idle(llm: Any) -> bool:
    scheduler = scheduler_of(llm)
    return not scheduler.requests and scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == BLOCKS - 1


def settle(llm: Any) -> None:
    """Wait until what was to be stored is stored."""
    assert connector_of(llm).worker.transfers.settle(30.0)


def metric(llm: Any, name: str) -> float:
    return sum(m.value for m in llm.get_metrics() if m.name == f"vllm:{name}")


def stored(
    llm: Any, seed: int, lengths: tuple[int, ...], *, tokens: int = 20
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts whose KV is in the store and not in vLLM's cache, and what plain vLLM answers to them."""
    texts = prompts(seed, lengths)
    plain = tokens_of(generate(llm, texts, DECLINED, tokens=tokens))
    assert llm.reset_prefix_cache()
    assert tokens_of(generate(llm, texts, tokens=tokens)) == plain
    settle(llm)
    assert llm.reset_prefix_cache()
    return texts, plain


def test_a_killed_engine_left_its_chunks(llm: Any) -> None:
    texts = prompts(11, (300, 130))
    outputs = generate(llm, texts, tokens=70)
    assert tokens_of(outputs) == llm.answers
    assert [usage(output)["loaded_tokens"] for output in outputs] == [{"disk": 256}, {"disk": 128}]
    assert [output.num_cached_tokens for output in outputs] == [256, 128]
    follow_ups = [text + answer + [7] for text, answer in zip(texts, llm.answers, strict=True)]
    assert llm.reset_prefix_cache()
    loaded = generate(llm, follow_ups)
    assert [sum(usage(output)["loaded_tokens"].values()) for output in loaded] == [320, 192], "generated tokens, too"
    assert llm.reset_prefix_cache()
    assert tokens_of(loaded) == tokens_of(generate(llm, follow_ups, DECLINED))


def test_tokens_are_identical_over_many_prompts(llm: Any) -> None:
    """104 prompts of all lengths in batches, computed in pieces, preempting one another; computed, stored, loaded."""
    edges = (CHUNK, CHUNK + 1, CHUNK - 1, BLOCK, 2 * CHUNK)
    lengths = (*(1 + (37 * i) % 420 for i in range(96)), *edges, 600, 610, 620)
    before = metric(llm, "num_preemptions")
    texts, plain = stored(llm, 5, lengths, tokens=70)
    outputs = generate(llm, texts, tokens=70)
    assert tokens_of(outputs) == plain
    assert metric(llm, "num_preemptions") > before
    first_loads = [sum(usage(output)["loaded_tokens"].values()) for output in outputs]
    assert sum(first_loads) > 0.7 * sum(lengths)
    assert not any(usage(output)["failed"] for output in outputs)
    assert llm.reset_prefix_cache()
    loaded_and_not = generate(llm, texts[:20:2]) + generate(llm, prompts(6, lengths[1:20:2]), DECLINED)
    assert tokens_of(loaded_and_not[:10]) == [answer[:20] for answer in plain[:20:2]]


def test_loads_continue_what_the_engine_has_itself(llm: Any) -> None:
    """A prefix in vLLM's own cache, the rest in the store: only the rest is loaded."""
    (text,), (plain,) = stored(llm, 21, (300,))
    generate(llm, [text[:100]], DECLINED)
    (output,) = generate(llm, [text])
    assert tokens_of([output]) == [plain]
    assert sum(usage(output)["loaded_tokens"].values()) == 256 - 96
    (again,) = generate(llm, [text])
    assert usage(again)["loaded_tokens"] == {}, "now the engine has it all"


class Faults:
    """Stands before a store's `read` and does harm to some calls."""

    def __init__(self, store: KVStore, harm: Callable[[int], bool]) -> None:
        self.read, self.harm, self.calls = store.read, harm, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "timeout_s" not in kwargs:  # the store's own call within
            return self.read(*args, **kwargs)
        self.calls += 1
        return None if self.harm(self.calls - 1) else self.read(*args, **kwargs)


def late(call: int) -> bool:
    time.sleep(2.5)
    return True


def raising(call: int) -> bool:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("harm", "kept"),
    [(lambda call: True, 0), (lambda call: call == 2, 128), (lambda call: call == 3, 192), (raising, 0), (late, 0)],
    ids=["all", "the third", "the last", "raising", "late"],
)
def test_lost_chunks_are_computed(
    llm: Any, monkeypatch: pytest.MonkeyPatch, harm: Callable[[int], bool], kept: int
) -> None:
    """What was lost is counted once, and never asked for again by the same request."""
    (text,), (plain,) = stored(llm, 31, (300,))
    store = store_of(llm)
    before = metric(llm, "kvloom_failed_loads")
    faults = Faults(store, harm)
    monkeypatch.setattr(store, "read", faults)
    (output,) = generate(llm, [text])
    assert tokens_of([output]) == [plain]
    assert (usage(output)["failed"], sum(usage(output)["loaded_tokens"].values())) == (True, kept)
    assert faults.calls == kept // CHUNK + 1
    monkeypatch.undo()
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, [text])
    assert (tokens_of([output]), usage(output)["failed"]) == ([plain], False), "the next request finds it again"
    assert metric(llm, "kvloom_failed_loads") == before + 1


def test_faults_hit_only_whom_they_concern(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, plain = stored(llm, 41, (200, 310, 130, 420, 65, 64))
    monkeypatch.setattr(store_of(llm), "read", Faults(store_of(llm), lambda call: call % 3 == 1))
    outputs = generate(llm, texts)
    assert tokens_of(outputs) == plain
    failed = [usage(output)["failed"] for output in outputs]
    assert any(failed)
    assert not all(failed)


def test_aborted_requests_leave_nothing(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aborted while it waits, loads, computes or generates; the next requests are answered as ever."""
    texts, plain = stored(llm, 51, (300, 200))
    store, gate = store_of(llm), threading.Event()
    read = store.read

    def wait_for_gate(*args: Any, **kwargs: Any) -> Any:
        gate.wait(20)
        return read(*args, **kwargs)

    monkeypatch.setattr(store, "read", wait_for_gate)
    engine = llm.llm_engine
    for steps in range(12):
        name = f"doomed-{steps}"
        engine.add_request(name, {"prompt_token_ids": texts[steps % 2]}, engines.sampling(tokens=40))
        if steps % 3 == 2:
            gate.set()
        for _ in range(steps):
            engine.step()
        engine.abort_request([name])
        if steps % 3 == 1:
            engine.step()
        gate.set()
        while scheduler_of(llm).has_requests():
            engine.engine_core.get_output()
        gate.clear() if steps % 2 else gate.set()
    gate.set()
    assert tokens_of(generate(llm, texts)) == plain


def test_salts_and_wrong_options(llm: Any) -> None:
    texts, plain = stored(llm, 61, (200,))
    (salted,) = generate(llm, texts, cache_salt="another tenant")
    assert usage(salted)["loaded_tokens"] == {}
    assert tokens_of([salted]) == plain
    assert llm.reset_prefix_cache()
    before = metric(llm, "kvloom_refused_requests")
    (refused,) = generate(llm, texts, {"documents": [[0, 1000]]})
    assert refused.kv_transfer_params is None
    assert tokens_of([refused]) == plain
    assert metric(llm, "kvloom_refused_requests") == before + 1


def test_what_is_counted(llm: Any) -> None:
    names = ("kvloom_hit_tokens", "kvloom_saved_tokens", "kvloom_loaded_tokens", "external_prefix_cache_hits")
    names += ("kvloom_decisions",)
    before = {name: metric(llm, name) for name in names}
    (text,), _ = stored(llm, 71, (300,))
    generate(llm, [text])
    grown = {name: metric(llm, name) - before[name] for name in names}
    assert grown == {
        "kvloom_hit_tokens": 256,
        "kvloom_saved_tokens": 256,
        "kvloom_loaded_tokens": 256,
        "external_prefix_cache_hits": 256,
        "kvloom_decisions": 2,
    }


def test_a_reset_forgets_what_was_stored(llm: Any) -> None:
    """The last test: it makes the engine forget."""
    (text,), (plain,) = stored(llm, 81, (200,))
    assert llm.llm_engine.engine_core.reset_prefix_cache(False, True)
    (output,) = generate(llm, [text])
    assert usage(output)["loaded_tokens"] == {}
    assert tokens_of([output]) == [plain]


def test_users_need_no_module_path() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if point.value.startswith("kvloom.")]
    if not found:
        pytest.skip("kvloom is on the path but not installed, so that vLLM cannot find its entry point")
    from vllm.config import KVTransferConfig
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    found[0].load()()
    config = KVTransferConfig(kv_connector="KVLoomConnector", kv_role="kv_both")
    assert KVConnectorFactory.get_connector_class(config).__module__ == "kvloom.connectors.vllm.connector"


def test_the_command_line_explains_a_request_that_was_just_served(
    llm: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = prompts(77, (200,))
    generate(llm, text)
    assert connector_of(llm).worker.transfers.settle(20.0)
    assert llm.reset_prefix_cache()
    (output,) = generate(llm, text)
    folder = scheduler_of(llm).connector.settings.disk_path
    told, deadline_s = "", time.monotonic() + 20
    while "192 of 200" not in told and time.monotonic() < deadline_s:  # written in the background
        with pytest.raises(SystemExit) as leave:
            cli.main(["explain", output.request_id, "--disk-path", folder, "--json", str(tmp_path / "told.json")])
        told = capsys.readouterr().out if not leave.value.code else ""
    assert "192 of 200 prompt tokens were loaded (host)" in told and "always: the settings say so" in told
    (record,) = json.loads((tmp_path / "told.json").read_text())
    assert usage(output).items() <= record.items()
