"""A connector of NIXL's kind: handshake metadata of its own, which it insists on; it moves no KV."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    SupportsHMA,
)


@dataclass
class Payload(KVConnectorHandshakeMetadata):
    rank: int


class Nothing(KVConnectorMetadata):
    pass


class HandshakeConnector(KVConnectorBase_V1, SupportsHMA):
    """`met`: the ranks whose metadata has come."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self.met: list[int] = []

    def get_handshake_metadata(self) -> Payload:
        return Payload(0)

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        if not all(isinstance(each, Payload) for each in metadata.values()):
            raise ValueError(f"expects its own handshake metadata, not {metadata}")
        self.met += sorted(metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None: ...
    def wait_for_layer_load(self, layer_name: str) -> None: ...
    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...
    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: Any) -> Nothing:
        return Nothing()

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        return False, {"handshake": True}
