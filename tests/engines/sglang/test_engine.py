"""Stock SGLang with three tiers: the same greedy tokens from all of them, after a restart, and through faults."""

import os
import time
from pathlib import Path

import pytest

pytest.importorskip(
    "sglang", reason="stock SGLang is not installed here; `make test-engines` runs this in its own environment"
)

from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

from ..support.engines import make_model, prompts
from .support.engine import DEVICE_TOKENS, PAGE, engine, generate, push_out

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

LENGTHS = (400, 161, 300)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def plain(model: Path) -> list[list[int]]:
    """What SGLang answers without a cache of any kind."""
    with engine(model, None, enable_hierarchical_cache=False, disable_radix_cache=True) as running:
        return [generate(running, prompt)[0] for prompt in prompts(3, LENGTHS)]


def counted(name: str, **labels: str) -> float:
    """A figure of all of SGLang's processes, as its endpoint would show it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    samples = (sample for family in registry.collect() for sample in family.samples if sample.name == name)
    return sum(each.value for each in samples if labels.items() <= each.labels.items())


def whole_pages(length: int) -> int:
    return (length - 1) // PAGE * PAGE


def test_every_tier_gives_the_same_tokens(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    """Cold, device, host, storage; then storage again after a restart."""
    texts = prompts(3, LENGTHS)
    disk = {"disk_path": str(tmp_path / "kv"), "model_id": "tiny"}
    with engine(model, disk, enable_metrics=True) as running:
        for where in ("", "device", "host", "storage"):
            for text, answer in zip(texts, plain, strict=True):
                tokens, details = generate(running, text)
                assert tokens == answer, where
                found = {name: count for name, count in details.items() if isinstance(count, int) and count}
                assert found == ({where: whole_pages(len(text))} if where else {}), (where, details)
            if where == "device":
                push_out(running, 7, DEVICE_TOKENS)
            elif where == "host":
                push_out(running, 8, 3 * DEVICE_TOKENS)
        assert details["storage_backend"] == "KVLoomStorage"
        pages = sum(map(whole_pages, LENGTHS)) // PAGE
        deadline_s = time.monotonic() + 10
        while counted("sglang:kvloom_loaded_pages_total", tier="disk") < pages and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert counted("sglang:kvloom_loaded_pages_total", tier="disk") == pages
        assert counted("sglang:kvloom_saved_pages_total") >= pages and counted("sglang:kvloom_errors_total") == 0
        assert counted("sglang:prefetch_pgs_sum") == pages, "SGLang's own histogram of loads"
    with engine(model, disk, hicache_mem_layout="page_first_direct", hicache_io_backend="direct") as running:
        for text, answer in zip(texts, plain, strict=True):
            tokens, details = generate(running, text)
            assert tokens == answer and details["storage"] == whole_pages(len(text)), details


def test_random_failures_and_delays(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    """SGLang's own injector around the backend: three of ten calls fail, each is late; no token is wrong."""
    texts = prompts(3, LENGTHS)
    faults = {"SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3", "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.05"}
    os.environ.update(faults)
    hits = 0
    try:
        with engine(model, {"disk_path": str(tmp_path / "kv"), "model_id": "tiny"}) as running:
            for _ in range(8):
                for text, answer in zip(texts, plain, strict=True):
                    tokens, details = generate(running, text)
                    assert tokens == answer, details
                    hits += details.get("storage", 0) > 0
                running.flush_cache()
            assert hits > 0, "the storage threads go on"
    finally:
        for name in faults:
            del os.environ[name]


def test_what_is_decided_changes_no_token(model: Path, plain: list[list[int]], tmp_path: Path) -> None:
    """With the plugin, batches teach what computing takes: whatever pays on this machine, answers are the same."""
    texts = prompts(3, LENGTHS)
    settings = {"disk_path": str(tmp_path / "kv"), "model_id": "tiny", "load_or_recompute": "auto"}

    def decisions() -> dict[str, float]:
        reasons = ("untried", "loads", "shortened", "too short to pay", "slow tier", "trial")
        return {reason: counted("sglang:kvloom_decisions_total", reason=reason) for reason in reasons}

    with engine(model, settings, enable_metrics=True) as running:
        before = decisions()
        for _ in range(8):
            for text, answer in zip(texts, plain, strict=True):
                tokens, details = generate(running, text)
                assert tokens == answer, details
            running.flush_cache()
        deadline_s = time.monotonic() + 10
        while sum(told := decisions().values()) - sum(before.values()) < 12 and time.monotonic() < deadline_s:
            generate(running, texts[0][:20])
            time.sleep(0.5)
        new = {reason: count - before[reason] for reason, count in decisions().items()}
        assert new["untried"] > 0 and sum(new.values()) > new["untried"], (new, told)
        assert counted("sglang:kvloom_errors_total") == 0
