"""KVLoomStorage, the storage backend that SGLang loads with `--hicache-storage-backend dynamic`.

    python -m sglang.launch_server --model-path Qwen/Qwen3-8B --page-size 64 --enable-hierarchical-cache \
      --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{"backend_name": "kvloom",
        "module_path": "kvloom.connectors.sglang", "class_name": "KVLoomStorage", "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": true, "disk_path": "kv-cache"}'

SGLang's interface is its own (`HiCacheStorage` of SGLang 0.5.23); what it gives is turned into pages here, and kept by
a `PageStore`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolName, PoolTransferResult
from sglang.srt.observability.metrics_collector import StorageMetrics
from torch import Tensor

from ...core import ChunkKey
from ...errors import EngineError
from ..serving.worker.other_sizes import splits_for, warn_of_other_sizes
from ..serving.worker.store_setup import QualityRecords, is_lossy, open_store
from . import batch_times
from .host_pages import HostPages
from .identity import engine_heads, engine_spec, live_weights
from .load_choice import LoadChoice
from .page_store import Page, PageStore
from .settings import SGLangSettings
from .side_pools import SidePool, restorable_prefixes, transfer_pages
from .stats import EngineMetrics, StatsLine, rank_labels
from .weight_updates import watch

_LOG = logging.getLogger("kvloom")
_FEW_TOKENS = 16


class KVLoomStorage(HiCacheStorage):
    """Pages of one rank, under names that hold everything that shapes their KV.

    Parameters
    ----------
    storage_config : SGLang's; its `extra_config` holds `SGLangSettings`.
    kwargs : nothing, as SGLang calls it.

    Raises
    ------
    ValueError : a setting is wrong.
    """

    def __init__(self, storage_config: Any, kwargs: Any = None) -> None:
        self._config = storage_config
        self._settings = SGLangSettings.of(storage_config.extra_config or {})
        self._open: tuple[HostPages, PageStore] | None = None
        self._side_pools: dict[str, SidePool] = {}
        self._weights: tuple[object, ...] = ()
        self._line = StatsLine()
        self._metrics: EngineMetrics | None = None

    # -------------------------------------------------------------------------------------- attaching, detaching

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the store of this rank.

        Raises
        ------
        EngineError : the engine is one that kvloom cannot serve exactly; says what to change.
        TierError, ValueError, SpecMismatchError, CodecError, UncertifiedError : see `open_store`.
        """
        super().register_mem_pool_host(mem_pool_host)
        pages = HostPages(mem_pool_host)
        spec = engine_spec(self._config, mem_pool_host, pages, self._settings.model_id)
        records = QualityRecords.of(self._settings)
        chunks = open_store(self._settings, spec, records)
        if spec.shard[0] == 0:
            warn_of_other_sizes(self._settings, spec, chunks)
        choice = None
        if self._settings.load_or_recompute == "auto":
            choice = LoadChoice(pages.page_tokens, pages.page_tokens * spec.token_bytes)
            batch_times.watch(choice)
        store = PageStore(
            chunks,
            spec,
            page_tokens=pages.page_tokens,
            salt=self._settings.salt,
            load_timeout_s=self._settings.load_timeout_s,
            is_lossy=is_lossy(self._settings, records),
            splits=splits_for(self._settings, spec, engine_heads()),
            choice=choice,
        )
        self._open = pages, store
        self._weights = live_weights()
        if self._config.enable_storage_metrics:
            self._metrics = EngineMetrics(rank_labels(self._config))
        watch(self)
        _LOG.info("kvloom stores pages of %d tokens as %s", pages.page_tokens, spec.model_id)
        if pages.page_tokens < _FEW_TOKENS:
            _LOG.warning("pages of %d tokens are slow to store; give SGLang --page-size 64", pages.page_tokens)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Take a further pool, whose pages are stored as bytes."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        if host_pool_name == PoolName.KV:
            return
        is_sharded = not self._config.is_mla_model or host_pool_name == PoolName.MAMBA
        rank = f"rank {self._config.tp_rank} of {self._config.tp_size}" if is_sharded else "replicated"
        self._side_pools[str(host_pool_name)] = SidePool(str(host_pool_name), host_pool, rank)

    @property
    def pages(self) -> PageStore:
        """What is stored and found.

        Raises
        ------
        EngineError : no host pool has been registered, or this is closed.
        """
        return self._opened()[1]

    def renew(self) -> None:
        """The weights have changed: nothing stored before is found from now on."""
        if self._open is not None:
            self._open[1].renew()

    def get_stats(self) -> Any:
        """What SGLang asks for in every step if it runs with metrics: pages and speeds for its own histograms."""
        opened, metrics = self._open, self._metrics
        if opened is None or metrics is None or not metrics.is_due():
            return None
        store = opened[1]
        loads, saves = store.take_transfers()
        store.guarded("counting", lambda: metrics.observe(store.counts(), store.store.stats()), None)
        return StorageMetrics(
            prefetch_pgs=[each.pages for each in loads],
            backup_pgs=[each.pages for each in saves],
            prefetch_bandwidth=[each.gb_s for each in loads],
            backup_bandwidth=[each.gb_s for each in saves],
        )

    def clear(self) -> None:
        """Nothing stored before is found by this engine from now on. Other engines keep what they share."""
        self.renew()

    def close(self) -> None:
        """Close the store; what is called afterwards finds and stores nothing."""
        opened, self._open = self._open, None
        if opened is not None:
            _LOG.info("kvloom is detached from SGLang: %s", dict(opened[1].counts()))
            opened[1].close()

    # ----------------------------------------------------------------------------------------- generic interface

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of the keys, from the first on without a gap, are stored."""
        before = None if extra_info is None else extra_info.prefix_keys
        return 0 if not self._is_open() else self.pages.find(keys, before)

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Tensor | None:
        (found,) = self.batch_get([key], [target_location])
        return found

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Tensor | None]:
        """Fill flat pages; from the first that is lost on, None."""
        found: list[Tensor | None] = [None] * len(keys)
        if self._is_open() and target_locations is not None:
            pages, store = self._opened()
            into = self._pages("a load", lambda: [pages.flat_page(flat) for flat in target_locations])
            count = store.read(keys, into) if into else 0
            found[:count] = target_locations[:count]
        return found

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        return self.batch_set([key], [value])

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """Store flat pages; whether all are stored."""
        if not self._is_open() or values is None:
            return False
        pages, store = self._opened()
        held = self._pages("a save", lambda: [pages.flat_page(flat) for flat in values])
        return bool(held) and store.write(keys, held, None)

    # --------------------------------------------------------------------------------------- zero-copy interface

    def batch_get_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Copy pages into the host pool; from the first that is lost on, False."""
        if not self._is_open():
            return [False] * len(keys)
        pages, store = self._opened()
        into = self._pages("a load", lambda: _host_pages(pages, keys, host_indices))
        count = store.read(keys, into) if into else 0
        return [True] * count + [False] * (len(keys) - count)

    def batch_set_v1(self, keys: list[str], host_indices: Tensor, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool, all or, as it is reported, none."""
        if not self._is_open():
            return [False] * len(keys)
        pages, store = self._opened()
        held = self._pages("a save", lambda: _host_pages(pages, keys, host_indices))
        before = None if extra_info is None else extra_info.prefix_keys
        return [bool(held) and store.write(keys, held, before)] * len(keys)

    # ------------------------------------------------------------------------------------- engines of several pools

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """The prefix lengths that KV and all further pools can restore."""
        if not self._is_open():
            return PoolTransferResult.empty()
        store = self.pages
        kv_pages = store.find(keys, decides=False)  # a shorter prefix may be of no use to the other pools
        nothing: Any = PoolTransferResult.empty()

        def look_up() -> Any:
            names = store.keys(keys[:kv_pages])
            pools = self._side_pools

            def has_page(pool: str, page: int) -> bool:
                return pool in pools and pools[pool].key_of(names[page]) in store.store

            restorable, reach = restorable_prefixes(kv_pages, pool_transfers or (), has_page)
            hits = ({PoolName.KV: kv_pages} if kv_pages else {}) | reach
            return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

        return store.guarded("a look-up", look_up, nothing)

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Copy pages of further pools into host memory."""
        return self._move(transfers, "a load", lambda pool, key, token: pool.read(self.pages.store, key, token))

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        """Store pages of further pools."""
        return self._move(transfers, "a save", lambda pool, key, token: pool.write(self.pages.store, key, token))

    def _move(self, transfers: Sequence[Any], what: str, move: Any) -> dict[Any, list[bool]]:
        results = {transfer.name: [False] * len(transfer.keys or ()) for transfer in transfers}
        for transfer in transfers:
            failed = results[transfer.name]
            if self._is_open() and failed:
                moved = partial(self._move_one, transfer, move)
                results[transfer.name] = self.pages.guarded(what, moved, failed)
        return results

    def _move_one(self, transfer: Any, move: Callable[[SidePool, ChunkKey, int], bool]) -> list[bool]:
        return transfer_pages(self._side_pools, transfer, self.pages.keys(transfer.keys), move)

    # ------------------------------------------------------------------------------------------------------- parts

    def _is_open(self) -> bool:
        """Whether a store is open; looks first whether the weights are still those that its names stand for."""
        opened = self._open
        if opened is None:
            return False
        self._line.say(opened[1].counts)
        weights = live_weights()
        if weights != self._weights:
            self._weights = weights
            self.renew()
        return True

    def _opened(self) -> tuple[HostPages, PageStore]:
        if self._open is None:
            raise EngineError("kvloom is not attached to SGLang's host memory")
        return self._open

    def _pages(self, what: str, views: Callable[[], list[Page]]) -> list[Page]:
        """The pages that `views` gives; none if SGLang gave something else than pages."""
        nothing: list[Page] = []
        return self.pages.guarded(what, views, nothing)


def _host_pages(pages: HostPages, keys: Sequence[str], host_indices: Tensor) -> list[Page]:
    if host_indices.numel() != len(keys) * pages.page_tokens:
        raise EngineError(f"{host_indices.numel()} indices for {len(keys)} pages of {pages.page_tokens} tokens")
    return [pages.page(first) for first in host_indices[:: pages.page_tokens].tolist()]
