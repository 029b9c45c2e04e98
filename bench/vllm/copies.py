"""vLLM's own OffloadingConnector on a processor: its scheduling and bookkeeping, with plain copies for its transfers.

vLLM's `CPUOffloadingSpec` starts on CUDA and XPU only, since it copies by their streams. vLLM takes specs from outside
(`spec_name`, `spec_module_path`): this one differs in the copying alone, which is done at once, in the step that asks
for it. So it stands for the least that an offloading connector of vLLM would take here.
"""

from __future__ import annotations

import time
from typing import Any

import torch

try:
    from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
except ImportError as error:
    raise ImportError("kvloom.bench.vllm.copies needs vLLM 0.32 or newer: make engines") from error


class CopyingWorker(OffloadingWorker):
    """Copies whole blocks between the engine's cache and `chunks` blocks of memory beside it."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._engine = [each.tensor.view(torch.int8).view(-1, each.page_size_bytes) for each in kv_caches.tensors]
        self._memory = [torch.zeros(chunks, rows.shape[1], dtype=torch.int8) for rows in self._engine]
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._copy(job_id, self._engine, src_spec.block_ids, self._memory, dst_spec.block_ids)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._copy(job_id, self._memory, src_spec.block_ids, self._engine, dst_spec.block_ids)
        return True

    def get_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """Nothing is ever under way."""

    def _copy(
        self, job_id: int, sources: list[torch.Tensor], from_rows: Any, targets: list[torch.Tensor], to_rows: Any
    ) -> None:
        begun_s = time.monotonic()
        pairs = list(zip(from_rows.tolist(), to_rows.tolist(), strict=True))
        for source, target in zip(sources, targets, strict=True):
            for from_row, to_row in pairs:
                target[to_row].copy_(source[from_row])
        nbytes = len(pairs) * sum(rows.shape[1] for rows in sources)
        self._done.append(TransferResult(job_id, True, nbytes, time.monotonic() - begun_s))


class CopyingSpec(CPUOffloadingSpec):
    """`CPUOffloadingSpec` with a `CopyingWorker`."""

    _copying: CopyingWorker | None = None

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self.blocks_per_chunk != 1:
            raise ValueError(f"blocks_per_chunk is {self.blocks_per_chunk}; expected 1: leave block_size out")
        if self._copying is None:
            self._copying = CopyingWorker(kv_caches, self.num_chunks)
        return self._copying
