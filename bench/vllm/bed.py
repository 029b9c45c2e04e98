"""The engines that one model is measured on, side by side: each in a process of its own, idle until it is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Self

from ..service.servers import ServedAt
from .engine import KVLOOM, Engine
from .lmcache import LMCacheServer
from .server import Setup

PLAIN = "vLLM"
KVLOOM_HOST, KVLOOM_DISK, KVLOOM_MEMORY = "kvloom", "kvloom without a host tier", "kvloom without a disk"
KVLOOM_SERVICE = "kvloom with a service alone"
KVLOOM_WHOLE = "kvloom without a disk, windows kept whole"
NATIVE, COPIES, LMCACHE = "vLLM's offloading", "vLLM's offloading, plain copies", "LMCache"

CHUNK_TOKENS = 256
HOST_BYTES, FEW_BYTES = 3 << 30, 1 << 30
NO_HOST_BYTES = 4096  # no chunk fits: what comes, comes from the disk, every time


class Bed:
    """Engines by name, each started when it is first asked for and closed with the bed.

    Parameters
    ----------
    title : of the model, for messages and tables.
    model : its folder.
    folder : for stores and logs.
    max_tokens : of a request.
    lead_ids : in front of every prompt.
    server : of LMCache; None if it is not to be had.
    service : of kvloom; None if it is not to be had.
    """

    def __init__(
        self,
        title: str,
        model: Path,
        folder: Path,
        *,
        max_tokens: int,
        lead_ids: Sequence[int] = (),
        server: LMCacheServer | None = None,
        service: ServedAt | None = None,
    ) -> None:
        self.title = title
        self.store = folder / "store"
        self._model, self._folder, self._max_tokens = model, folder, max_tokens
        self._lead_ids = list(lead_ids)
        self._server, self._service = server, service
        self._engines: dict[str, Engine] = {}
        self._open = ExitStack()

    def __getitem__(self, name: str) -> Engine:
        """The engine of this name.

        Raises
        ------
        VLLMError : it does not start.
        """
        if name not in self._engines:
            log = self._folder / f"{len(self._engines)}.log"
            setup = Setup(
                self._model,
                self._connector(name),
                self._max_tokens,
                cache_gib=1,
                log=log,
                path=(self._server.path,) if name == LMCACHE and self._server is not None else (),
                prefix_caching=name
                != LMCACHE,  # it holds blocks until the engine's next step, so none could be emptied
                options={"disable_hybrid_kv_cache_manager": True} if name == KVLOOM_WHOLE else {},
            )
            engine = Engine(f"{name} ({self.title})", setup)
            self._engines[name] = self._open.enter_context(engine)
        return self._engines[name]

    def _connector(self, name: str) -> Mapping[str, object] | None:
        if name == LMCACHE and self._server is not None:
            return self._server.connector
        settings: dict[str, object] = {
            "chunk_tokens": CHUNK_TOKENS,
            "lead_ids": self._lead_ids,
            "load_or_recompute": "always",  # a row's name says what is loaded
        }
        disk = {"disk_path": str(self.store)}
        if name == KVLOOM_SERVICE and self._service is not None:
            token_file = self._folder / "service.token"
            token_file.write_text(self._service.token)
            token_file.chmod(0o600)
            remote = {"remote_url": self._service.url, "remote_token_file": str(token_file)}
            return _with(KVLOOM, settings | remote | {"host_bytes": NO_HOST_BYTES})
        offloading: dict[str, object] = {"cpu_bytes_to_use": HOST_BYTES}
        copies: dict[str, object] = {"spec_name": "CopyingSpec", "spec_module_path": "kvloom.bench.vllm.copies"}
        known: Mapping[str, Mapping[str, object] | None] = MappingProxyType(
            {
                PLAIN: None,
                KVLOOM_HOST: _with(KVLOOM, settings | disk | {"host_bytes": HOST_BYTES}),
                KVLOOM_DISK: _with(KVLOOM, settings | disk | {"host_bytes": NO_HOST_BYTES}),
                KVLOOM_MEMORY: _with(KVLOOM, settings | {"host_bytes": FEW_BYTES}),
                KVLOOM_WHOLE: _with(KVLOOM, settings | {"host_bytes": FEW_BYTES}),
                NATIVE: _with(_OFFLOADING, offloading),
                COPIES: _with(_OFFLOADING, offloading | copies),
            }
        )
        return known[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


_OFFLOADING = MappingProxyType({"kv_connector": "OffloadingConnector", "kv_role": "kv_both"})


def _with(connector: Mapping[str, object], extra: Mapping[str, object]) -> dict[str, object]:
    return {**connector, "kv_connector_extra_config": dict(extra)}
