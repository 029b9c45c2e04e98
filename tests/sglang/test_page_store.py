"""What a rank stores and finds by SGLang's hashes: names, positions, faults, renewals."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvloom.compress.registry import codec_by_name
from kvloom.connectors.serving.head_splits import heads_of
from kvloom.connectors.serving.worker.arrivals import UNKNOWN
from kvloom.connectors.serving.worker.other_sizes import splits_for
from kvloom.connectors.sglang.host_pages import HostPages
from kvloom.connectors.sglang.page_store import PageStore
from kvloom.connectors.sglang.settings import SGLangSettings
from kvloom.core import KVChunk, KVSpec, RopeSpec
from kvloom.kvstore.keys import page_hashes, prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import leaves_no_threads
from .simulated import DIM, HEADS, LAYERS, PAGE, Pool

SPEC = KVSpec("model", LAYERS, HEADS, DIM, torch.float32, RopeSpec((1.0, 0.1, 0.01, 0.001)))
TOKENS = list(range(100, 100 + 4 * PAGE))
HASHES = [each.hex() for each in page_hashes(TOKENS, chunk_tokens=PAGE)]


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def opened(store: KVStore | None = None, *, salt: str = "", is_lossy: bool = False) -> PageStore:
    store = KVStore([HostTier(1 << 20)]) if store is None else store
    return PageStore(store, SPEC, page_tokens=PAGE, salt=salt, load_timeout_s=5.0, is_lossy=is_lossy)


def pages_of(pool: Pool, count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [HostPages(pool).page(i * PAGE) for i in range(count)]


def filled() -> Pool:
    pool = Pool("page_first")
    pool.fill()
    return pool


def test_what_is_stored_is_found_in_another_layout() -> None:
    store, source, target = opened(), filled(), Pool("page_head")
    assert store.find(HASHES) == 0
    assert store.write(HASHES[:3], pages_of(source, 3), [])
    assert store.find(HASHES) == 3 and store.find(HASHES[1:]) == 2 and store.find(HASHES[3:]) == 0
    assert store.read(HASHES, pages_of(target)) == 3
    for i in range(3):
        for one, other in zip(HostPages(source).page(i * PAGE), HostPages(target).page(i * PAGE), strict=True):
            assert torch.equal(one, other)
    assert not any(part.any() for part in HostPages(target).page(3 * PAGE)), "nothing is written for what is lost"
    counts = store.counts()
    assert (counts["saved_pages"], counts["loaded_pages.host"], counts["lost_pages"]) == (3, 3, 1)
    assert store.store.stats().pinned == 0, "what was read is let go"
    loads, saves = store.take_transfers()
    assert [each.pages for each in loads] == [3] == [each.pages for each in saves] and loads[0].gb_s > 0
    assert store.take_transfers() == ([], [])
    assert store.find(HASHES) == 3 and store.store.stats().pinned == 3
    assert store.read(HASHES[:2], pages_of(target, 2)) == 2 and store.store.stats().pinned == 3, "a batch of several"
    assert store.read(HASHES[2:3], pages_of(target, 1)) == 1 and store.store.stats().pinned == 0
    store.close()


def test_chunks_are_those_of_an_engine_that_has_tokens() -> None:
    """vLLM names chunks by tokens; what one stores, the other finds, at the same position."""
    store, source = opened(salt="tenant"), filled()
    assert store.write(HASHES[2:], pages_of(source, 2), HASHES[:2])
    from kvloom.connectors.identity.requests import chunk_salt

    keys = prefix_keys(SPEC, TOKENS, chunk_tokens=PAGE, salt=chunk_salt(tenant=b"tenant"))
    assert store.store.locate_prefix(keys) == () and store.store.locate_prefix(keys[2:]) == ("host", "host")
    found = store.store.get(keys[3])
    assert found is not None and found.positions.tolist() == list(range(3 * PAGE, 4 * PAGE))
    assert found.token_ids.tolist() == [UNKNOWN] * PAGE
    first = torch.arange(PAGE)
    store.store.put(keys[0], KVChunk(SPEC, torch.tensor(TOKENS[:PAGE]), first, *pages_of(source, 1)[0]))
    assert store.find(HASHES) == 1
    store.close()


def test_without_hashes_in_front_positions_are_unknown() -> None:
    store = opened()
    assert store.write(HASHES[:1], pages_of(filled(), 1), None)
    found = store.store.get(store.keys(HASHES[:1])[0])
    assert found is not None and found.positions.tolist() == [UNKNOWN] * PAGE
    assert store.read(HASHES[:1], pages_of(Pool(), 1)) == 1
    store.close()


def test_lossy_codecs_must_know_positions() -> None:
    tiers = KVStore([HostTier(1 << 20)], codec=codec_by_name("int8"), allow_uncertified=True)
    with pytest.warns(UserWarning):
        store = opened(tiers, is_lossy=True)
        assert not store.write(HASHES[:1], pages_of(filled(), 1), None)
        assert store.find(HASHES) == 0 and store.counts()["failed_saves"] == 1
        assert store.write(HASHES[:1], pages_of(filled(), 1), [])
        assert store.find(HASHES) == 1
    store.close()


def test_names_hold_model_rank_tenant_and_length() -> None:
    keys = {opened().keys(HASHES)[0], opened(salt="a").keys(HASHES)[0], opened(salt="b").keys(HASHES)[0]}
    shard = KVSpec("model", LAYERS, HEADS, DIM, torch.float32, SPEC.rope, shard=(1, 2))
    half = KVSpec("model", LAYERS, HEADS, DIM, torch.bfloat16, SPEC.rope)
    for spec, page in ((shard, PAGE), (half, PAGE), (SPEC, 2 * PAGE)):
        store = PageStore(KVStore([HostTier(1)]), spec, page_tokens=page, salt="", load_timeout_s=1.0, is_lossy=False)
        keys.add(store.keys(HASHES)[0])
    assert len(keys) == 6


def test_after_a_renewal_nothing_old_is_found() -> None:
    store = opened()
    assert store.write(HASHES, pages_of(filled()), [])
    store.renew()
    assert store.find(HASHES) == 0 and store.read(HASHES, pages_of(Pool())) == 0
    assert store.write(HASHES, pages_of(filled()), []) and store.find(HASHES) == 4
    store.close()


def test_faults_are_misses(caplog: pytest.LogCaptureFixture) -> None:
    store = opened()
    assert store.write(HASHES, pages_of(filled()), [])
    assert store.find(["no hash"]) == 0, "SGLang's threads go on"
    store.store.close()
    assert store.find(HASHES) == 0
    assert store.read(HASHES, pages_of(Pool())) == 0
    assert not store.write(HASHES, pages_of(filled()), [])
    assert store.counts()["errors"] == 4 and "it is a miss" in caplog.text


def test_a_page_of_another_length_is_a_miss(tmp_path: Path) -> None:
    store = opened()
    (key,) = store.keys(HASHES[:1])
    long = torch.zeros(LAYERS, HEADS, PAGE + 1, DIM)
    store.store.put(key, KVChunk(SPEC, torch.arange(PAGE + 1), torch.arange(PAGE + 1), long, long))
    assert store.find(HASHES) == 1 and store.read(HASHES, pages_of(Pool())) == 0
    store.close()


def test_a_late_page_is_a_miss() -> None:
    store = opened()
    assert store.write(HASHES, pages_of(filled()), [])
    store._load_timeout_s = -1.0
    assert store.read(HASHES, pages_of(Pool())) == 0
    store.close()


def of_rank(rank: int, size: int, heads: int) -> KVSpec:
    first, last = heads_of(rank, size, heads)
    return replace(SPEC, num_kv_heads=last - first, shard=(rank, size))


def pages_of_rank(spec: KVSpec, kv: torch.Tensor, heads: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of `kv`, `[2, L, heads, T, D]`."""
    first, last = heads_of(*spec.shard, heads)
    return [tuple(kv[:, :, first:last, i * PAGE : (i + 1) * PAGE]) for i in range(4)]  # type: ignore[misc]


