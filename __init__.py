"""kvloom: keep, compress, search and fuse the KV caches of long contexts.

Names are resolved on first use, so that `import kvloom` loads neither torch nor any engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .blend.blender import Blender as Blender
    from .calibration.certificate import Certificate as Certificate
    from .calibration.model_profile import Profile as Profile
    from .compress.raw import RawCodec as RawCodec
    from .compress.registry import codec_by_name as codec_by_name
    from .connectors.hf.connector import TransformersConnector as TransformersConnector
    from .core import ChunkKey as ChunkKey
    from .core import Codec as Codec
    from .core import EncodedChunk as EncodedChunk
    from .core import KVChunk as KVChunk
    from .core import KVSpec as KVSpec
    from .core import LayerAttention as LayerAttention
    from .core import LayerRopes as LayerRopes
    from .core import LayerwiseModel as LayerwiseModel
    from .core import RopeSpec as RopeSpec
    from .core import Tier as Tier
    from .errors import KVLoomError as KVLoomError
    from .kvstore.keys import content_key as content_key
    from .kvstore.keys import prefix_keys as prefix_keys
    from .kvstore.placement.quota import Quota as Quota
    from .kvstore.store import KVStore as KVStore
    from .kvstore.tiers.device import DeviceTier as DeviceTier
    from .kvstore.tiers.disk.tier import DiskTier as DiskTier
    from .kvstore.tiers.distributed.mooncake_tier import MooncakeOptions as MooncakeOptions
    from .kvstore.tiers.distributed.mooncake_tier import MooncakeTier as MooncakeTier
    from .kvstore.tiers.distributed.object_tier import ObjectStoreTier as ObjectStoreTier
    from .kvstore.tiers.distributed.object_tier import s3_store as s3_store
    from .kvstore.tiers.distributed.redis_tier import RedisTier as RedisTier
    from .kvstore.tiers.distributed.tier import Sharing as Sharing
    from .kvstore.tiers.host import HostTier as HostTier
    from .kvstore.tiers.remote.client import AsyncKVLoomClient as AsyncKVLoomClient
    from .kvstore.tiers.remote.client import KVLoomClient as KVLoomClient
    from .kvstore.tiers.remote.tier import RemoteTier as RemoteTier
    from .kvstore.tiers.shared import SharedTier as SharedTier
    from .rag.corpus import Corpus as Corpus
    from .retrieval.settings import Retrieval as Retrieval

_HOME = {
    "AsyncKVLoomClient": "kvstore.tiers.remote.client",
    "Blender": "blend.blender",
    "Certificate": "calibration.certificate",
    "ChunkKey": "core",
    "Codec": "core",
    "Corpus": "rag.corpus",
    "DeviceTier": "kvstore.tiers.device",
    "DiskTier": "kvstore.tiers.disk.tier",
    "EncodedChunk": "core",
    "HostTier": "kvstore.tiers.host",
    "KVChunk": "core",
    "KVLoomClient": "kvstore.tiers.remote.client",
    "KVLoomError": "errors",
    "KVSpec": "core",
    "KVStore": "kvstore.store",
    "LayerAttention": "core",
    "LayerRopes": "core",
    "LayerwiseModel": "core",
    "MooncakeOptions": "kvstore.tiers.distributed.mooncake_tier",
    "MooncakeTier": "kvstore.tiers.distributed.mooncake_tier",
    "ObjectStoreTier": "kvstore.tiers.distributed.object_tier",
    "Profile": "calibration.model_profile",
    "Quota": "kvstore.placement.quota",
    "RawCodec": "compress.raw",
    "Retrieval": "retrieval.settings",
    "RopeSpec": "core",
    "RedisTier": "kvstore.tiers.distributed.redis_tier",
    "RemoteTier": "kvstore.tiers.remote.tier",
    "Sharing": "kvstore.tiers.distributed.tier",
    "SharedTier": "kvstore.tiers.shared",
    "Tier": "core",
    "TransformersConnector": "connectors.hf.connector",
    "codec_by_name": "compress.registry",
    "content_key": "kvstore.keys",
    "prefix_keys": "kvstore.keys",
    "s3_store": "kvstore.tiers.distributed.object_tier",
}
__version__ = "0.1.0"
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
