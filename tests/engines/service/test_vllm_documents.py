"""Documents that the service precomputed, loaded by vLLM as `/v1/compose` says; events that vLLM's own classes read."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)
pytest.importorskip("pydantic_settings", reason="the service's packages are not installed beside vLLM")

import msgspec
import zmq
from openai import APIConnectionError, OpenAI
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.workload import task_cases
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_chunk, make_key

from ...service.serving import Service, service_in_thread
from ..support.engines import SETTINGS

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def precomputed(service: Service, documents: list[str]) -> list[dict[str, str]]:
    """IDs of documents whose KV the service has computed."""
    body = {"documents": [{"text": text, "id": f"d{n}"} for n, text in enumerate(documents)]}
    job = service.ask("POST", "/v1/documents", body).json()["job"]
    until_s = time.monotonic() + 600
    while job["state"] == "running" and time.monotonic() < until_s:
        time.sleep(0.2)
        job = service.ask("GET", f"/v1/jobs/{job['id']}").json()
    assert job["state"] == "finished" and job["computed"] == len(documents)
    return [{"id": each["id"]} for each in body["documents"]]


@contextmanager
def vllm_server(settings: dict[str, Any], log: Path) -> Iterator[OpenAI]:
    """A client of vLLM's own OpenAI server, with kvloom as its connector."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    transfer = {
        "kv_connector": "KVLoomConnector",
        "kv_connector_module_path": "kvloom.connectors.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": settings,
    }
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(BUNDLED_MODEL),
        "--served-model-name", "tiny", "--dtype", "float32", "--max-model-len", "1024", "--max-num-seqs", "4",
        "--block-size", "32",
        "--enforce-eager", "--enable-prompt-tokens-details", "--host", "127.0.0.1", "--port", str(port),
        "--kv-transfer-config", json.dumps(transfer),
    ]  # fmt: skip
    environment = {**os.environ, **SETTINGS, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        until_s = time.monotonic() + 600
        while True:
            try:
                client.models.list()
                break
            except APIConnectionError:
                assert process.poll() is None and time.monotonic() < until_s, log.read_text()[-3000:]
                time.sleep(0.5)
        yield client
    finally:
        process.terminate()
        process.wait(60)


def told(response: Any) -> dict[str, Any]:
    """What kvloom says that it did for a request."""
    found: dict[str, Any] = response.model_extra["kv_transfer_params"]["kvloom"]
    return found


def test_vllm_answers_over_documents_of_the_service(tmp_path: Path) -> None:
    """By token ids as `/v1/compose` says; and as any framework asks vLLM, whose prompts hold documents as text."""
    (case,) = task_cases(
        None, lambda text: len(text.split()), kind="record", count=1, context_tokens=300, num_documents=3
    )
    token_file = tmp_path / "token"
    with service_in_thread(tmp_path / "kv", models={"tiny": BUNDLED_MODEL}, recompute_ratio=1.0) as service:
        token_file.write_text(service.token)
        body: dict[str, Any] = {"documents": precomputed(service, case.documents), "question": case.question}
        load = service.ask("POST", "/v1/compose", {**body, "answer": False}).json()["load"]
        answer = service.ask("POST", "/v1/compose", {**body, "max_tokens": 8}).json()["answer"]
        settings = {
            "host_bytes": "64MiB",
            "remote_url": service.url,
            "remote_token_file": str(token_file),
            "chunk_tokens": 4096,  # no prefix is long enough: all that is loaded are documents
            "match_tokens": 32,
            "fusion_ratio": 0.3,
        }
        with vllm_server(settings, tmp_path / "vllm.log") as client:
            params = {"kvloom": {**load["kv_transfer_params"]["kvloom"], "ratio": 0.9999}}
            asked: dict[str, Any] = {"model": "tiny", "max_tokens": 8, "temperature": 0}
            exact = client.completions.create(
                prompt=load["prompt_token_ids"], extra_body={"kv_transfer_params": params}, **asked
            )
            assert told(exact)["fused"] == "yes" and told(exact)["failed"] is False
            assert exact.choices[0].text == answer
            stats = service.ask("GET", "/v1/stats").json()["service"]
            assert stats["hits"] >= len(case.documents), "read by the engine out of the service"

            ids = load["prompt_token_ids"]
            for start, stop in params["kvloom"]["documents"]:  # named once, each is recognised in later prompts
                alone = {"kv_transfer_params": {"kvloom": {"documents": [[1, 1 + stop - start]]}}}
                client.completions.create(prompt=[ids[0], *ids[start:stop]], extra_body=alone, **asked)
            documents = [text if text.endswith("\n") else f"{text}\n" for text in case.documents]
            for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
                prompt = "".join(documents[i] for i in order) + case.question
                response = client.completions.create(prompt=prompt, **asked)
                inside = sum(told(response)["loaded_tokens"].values())
                assert told(response)["fused"] == "yes" and not told(response)["failed"]
                assert inside > 0.5 * told(response)["prompt_tokens"] and told(response)["computed_tokens"] < inside
                assert case.answer in response.choices[0].text
                streamed = client.completions.create(
                    prompt=prompt, stream=True, stream_options={"include_usage": True}, **asked
                )
                *pieces, last = streamed
                assert "".join(piece.choices[0].text for piece in pieces) == response.choices[0].text
                assert last.usage.prompt_tokens_details.cached_tokens >= inside - 32


def test_vllm_reads_the_events_of_the_service(tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/events"
    with (
        service_in_thread(tmp_path / "kv", [HostTier(None)], events_endpoint=endpoint) as service,
        zmq.Context() as context,
        context.socket(zmq.SUB) as sub,
    ):
        sub.connect(endpoint)
        sub.subscribe(b"")
        time.sleep(0.5)
        chunk = make_chunk(1)
        with service.client() as client:
            client.put(make_key(1), RawCodec().encode(chunk), ChunkInfo(after=make_key(9)))
            client.delete(make_key(1))
        decoder, found = msgspec.msgpack.Decoder(KVEventBatch), []
        while sub.poll(1000):
            _, _, payload = sub.recv_multipart()
            found += decoder.decode(payload).events
    stored, removed = found
    assert isinstance(stored, BlockStored) and isinstance(removed, BlockRemoved)
    assert stored.block_hashes == removed.block_hashes == [make_key(1)] and stored.parent_block_hash == make_key(9)
    assert stored.token_ids == chunk.token_ids.tolist() and stored.block_size == len(chunk.token_ids)
    assert stored.medium == removed.medium == "CPU"
