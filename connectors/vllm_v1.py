"""The name under which users load the vLLM connector: `kv_connector_module_path="kvloom.connectors.vllm_v1"`.

Importing it enters the connector in vLLM's factory, as kvloom's plugin does where it is installed.
"""

from __future__ import annotations

from .vllm.connector import KVLoomConnector
from .vllm.plugin import register_connector

__all__ = ["KVLoomConnector"]

register_connector()
