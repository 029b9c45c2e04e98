"""Hints and events: kv_hints envelopes in, vLLM's events out."""

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from kvloom.compress.raw import RawCodec
from kvloom.core import ChunkInfo
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing.chunks import make_blob, make_chunk, make_key

from ..support.patience import LONG_S, eventually
from .serving import Service, service_in_thread

pytestmark = pytest.mark.slow


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    tiers = [HostTier(40 * make_blob(0).nbytes), DiskTier(tmp_path / "disk")]
    with service_in_thread(tmp_path, tiers) as service:
        yield service


def hint(service: Service, *actions: dict[str, Any], version: str = "0.1") -> Any:
    envelope = {"protocol_version": version, "message_id": "m1", "actions": list(actions)}
    return service.ask("POST", "/v1/hints", envelope)


def action(kind: str, *numbers: int, version: str = "0.1", **payload: Any) -> dict[str, Any]:
    keys = {"keys": [make_key(number).hex() for number in numbers]}
    return {"action_id": f"{kind}-1", "action_type": kind, "action_version": version, "payload": {**keys, **payload}}


def test_hints_are_done_one_by_one(service: Service) -> None:
    with service.client() as client:
        for number in range(8):
            client.put(make_key(number), make_blob(number))
        told = hint(
            service,
            action("prefetch", 0, 1),
            action("pin", 2, deadline_s=30),
            action("evict", 3),
            action("teleport", 4),
            action("pin", 5, version="9"),
            action("pin", 6, wrong=1),
            {**action("evict", 7), "payload": {"keys": "all"}},
        ).json()
        assert told["message_id"] == "m1" and told["protocol_version"] == "0.1"
        assert [each["status"] for each in told["results"]] == ["accepted"] * 3 + ["refused"] * 4
        assert "known are prefetch, pin, evict" in told["results"][3]["detail"]
        assert "wrong" in told["results"][5]["detail"] and "keys" in told["results"][6]["detail"]
        assert make_key(3) not in client and make_key(7) in client
        assert service.ask("GET", told["results"][1]["resource"]).json()["keys"] == 1
        job = told["results"][0]["resource"]
        assert eventually(lambda: service.ask("GET", job).json()["state"] != "running")
        wrong = hint(service, action("pin", 1), version="7")
        assert wrong.status == 409 and "'0.1'" in wrong.json()["detail"]


def test_events_are_followed_over_http(service: Service) -> None:
    command = ["curl", "-sN", "--max-time", str(LONG_S), "-H", f"Authorization: Bearer {service.token}"]
    with subprocess.Popen([*command, f"{service.url}/v1/events"], stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None and follower.stdout.readline() == ": following\n"
        chunk = make_chunk(1, tokens=7)
        with service.client() as client:
            client.put(make_key(1), RawCodec().encode(chunk), ChunkInfo(after=make_key(9)))
            client.delete(make_key(1))
            service.client(service.new_token("other")).put(make_key(2), make_blob(2))
            client.put(make_key(3), make_blob(3))  # what comes before it is all that came of the others
        told: list[dict[str, Any]] = []
        while not told or told[-1].get("block_hashes") != [make_key(3).hex()]:
            line = follower.stdout.readline()
            assert line, told
            told += [json.loads(line.removeprefix("data: "))] if line.startswith("data: ") else []
        follower.kill()
    assert [(each["type"], each["medium"]) for each in told[:-1]] == [
        ("BlockStored", "CPU"),
        ("BlockStored", "STORAGE"),
        ("BlockRemoved", "CPU"),
        ("BlockRemoved", "STORAGE"),
    ]
    assert told[0]["block_hashes"] == [make_key(1).hex()] and told[0]["parent_block_hash"] == make_key(9).hex()
    assert told[0]["token_ids"] == chunk.token_ids.tolist() and told[0]["block_size"] == 7


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """As vLLM 0.32 declares it, with the fields that it requires."""


class BlockStored(KVCacheEvent):
    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    group_idx: int | None = None


class BlockRemoved(KVCacheEvent):
    block_hashes: list[bytes]
    medium: str | None
    group_idx: int | None = None


class Batch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    ts: float
    events: list[BlockStored | BlockRemoved]
    data_parallel_rank: int | None = None


def test_events_are_published_as_vllm_publishes_them(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        endpoint = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    with (
        service_in_thread(tmp_path, [HostTier(None)], events_endpoint=endpoint) as service,
        zmq.Context() as context,
        context.socket(zmq.SUB) as sub,
    ):
        sub.connect(endpoint)
        sub.setsockopt(zmq.SUBSCRIBE, b"")
        found: list[Any] = []
        numbers = []

        def take(timeout_s: float) -> bool:
            is_there = bool(sub.poll(1000 * timeout_s))
            if is_there:
                _, number, payload = sub.recv_multipart()
                numbers.append(int.from_bytes(number, "big"))
                found.extend(msgspec.msgpack.decode(payload, type=Batch).events)
            return is_there

        with service.client() as client:

            def are_told() -> bool:
                client.put(make_key(0), make_blob(0)), client.delete(make_key(0))
                return take(0.1)

            assert eventually(are_told), "a subscription takes a while to get there"
            client.put(make_key(1), RawCodec().encode(make_chunk(1)))
            client.delete(make_key(1))
            service.client(service.new_token("other")).put(make_key(2), make_blob(2))
            client.put(make_key(3), make_blob(3))  # what comes before it is all that came of the others
            while found[-1].block_hashes != [make_key(3)]:
                assert take(LONG_S)
    told = [each for each in found if each.block_hashes not in ([make_key(0)], [make_key(3)])]
    assert [type(each).__name__ for each in told] == ["BlockStored", "BlockRemoved"]
    assert told[0].block_hashes == [make_key(1)] and told[0].token_ids == make_chunk(1).token_ids.tolist()
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_events_stay_on_this_host(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="events_endpoint"),
        service_in_thread(tmp_path, [HostTier(None)], events_endpoint="tcp://0.0.0.0:5557"),
    ):
        pass
