"""Which other tensor-parallel sizes a worker looks for, and which it could look for. Imports no engine."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace

from ....compress.envelope import spec_of_blob
from ....core import KVSpec, Tier
from ....errors import CodecError, TierError
from ....kvstore.capabilities import ReadsLayers
from ....kvstore.store import KVStore
from ..head_splits import HeadSplit, split_for
from ..store_settings import StoreSettings

_SAMPLE = 16  # chunks of a folder, the newest

_LOG = logging.getLogger("kvloom")


def splits_for(settings: StoreSettings, spec: KVSpec, heads: int) -> tuple[HeadSplit, ...]:
    """Where else the heads of a rank may be stored, for each size that the settings name and that fits the model.

    The log says which do not fit, and why.

    Parameters
    ----------
    heads : KV heads of the whole model.
    """
    splits = []
    for size in dict.fromkeys(settings.tensor_parallel_sizes):
        if size == spec.shard[1] or not spec.value_dim:  # every rank has the whole of a latent cache
            continue
        try:
            splits.append(split_for(spec, heads, size))
        except ValueError as exc:
            _LOG.warning("KV of tensor-parallel size %d is not looked for: %s", size, exc)
    return tuple(splits)


def warn_of_other_sizes(settings: StoreSettings, spec: KVSpec, store: KVStore) -> None:
    """Say so if the disk tier holds KV of this model that was stored at a size which the settings do not name."""
    wanted = {spec.shard[1], *settings.tensor_parallel_sizes}
    for tier in store.tiers:
        if tier.name == "disk" and (found := _sizes_in(tier, spec) - wanted):
            _LOG.warning(
                "%s holds KV of this model of tensor-parallel size %s; this engine has size %d and does not look for "
                'it: give "tensor_parallel_sizes": %s',
                settings.disk_path,
                " and ".join(map(str, sorted(found))),
                spec.shard[1],
                sorted(wanted | found),
            )


def holds_others_only(spec: KVSpec, store: KVStore) -> bool:
    """Whether the tiers that outlive engines hold chunks, and none of their newest ones is of this model and rank."""
    found = [other for tier in store.tiers for other in _newest(tier)]
    return bool(found) and spec not in found


def _sizes_in(tier: Tier, spec: KVSpec) -> set[int]:
    """Tensor-parallel sizes of the model's newest chunks in a tier."""
    return {
        other.shard[1]
        for other in _newest(tier)
        if replace(other, num_kv_heads=spec.num_kv_heads, shard=spec.shard) == spec
    }


def _newest(tier: Tier) -> list[KVSpec]:
    """Specs of the newest chunks in a tier that reads layers alone."""
    specs: list[KVSpec] = []
    if not isinstance(tier, ReadsLayers):
        return specs
    with suppress(TierError):
        for entry in tier.entries()[-_SAMPLE:]:
            with suppress(CodecError, ValueError):  # damaged: found so when it is read
                blob = tier.get_layers(entry.key, 0, 1)
                found = None if blob is None else spec_of_blob(blob)
                if found:
                    specs.append(found)
    return specs
