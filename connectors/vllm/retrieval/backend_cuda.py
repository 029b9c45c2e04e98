"""The same as `vllm_backend_cpu` for devices, before FlashAttention: `--attention-backend CUSTOM --enforce-eager`.

Has not run on a device yet.
"""

from __future__ import annotations

try:
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.flash_attn import (
        FlashAttentionBackend,
        FlashAttentionImpl,
        FlashAttentionMetadataBuilder,
    )
except ImportError as error:
    raise ImportError(
        "kvloom.connectors.vllm.retrieval.backend_cuda needs vLLM 0.32 or newer: pip install vllm"
    ) from error

from .settings import asks_for_retrieval
from .step_rows import RetrievingBuilder, RetrievingImpl


class KVLoomImpl(RetrievingImpl, FlashAttentionImpl):
    """See `RetrievingImpl`."""


class KVLoomBuilder(RetrievingBuilder, FlashAttentionMetadataBuilder):
    """See `RetrievingBuilder`."""

    _cudagraph_support = AttentionCGSupport.NEVER


class KVLoomBackend(FlashAttentionBackend):
    """What `CUSTOM` means where kvloom is installed; without settings of ours, FlashAttention."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        return KVLoomImpl if asks_for_retrieval() else FlashAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        return KVLoomBuilder if asks_for_retrieval() else FlashAttentionMetadataBuilder
