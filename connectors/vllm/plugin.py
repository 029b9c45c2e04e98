"""What vLLM calls once in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module


def register() -> None:
    """Let users write `kv_connector="KVLoomConnector"` without a module path, and ask for retrieval.

    Changes nothing else: in an engine whose settings do not ask for retrieval, our attention backends hand out vLLM's
    own classes.
    """
    factory = import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    with suppress(ValueError):  # registered already
        factory.register_connector("KVLoomConnector", "kvloom.connectors.vllm.connector", "KVLoomConnector")
    backends = import_module("vllm.v1.attention.backends.registry")
    # The processor has one backend, which nobody can choose away; on devices users say `--attention-backend CUSTOM`.
    if import_module("vllm.platforms").current_platform.is_cpu():
        where = backends.AttentionBackendEnum.CPU_ATTN, "kvloom.connectors.vllm.retrieval.backend_cpu.KVLoomCPUBackend"
    else:
        where = backends.AttentionBackendEnum.CUSTOM, "kvloom.connectors.vllm.retrieval.backend_cuda.KVLoomBackend"
    if not where[0].is_overridden():
        backends.register_backend(*where)
