"""Chunks through shared memory: the same bytes, verified, and nothing left behind by whoever dies."""

import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kvloom.errors import ChunkCorruptError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.kvstore.tiers.remote.client import KVLoomClient
from kvloom.kvstore.tiers.remote.shared_memory import SharedMemorySession
from kvloom.kvstore.tiers.remote.tier import RemoteTier
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.patience import LONG_S, eventually
from .serving import MIB, Service, service_in_thread

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="shared memory needs Linux's memfd_create"),
]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with service_in_thread(tmp_path, [HostTier(None)], shared_memory_bytes=8 * MIB) as service:
        yield service


def test_bytes_go_through_memory_and_leases_come_back(service: Service) -> None:
    memory = service.context.shared_memory
    with service.client() as client:
        for number in range(4):
            client.put(make_key(number), make_blob(number, numbers=100_000))
        assert memory.sessions == 1
        held = [client.get(make_key(number)) for number in range(4)]
        assert memory.leases == 4
        assert all(each is not None and each.leased for each in held)
        assert all(same_blob(each, make_blob(n, numbers=100_000)) for n, each in enumerate(held) if each is not None)
        part = client.get_layers(make_key(1), 1, 3)
        assert part is not None and same_blob(part, make_blob(1, numbers=100_000).layers(1, 3))
        kept, held = held[0], []
        del part
        assert client.get(make_key(0)) is not None
        client.match([make_key(0)])
        client.get(make_key(9))  # each request gives back what nobody reads any more
        assert eventually(lambda: memory.leases == 1)
        assert kept is not None and same_blob(kept, make_blob(0, numbers=100_000))
    assert eventually(lambda: memory.sessions == 0)
    assert same_blob(kept, make_blob(0, numbers=100_000))  # also after the session has ended


def test_a_full_memory_falls_back_to_http(service: Service) -> None:
    blob = make_blob(1, numbers=1_500_000)  # 6 MB: more than half of the memory
    with service.client() as client:
        client.put(make_key(1), blob)
        found = client.get(make_key(1))
        assert found is not None and not found.leased and same_blob(found, blob)
        small = [make_blob(n, numbers=250_000) for n in range(10)]
        for number, each in enumerate(small):
            client.put(make_key(10 + number), each)
        held = [client.get(make_key(10 + number)) for number in range(10)]  # ten of a megabyte, held, in twice four
        assert all(each is not None and same_blob(each, small[n]) for n, each in enumerate(held))
        assert {each.leased for each in held if each is not None} == {True, False}


def test_what_lies_in_memory_is_verified(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    with service.client() as client:
        client.put(make_key(1), make_blob(1))
        assert client.get(make_key(1)) is not None
        memory = service.context.shared_memory.pool_memory("default")
        lend = service.context.shared_memory.lend_in_place

        def spoil(session, container):
            lease = lend(session, container)
            memory._memory[lease.offset + lease.nbytes - 1] ^= 1
            return lease

        client.put(make_key(1), make_blob(1))  # now that the pool has memory, the chunk lies there
        monkeypatch.setattr(service.context.shared_memory, "lend_in_place", spoil)
        with pytest.raises(ChunkCorruptError):
            client.get(make_key(1))


def test_a_service_that_starts_anew_is_met_with_a_new_session(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service:
        client = service.client()
        client.put(make_key(1), make_blob(1))
        client.get(make_key(1))
        service.context.shared_memory._end(next(iter(service.context.shared_memory._sessions.values())))
        client.put(make_key(2), make_blob(2))
        assert client.get(make_key(2)) is not None  # over HTTP until it is time to try again
        client._share_after_s = 0.0
        found = client.get(make_key(1))
        assert found is not None and found.leased
        client.close()


def test_a_store_keeps_no_lease_of_what_it_promotes(service: Service) -> None:
    with KVStore([HostTier(None), RemoteTier(service.url, token=service.token)]) as store:
        store.put(make_key(1), make_chunk(1))
    with KVStore([HostTier(None), RemoteTier(service.url, token=service.token)]) as store:
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1)) and store.locate(make_key(1)) == "host"
        del found
        store.get(make_key(2))
        assert eventually(lambda: store.get(make_key(3)) is None and service.context.shared_memory.leases <= 1)


