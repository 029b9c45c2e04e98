"""Stock vLLM with a kvloom service as its slowest tier, over TLS: what another engine put, a service that is killed.

Service and engines run in the engine's own environment: the service's packages fit beside vLLM's.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)
pytest.importorskip("pydantic_settings", reason="the service's packages are not installed beside vLLM")

from kvloom.kvstore.tiers.remote.client import KVLoomClient
from kvloom.service.access.credentials import TokenFile

from ...service.serving import Certificate, ServiceProcess
from ..support.engines import CHUNK, DECLINED, generate, make_model, prompts, start, tokens_of, usage
from .writer import LENGTHS

ROOT = Path(__file__).resolve().parent.parent.parent.parent
pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]

ELSEWHERE = "127.0.0.2"  # an address that nobody takes for this host: chunks go over TLS, as from another machine
TEXTS = prompts(11, LENGTHS)
LOADED = [length // CHUNK * CHUNK for length in LENGTHS]


class Bed:
    """A service at every address, the engine that uses it, and what both were told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = make_model(folder / "model")
        self.certificate = Certificate(folder / "tls")
        self.directory = folder / "kv"
        self.directory.mkdir()
        tokens = TokenFile(self.directory / "tokens.json")
        self.token_file = folder / "team-a.token"
        self.token_file.write_text(tokens.create("team-a", ["read", "write"]))
        self.stranger = tokens.create("team-b", ["read", "write"])
        self.service = self.serve()
        self.llm: Any = None

    def serve(self, port: int | None = None) -> ServiceProcess:
        options = ("--host", "0.0.0.0", *self.certificate.options)
        return ServiceProcess(self.directory, *options, certificate=self.certificate, port=port)

    def settings(self, host: str) -> dict[str, Any]:
        return {
            "host_bytes": "1MiB",  # two chunks: most must come from the service
            "remote_url": f"https://{host}:{self.service.port}",
            "remote_token_file": str(self.token_file),
            "remote_ca_file": str(self.certificate.chain),
            "load_timeout_s": 5.0,
        }

    def client(self, token: str | None = None) -> KVLoomClient:
        token = token or self.token_file.read_text()
        return KVLoomClient(
            f"https://localhost:{self.service.port}", token=token, ca_file=self.certificate.chain, timeout_s=30
        )


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    bed = Bed(tmp_path_factory.mktemp("vllm"))
    try:
        yield bed
    finally:
        bed.service.stop(9)
        if bed.llm is not None:
            bed.llm.llm_engine.engine_core.shutdown()


def transfers() -> Any:
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group().worker.transfers


def loaded(outputs: list[Any]) -> list[dict[str, int]]:
    return [usage(output)["loaded_tokens"] for output in outputs]


def test_an_engine_finds_what_another_put(bed: Bed) -> None:
    told = bed.folder / "told.json"
    command = [sys.executable, "-m", "tests.engines.service.writer", str(bed.model)]
    with (bed.folder / "log").open("w") as log:
        done = subprocess.run(
            [*command, json.dumps(bed.settings("localhost")), str(told)],  # through shared memory
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            check=False,
        )
    assert done.returncode == 0, (bed.folder / "log").read_text()[-3000:]
    other = json.loads(told.read_text())
    assert other["stored"] is True
    with bed.client() as client, bed.client(bed.stranger) as stranger:
        keys = [entry.key for entry in client.entries()[0]]
        assert len(keys) == sum((length + 19) // CHUNK for length in LENGTHS), "the last token has no KV yet"
        assert stranger.entries()[0] == [] and not any(key in stranger for key in keys)
    bed.llm = start(bed.model, bed.settings(ELSEWHERE), enable_prefix_caching=True)
    outputs = generate(bed.llm, TEXTS)
    assert tokens_of(outputs) == other["answers"]
    assert [sum(each.values()) for each in loaded(outputs)] == LOADED
    assert sum(each.get("remote", 0) for each in loaded(outputs)) == sum(LOADED)
    assert bed.llm.reset_prefix_cache()
    assert tokens_of(generate(bed.llm, TEXTS, DECLINED)) == other["answers"], "as without kvloom"


def test_a_service_that_is_killed_costs_time_and_no_answer(bed: Bed) -> None:
    if bed.llm is None:
        pytest.skip("the engine did not start")
    llm, many = bed.llm, prompts(21, (200,) * 24)
    assert llm.reset_prefix_cache()
    plain = tokens_of(generate(llm, many, DECLINED, tokens=8))
    assert llm.reset_prefix_cache()
    generate(llm, many, tokens=1)
    assert transfers().settle(60.0)
    assert llm.reset_prefix_cache()
    killer = threading.Timer(0.3, lambda: bed.service.process.kill())
    killer.start()
    begun_s = time.monotonic()
    outputs = generate(llm, many, tokens=8)  # found remotely, loaded while the service dies
    killer.join()
    assert tokens_of(outputs) == plain
    assert bed.service.stop(9) == -9
    assert llm.reset_prefix_cache()
    again = generate(llm, many, tokens=8)  # dead from the start
    assert tokens_of(again) == plain and time.monotonic() - begun_s < 120
    assert sum(sum(each.values()) for each in loaded(again)) <= 2 * CHUNK, "what memory holds, and nothing else"
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not scheduler.requests, "nothing waits for the dead service"


def test_a_service_that_comes_back_is_found_again(bed: Bed) -> None:
    if bed.llm is None:
        pytest.skip("the engine did not start")
    bed.service = bed.serve(bed.service.port)
    assert bed.service.ask("GET", "/readyz", token=None).status == 200
    until_s = time.monotonic() + 90  # a tier that failed is left alone for a while
    while True:
        assert bed.llm.reset_prefix_cache()
        outputs = generate(bed.llm, TEXTS)
        if sum(each.get("remote", 0) for each in loaded(outputs)) >= sum(LOADED) - 2 * CHUNK:
            break
        assert time.monotonic() < until_s, loaded(outputs)
        time.sleep(1.0)
    assert bed.llm.reset_prefix_cache()
    assert tokens_of(outputs) == tokens_of(generate(bed.llm, TEXTS, DECLINED))
