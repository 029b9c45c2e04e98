"""vLLM's attention backend of the processor, with retrieval where an engine's settings ask for it."""

from __future__ import annotations

try:
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadataBuilder,
    )
except ImportError as error:
    raise ImportError("kvloom.connectors.vllm_backend_cpu needs vLLM 0.32 or newer: pip install vllm") from error

from .vllm_retrieval import RetrievingBuilder, RetrievingImpl
from .vllm_retrieval_settings import asks_for_retrieval


class KVLoomCPUImpl(RetrievingImpl, CPUAttentionBackendImpl):
    """See `RetrievingImpl`."""


class KVLoomCPUBuilder(RetrievingBuilder, CPUAttentionMetadataBuilder):
    """See `RetrievingBuilder`."""


class KVLoomCPUBackend(CPUAttentionBackend):
    """Stands in vLLM's registry for the backend that it derives from."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return KVLoomCPUImpl if asks_for_retrieval() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return KVLoomCPUBuilder if asks_for_retrieval() else CPUAttentionMetadataBuilder
