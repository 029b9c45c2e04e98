"""SGLang's real controller, pools and threads around kvloom: every layout and interface, bit for bit."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "sglang", reason="stock SGLang is not installed here; `make test-engines` runs this in its own environment"
)

import torch

from kvloom.kvstore.keys import page_hashes

from ..support.engines import make_model
from .support.controller import BACKEND, PAGE, Cache, sglang

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(600)]

LAYOUTS = ["layer_first", "page_first", "page_first_direct", "page_head"]


@pytest.fixture(scope="module", autouse=True)
def _sglang(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with sglang(make_model(tmp_path_factory.mktemp("model"))):
        yield


def hashes_of(tokens: list[int]) -> list[str]:
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    hashes: list[str] = get_storage_hash_str(tokens, None, page_size=PAGE)
    return hashes


def opened(layout: str, folder: Path, *, latent: bool = False, **extra: Any) -> Cache:
    return Cache(layout, "dynamic", {**BACKEND, "disk_path": str(folder), "model_id": "tiny", **extra}, latent=latent)


def saved(cache: Cache, tokens: list[int], *, before: list[str] | None = None) -> list[torch.Tensor]:
    where = cache.fill(len(tokens), seed=5)
    kv = cache.kv(where)
    assert cache.save(where, tokens, hashes_of(tokens), before) == len(tokens)
    cache.allocator.free(where)
    cache.wipe()
    return kv


def same(cache: Cache, where: torch.Tensor, kv: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(cache.kv(where), kv, strict=True))


def test_page_hashes_are_sglangs() -> None:
    from sglang.srt.mem_cache.utils import get_hash_str

    rows = [list(range(70)), [2**32, 1, 2**40, 7] * 10, [0] * 64, [2**32 - 1] * 48]
    for page in (1, 3, 16):
        for row in rows:
            whole = row[: len(row) // page * page]
            ours = page_hashes(row, chunk_tokens=page)
            assert [each.hex() for each in ours] == get_hash_str(whole, None, page_size=page)
            last = get_hash_str(whole[page:], ours[0].hex(), page_size=page)[-1]
            assert last == ours[-1].hex()


@pytest.mark.parametrize("zero_copy", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kv_is_identical_in_every_layout(layout: str, zero_copy: int, tmp_path: Path) -> None:
    """Device, host, storage, and back, 200 pages in batches of 128; then found by a cache of another layout."""
    tokens = list(range(1000, 1000 + 40 * PAGE))
    cache = opened(layout, tmp_path, interface_v1=zero_copy)
    assert cache.load(tokens) == (0, None)
    kv = saved(cache, tokens, before=[])
    found, where = cache.load([*tokens, *range(3 * PAGE)])
    assert found == len(tokens) and where is not None and same(cache, where, kv)
    assert cache.load([1, *tokens[1:]]) == (0, None), "the first page differs, and all behind it"
    counts = cache.controller.storage_backend.pages.counts()
    assert counts["saved_pages"] == 40 and counts.get("errors", 0) == 0
    cache.close()
    other = opened(LAYOUTS[LAYOUTS.index(layout) - 1], tmp_path, interface_v1=1)
    found, where = other.load(tokens)
    assert found == len(tokens) and where is not None and same(other, where, kv)
    other.close()


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_latent_caches(layout: str, tmp_path: Path) -> None:
    tokens = list(range(20 * PAGE))
    cache = opened(layout, tmp_path, latent=True, interface_v1=1)
    kv = saved(cache, tokens, before=[])
    found, where = cache.load(tokens)
    assert found == len(tokens) and where is not None and same(cache, where, kv)
    cache.close()


def test_batches_of_many_pages(tmp_path: Path) -> None:
    cache = opened("page_first", tmp_path, interface_v1=1)
    tokens = [7 * i % 500 for i in range(130 * PAGE - PAGE * 5)]
    kv = saved(cache, tokens[: 120 * PAGE], before=[])
    found, where = cache.load(tokens)
    assert found == 120 * PAGE and where is not None and same(cache, where, kv)
    cache.close()


def test_damaged_pages_are_recomputed(tmp_path: Path) -> None:
    """A flipped bit on disk ends the hit in front of it; no wrong KV, and every thread lives."""
    tokens = list(range(30 * PAGE))
    cache = opened("page_first", tmp_path, interface_v1=1)
    kv = saved(cache, tokens, before=[])
    cache.close()
    (segment,) = (tmp_path / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    for place in range(len(data) // 2, len(data), 1 << 16):
        data[place] ^= 1
    segment.write_bytes(data)
    cache = opened("page_first", tmp_path, interface_v1=1)
    found, where = cache.load(tokens)
    assert found == len(tokens) and where is not None and 0 < len(where) < len(tokens)
    assert same(cache, where, [each[: len(where)] for each in kv])
    threads = ("prefetch_thread", "prefetch_io_aux_thread", "prefetch_sync_thread", "backup_thread")
    assert all(getattr(cache.controller, name).is_alive() for name in threads)
    cache.close()


def test_names_are_apart(tmp_path: Path) -> None:
    """Model, tenant: nothing of one is found by another. Detached, nothing is found, and it can be attached again."""
    tokens = list(range(8 * PAGE))
    cache = opened("layer_first", tmp_path, model_id="one")
    saved(cache, tokens, before=[])
    cache.close()
    for extra in ({"model_id": "two"}, {"model_id": "one", "salt": "tenant"}):
        other = opened("layer_first", tmp_path, **extra)
        assert other.load(tokens) == (0, None)
        other.close()
    again = opened("layer_first", tmp_path, model_id="one")
    backend = again.controller.storage_backend
    assert again.load(tokens)[0] == len(tokens)
    backend.clear()
    assert again.load(tokens) == (0, None)
    again.close()
    assert backend.batch_exists(hashes_of(tokens)) == 0 and not backend.batch_set_v1(hashes_of(tokens), None)[0]


def test_wrong_settings_end_the_attach(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 'disk_paths'; known are host_bytes"):
        opened("layer_first", tmp_path, disk_paths="x")


def test_updated_weights_end_all_names(tmp_path: Path) -> None:
    from sglang.srt.runtime_context import get_context

    tokens = list(range(8 * PAGE))
    cache = opened("layer_first", tmp_path)
    saved(cache, tokens, before=[])
    assert cache.load(tokens)[0] == len(tokens)
    get_context().override("scheduler.weight_version", weight_version="another")
    assert cache.load(tokens) == (0, None)
    cache.close()


def test_a_slow_tier_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found, not loaded, and the same KV whenever it is loaded; SGLang's threads go on."""
    tokens = list(range(20 * PAGE))
    own = {"interface_v1": 1, "load_or_recompute": "auto"}
    cache = opened("page_first", tmp_path, **own)
    kv = saved(cache, tokens, before=[])
    store = cache.controller.storage_backend.pages
    read = store._reader.read

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return read(*arguments, **options)

    monkeypatch.setattr(store._reader, "read", slow)
    for _ in range(4):
        store.choice.observe_prefill(4 * PAGE, 2 * PAGE, 1e-3)
    for _ in range(3):
        found, where = cache.load(tokens)
        assert found == len(tokens) and where is not None and same(cache, where, kv)
        cache.allocator.free(where)
    assert cache.load(tokens) == (0, None)
    assert store.counts()["decisions.slow tier"] == 1 and store.counts()["left_pages"] == 20
    cache.close()
