"""Documents that the service precomputed, loaded by vLLM as `/v1/compose` says; events that vLLM's own classes read."""

import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "vllm", reason="stock vLLM is not installed here; `make test-engines` runs this in its own environment"
)
pytest.importorskip("pydantic_settings", reason="the service's packages are not installed beside vLLM")

import msgspec
import zmq
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.distributed.kv_events import BlockRemoved, BlockStored, KVEventBatch

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo
from kvloom.evaluation.environment import BUNDLED_MODEL
from kvloom.evaluation.workload import task_cases
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_chunk, make_key

from ...service.serving import Service, service_in_thread
from ..support.engines import start, tokens_of, usage

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(900)]


def precomputed(service: Service, documents: list[str]) -> list[dict[str, str]]:
    """IDs of documents whose KV the service has computed."""
    body = {"documents": [{"text": text, "id": f"d{n}"} for n, text in enumerate(documents)]}
    job = service.ask("POST", "/v1/documents", body).json()["job"]
    until_s = time.monotonic() + 300
    while job["state"] == "running" and time.monotonic() < until_s:
        time.sleep(0.2)
        job = service.ask("GET", f"/v1/jobs/{job['id']}").json()
    assert job["state"] == "finished" and job["computed"] == len(documents)
    return [{"id": each["id"]} for each in body["documents"]]


def test_vllm_answers_over_documents_of_the_service(tmp_path: Path) -> None:
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
        }
        llm = start(BUNDLED_MODEL, settings, skip_tokenizer_init=False)
        params = {"kvloom": {**load["kv_transfer_params"]["kvloom"], "ratio": 0.9999}}
        sampling = SamplingParams(temperature=0, max_tokens=8, extra_args={"kv_transfer_params": params})
        (output,) = llm.generate([{"prompt_token_ids": load["prompt_token_ids"]}], sampling, use_tqdm=False)
        assert usage(output)["fused"] == "yes" and usage(output)["failed"] is False
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
        assert tokenizer.decode(tokens_of([output])[0], skip_special_tokens=True) == answer
        stats = service.ask("GET", "/v1/stats").json()["service"]
        assert stats["hits"] >= len(case.documents), "read by the engine out of the service"
        llm.llm_engine.engine_core.shutdown()


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
