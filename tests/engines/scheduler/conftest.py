"""vLLM's real scheduler with kvloom's scheduler half, for tests in which no model runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ...vllm.simulated import SimulatedWorker, vllm_unit
from ..support.engines import make_model

SIMULATED_BLOCK = SIMULATED_CHUNK = 16  # tokens


@pytest.fixture(scope="session")
def simulated_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config for the scheduler; nothing runs it."""
    return make_model(tmp_path_factory.mktemp("vllm") / "model", num_hidden_layers=1)


@pytest.fixture
def workers_here(monkeypatch: pytest.MonkeyPatch) -> dict[str, SimulatedWorker]:
    """Workers in the scheduler's process, by token."""
    from kvloom.connectors.vllm import connector

    here: dict[str, SimulatedWorker] = {}
    monkeypatch.setattr(connector, "worker_here", here.get)
    return here


@pytest.fixture
def make_scheduler(simulated_model: Path, workers_here: dict[str, SimulatedWorker]) -> Callable[..., Any]:
    """The real scheduler, with a connector whose worker has not introduced itself yet."""

    def make(
        *,
        blocks: int = 10_000,
        policy: str = "recompute",
        role: str = "kv_both",
        caching: bool = True,
        max_num_batched_tokens: int = 128,
        **settings: Any,
    ) -> Any:
        utils = vllm_unit("utils")
        config = utils.create_vllm_config(
            model=str(simulated_model),
            kv_connector="KVLoomConnector",
            kv_connector_module_path="kvloom.connectors.vllm_v1",
            kv_role=role,
            block_size=SIMULATED_BLOCK,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_load_failure_policy=policy,
            kv_connector_extra_config={"chunk_tokens": SIMULATED_CHUNK, "lead_ids": [], **settings},
        )
        config.model_config.skip_tokenizer_init = True
        config.cache_config.enable_prefix_caching = caching
        return utils.create_scheduler(config, num_blocks=blocks)

    return make


@pytest.fixture
def open_worker(workers_here: dict[str, SimulatedWorker]) -> Callable[..., SimulatedWorker]:
    """A worker that has introduced itself to the scheduler's half."""

    def opened(scheduler: Any, *, at_once: bool = True, **more: Any) -> SimulatedWorker:
        made = SimulatedWorker(scheduler, **more)
        if at_once:
            workers_here[made.token] = made
        made.step()
        return made

    return opened
