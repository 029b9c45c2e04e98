"""The name under which users load the vLLM connector: `kv_connector_module_path="kvloom.connectors.vllm_v1"`."""

from __future__ import annotations

from .vllm.connector import KVLoomConnector

__all__ = ["KVLoomConnector"]
