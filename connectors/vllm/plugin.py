"""What vLLM calls once in each of its processes, through the entry point `vllm.general_plugins`."""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib import import_module


def register() -> None:
    """Let users write `kv_connector="KVLoomConnector"` without a module path, and ask for retrieval.

    Changes nothing else: in an engine whose settings do not ask for retrieval, our attention backends hand out vLLM's
    own classes.
    """
    forward_logs()
    register_connector()
    backends = import_module("vllm.v1.attention.backends.registry")
    # On a processor there is one backend, and users cannot choose; on devices they say `--attention-backend CUSTOM`.
    if import_module("vllm.platforms").current_platform.is_cpu():
        where = backends.AttentionBackendEnum.CPU_ATTN, "kvloom.connectors.vllm.retrieval.backend_cpu.KVLoomCPUBackend"
    else:
        where = backends.AttentionBackendEnum.CUSTOM, "kvloom.connectors.vllm.retrieval.backend_cuda.KVLoomBackend"
    if not where[0].is_overridden():
        backends.register_backend(*where)


def register_connector() -> None:
    """Enter the connector's name in vLLM's factory, by which a `MultiConnector` finds the statistics of its parts."""
    factory = import_module("vllm.distributed.kv_transfer.kv_connector.factory").KVConnectorFactory
    with suppress(ValueError):  # registered already
        factory.register_connector("KVLoomConnector", "kvloom.connectors.vllm.connector", "KVLoomConnector")


def forward_logs() -> None:
    """Give what kvloom logs to the handlers of vLLM's log, unless the user has set up handlers for it."""
    ours, theirs = logging.getLogger("kvloom"), logging.getLogger("vllm")
    if not ours.hasHandlers():
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
