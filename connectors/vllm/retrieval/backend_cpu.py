"""vLLM's attention backend of the processor, with retrieval where an engine's settings ask for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    from vllm import _custom_ops as ops
    from vllm import envs
    from vllm.v1.attention.backends.cpu_attn import (
        CPUAttentionBackend,
        CPUAttentionBackendImpl,
        CPUAttentionMetadata,
        CPUAttentionMetadataBuilder,
    )
except ImportError as error:
    raise ImportError(
        "kvloom.connectors.vllm.retrieval.backend_cpu needs vLLM 0.32 or newer: pip install vllm"
    ) from error

from .settings import asks_for_retrieval
from .step_rows import RetrievingBuilder, RetrievingImpl


class KVLoomCPUImpl(RetrievingImpl, CPUAttentionBackendImpl):
    """See `RetrievingImpl`."""

    def attend_to_blocks(self, layer: Any, queries: Tensor, cache: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        """The backend's kernel over blocks of one KV head each, see `BlockKernel`.

        A cache `[B, H, N, C]` is one of `B H` blocks with one head, and a request one for each of its KV heads. Nothing
        is copied. Keys are stored as they were rotated, so the order of blocks does not matter.
        """
        rows, group, dim = queries.shape
        starts = torch.arange(rows + 1, dtype=torch.int32)
        plan = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=rows,
            num_heads=group,
            num_kv_heads=1,
            head_dim=dim,
            seq_lens=lengths,
            dtype=queries.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,
            isa=layer.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        metadata = CPUAttentionMetadata(
            num_actual_tokens=rows,
            max_query_len=1,
            query_start_loc=starts,
            max_seq_len=int(lengths.max()),
            seq_lens=lengths,
            block_table=table,
            slot_mapping=table[:, 0],  # nothing is written
            scheduler_metadata=plan,
        )
        output = torch.empty_like(queries)
        blocks = cache.view(-1, 1, *cache.shape[2:])
        CPUAttentionBackendImpl.forward(self, layer, queries, queries, queries, blocks, metadata, output)
        return output


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