@pytest.mark.parametrize(("heads", "one", "two"), [(4, 1, 2), (4, 2, 1), (4, 2, 4), (2, 1, 4), (2, 4, 1)])
@pytest.mark.parametrize("named", [True, False])
def test_ranks_of_another_size(heads: int, one: int, two: int, named: bool, tmp_path: Path) -> None:
    """They find every page if they name it, and nothing otherwise."""
    kv = torch.randn(2, LAYERS, heads, 4 * PAGE, DIM, generator=torch.Generator().manual_seed(2))
    settings = SGLangSettings.of(
        {"disk_path": str(tmp_path), **({"tensor_parallel_sizes": [one, two]} if named else {})}
    )
    for rank in range(one):
        spec = of_rank(rank, one, heads)
        disk = KVStore([DiskTier(tmp_path)])
        writer = PageStore(disk, spec, page_tokens=PAGE, salt="", load_timeout_s=5.0, is_lossy=False)
        assert writer.write(HASHES, pages_of_rank(spec, kv, heads), [])
        writer.close()
    for rank in range(two):
        spec = of_rank(rank, two, heads)
        splits = splits_for(settings, spec, heads)
        store = PageStore(
            KVStore([DiskTier(tmp_path)]),
            spec,
            page_tokens=PAGE,
            salt="",
            load_timeout_s=5.0,
            is_lossy=False,
            splits=splits,
        )
        into = [tuple(torch.zeros_like(part) for part in page) for page in pages_of_rank(spec, kv, heads)]
        expected = 4 if named else 0
        assert store.find(HASHES) == expected and bool(store.store.stats().pinned) == bool(expected)
        assert store.read(HASHES, into) == expected  # type: ignore[arg-type]
        for page, right in zip(into, pages_of_rank(spec, kv, heads), strict=True):
            for mine, theirs in zip(page, right, strict=True):
                assert torch.equal(mine, theirs if expected else torch.zeros_like(theirs))
        assert store.store.stats().pinned == 0 and store.counts().get("joined_chunks", 0) == expected
        store.close()
