"""What vLLM calls once in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module


def register() -> None:
    """Let users write `kv_connector="KVLoomConnector"` without a module path. Changes nothing else."""
    factory = import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    with suppress(ValueError):  # registered already
        factory.register_connector("KVLoomConnector", "kvloom.connectors.vllm_v1", "KVLoomConnector")