CLIENT = """
import sys, time
from kvloom.kvstore.tiers.remote.client import KVLoomClient
from kvloom.testing.chunks import make_key
client = KVLoomClient(sys.argv[1], token=sys.argv[2])
client.get(make_key(0))
held = [client.get(make_key(n)) for n in range(3)]
print(all(each.leased for each in held), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
def test_a_client_that_is_killed_gives_back_what_it_held(service: Service) -> None:
    with service.client(shared_memory=False) as client:
        for number in range(3):
            client.put(make_key(number), make_blob(number, numbers=100_000))
    command = [sys.executable, "-c", CLIENT, service.url, service.token]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    memory = service.context.shared_memory
    assert memory.sessions == 1 and memory.leases == 3
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert eventually(lambda: memory.sessions == 0) and memory.leases == 0


def test_sessions_are_limited_and_belong_to_a_tenant(tmp_path: Path) -> None:
    with service_in_thread(tmp_path, [HostTier(None)], shared_memory_clients=1) as service:
        mine, theirs = service.client(), service.client(service.new_token("other"))
        mine.put(make_key(1), make_blob(1))
        assert mine.get(make_key(1)) is not None
        theirs.put(make_key(1), make_blob(2))
        assert service.context.shared_memory.sessions == 1
        session = next(iter(service.context.shared_memory._sessions))
        headers = {"KVLoom-Shared-Memory": session}
        path = f"/v1/chunks/{make_key(1).hex()}"
        stolen = service.ask("GET", path, headers=headers, token=service.new_token("other"))
        assert stolen.status == 410
        for wrong in ("0-100", "999999999999-1", f"{service.context.shared_memory.session_bytes // 2}-999999999"):
            answer = service.ask("PUT", path, b"", headers={**headers, "KVLoom-Range": wrong})
            assert answer.status in (413, 422), wrong
        found = theirs.get(make_key(1))
        assert found is not None and same_blob(found, make_blob(2))


def test_without_a_ticket_nothing_is_given(service: Service) -> None:
    told = service.ask("POST", "/v1/shared-memory").json()
    for ticket in (b"", b"x" * 32):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(LONG_S)
            sock.connect("\0" + told["socket"])
            sock.sendall(ticket)
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
    ticket = bytes.fromhex(told["ticket"])
    session = SharedMemorySession(told["id"], told["socket"], ticket, told["nbytes"], 2.0)
    with pytest.raises(OSError):
        SharedMemorySession(told["id"], told["socket"], ticket, told["nbytes"], 2.0)  # a ticket is good once
    with pytest.raises(OSError):
        os.ftruncate(service.context.shared_memory._sessions[told["id"]].descriptor, 100)  # the size is sealed
    session.close()


def test_a_service_without_shared_memory(tmp_path: Path) -> None:
    with service_in_thread(tmp_path, [HostTier(None)], shared_memory_bytes=0) as service:
        assert service.ask("POST", "/v1/shared-memory").status == 501
        with KVLoomClient(service.url, token=service.token) as client:
            client.put(make_key(1), make_blob(1))
            assert client.get(make_key(1)) is not None


def test_chunks_that_lie_in_the_memory_of_their_pool_are_not_copied(service: Service) -> None:
    """Lent where they lie, for as long as somebody reads them; what was put before, or over HTTP by others, too."""
    shared = service.context.shared_memory
    with service.client(shared_memory=False) as other, service.client() as client:
        other.put(make_key(1), make_blob(1, numbers=50_000))  # before there is such memory
        client.get(make_key(9))
        client.get(make_key(9))
        memory = shared.pool_memory("default")
        assert memory is not None and memory.used_bytes == 0
        other.put(make_key(2), make_blob(2, numbers=50_000))
        client.put(make_key(3), make_blob(3, numbers=50_000))
        found = {number: client.get(make_key(number)) for number in (1, 2, 3)}
        for number, blob in found.items():
            assert blob is not None and blob.leased and same_blob(blob, make_blob(number, numbers=50_000))
        (session,) = shared._sessions.values()
        assert [container is None for _, container in session.leases.values()] == [True, False, False]
        assert session.borrowed_bytes > 0 and memory.used_bytes > 2 * 50_000
        other.delete(make_key(2))
        other.put(make_key(4), make_blob(4, numbers=50_000))
        assert found[2] is not None and same_blob(found[2], make_blob(2, numbers=50_000))  # its place was not taken
        found.clear()
        del blob
        for _ in range(2):
            client.get(make_key(9))
        assert eventually(lambda: session.borrowed_bytes == 0 and not session.leases)


def test_nobody_writes_through_the_memory_of_a_pool(service: Service) -> None:
    """Neither through the descriptor that clients get nor through what they read; other pools have other memory."""
    shared = service.context.shared_memory
    with service.client() as client, service.client(service.new_token("other")) as stranger:
        for each in (client, stranger):
            each.get(make_key(9))
            each.get(make_key(9))
            each.put(make_key(1), make_blob(1))
        mine, theirs = shared.pool_memory("default"), shared.pool_memory("other")
        assert mine is not None and theirs is not None and mine is not theirs
        with pytest.raises(OSError):
            os.pwrite(mine.descriptor, b"x", 0)
        with pytest.raises(OSError):
            mmap.mmap(mine.descriptor, mine.nbytes)
        with pytest.raises(OSError):
            os.ftruncate(mine.descriptor, 4096)
        found = client.get(make_key(1))
        assert found is not None and found.leased
        next(iter(found.tensors.values())).view(-1).view(torch.uint8)[0] ^= 255  # a page of its own from now on
        with service.client() as another:
            another.get(make_key(9))
            again = another.get(make_key(1))
            assert again is not None and again.leased and same_blob(again, make_blob(1))
