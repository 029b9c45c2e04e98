"""What one tenant does costs no other: numbers, logs, budgets and memories are each tenant's own."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvloom.core import ChunkInfo, ChunkKey
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.access import audit
from kvloom.service.access.audit import AuditLog
from kvloom.service.access.limits import UploadBudget
from kvloom.service.access.tenants import TenantFile
from kvloom.service.chunk_index import ListedChunk
from kvloom.service.jobs import Jobs
from kvloom.service.kv_events import KVEvents
from kvloom.service.problems import ProblemError
from kvloom.service.served_store import ServedStore
from kvloom.testing.chunks import make_blob, make_key

from ...support.fakes import Clock
from ...support.patience import LONG_S
from ..serving import Service, service_in_thread

NBYTES = make_blob(0).nbytes


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with service_in_thread(tmp_path, [HostTier(None)]) as service:
        yield service


@pytest.mark.slow
def test_what_a_tenant_is_told_does_not_tell_what_others_do(service: Service) -> None:
    mine, theirs = service.new_token("mine"), service.new_token("theirs")
    with service.client(mine) as client, service.client(theirs) as other:
        client.put(make_key(1), make_blob(1))
        before = service.ask("GET", "/v1/chunks", token=mine).json()
        number = service.context.events.sequence("mine")
        for each in range(50):
            other.put(make_key(each), make_blob(each))
        assert service.ask("GET", "/v1/chunks", token=mine).json() == before, "the same cursor, too"
        assert service.context.events.sequence("mine") == number
        assert client.changes(before["cursor"]) == ([], before["cursor"])
        assert service.ask("GET", "/v1/stats", token=mine).json() == {
            "namespaces": [{"namespace": "", "tier": "host", "nbytes": NBYTES}],
            "chunks": 1,
            "service": None,
        }


@pytest.mark.slow
def test_a_flood_makes_no_other_follower_start_anew(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.service.chunk_index._LOGGED_CHANGES", 20)
    with service.client(service.new_token("mine")) as client, service.client(service.new_token("theirs")) as other:
        client.put(make_key(1), make_blob(1))
        _, cursor = client.entries()
        _, other_cursor = other.entries()
        client.delete(make_key(1))
        for each in range(50):
            other.put(make_key(each), make_blob(each))
        found = client.changes(cursor)
        assert found is not None and found[0] == [make_key(1)]
        assert other.changes(other_cursor) is None, "its own log is the one that has run over"


def test_events_that_are_forgotten_are_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.service.kv_events._REMEMBERED", 4)
    store = ServedStore([HostTier(None)], quotas={}, timeout_s=1.0)
    tenants = TenantFile(tmp_path / "tenants.json")
    events = KVEvents(store, tenants)

    def stored(pool: str, number: int) -> None:
        tenants.get(pool)
        chunk = ListedChunk(ChunkKey(make_key(number)), 1, ChunkInfo(namespace=pool), number)
        events.moved(chunk, "host", (), is_there=True)

    stored("a", 1)
    for number in range(10):
        stored("b", number)
    assert [each.fields["type"] for each in events.since(0, "a")] == ["BlockStored"] and events.sequence("a") == 1
    assert [each.sequence for each in events.since(7, "b")] == [8, 9, 10]
    late = events.since(2, "b")
    assert [each.fields["type"] for each in late] == ["AllBlocksCleared", *["BlockStored"] * 4]
    assert [each.sequence for each in late] == [6, 7, 8, 9, 10] and events.since(10, "b") == []
    assert events.since(-1, "c")[0].as_json() == {"type": "AllBlocksCleared"}, "a number of another run"
    store.close()


@pytest.mark.slow
def test_a_follower_that_comes_back_is_told_what_it_missed(tmp_path: Path) -> None:
    def follow(service: Service, last: str, count: int) -> list[tuple[str, str]]:
        """ID and kind of the next events, so many at least."""
        head = f"GET /v1/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\n"
        with socket.create_connection(("127.0.0.1", service.port), timeout=LONG_S) as sock:
            sock.sendall(f"{head}Last-Event-ID: {last}\r\n\r\n".encode())
            text = b""
            while text.count(b"data: ") < count or not text.endswith(b"\n\n\r\n"):
                piece = sock.recv(65536)
                assert piece, text
                text += piece
        lines = text.decode().splitlines()
        pairs = [each.partition(": ")[::2] for each in lines if each.startswith(("id: ", "event: "))]
        return [(number, kind) for (_, number), (_, kind) in zip(pairs[::2], pairs[1::2], strict=True)]

    with service_in_thread(tmp_path, [HostTier(None)]) as service, service.client() as client:
        for number in range(3):
            client.put(make_key(number), make_blob(number))
        run = service.context.index.epoch
        assert follow(service, f"{run}.1", 2) == [(f"{run}.2", "BlockStored"), (f"{run}.3", "BlockStored")]
        client.put(make_key(3), make_blob(3))
        assert follow(service, f"{run}.3", 1) == [(f"{run}.4", "BlockStored")], "nothing is told twice"
        assert service.ask("GET", "/v1/events", headers={"Last-Event-ID": "seven"}).status == 422
    with service_in_thread(tmp_path, [HostTier(None)]) as service, service.client() as client:
        client.put(make_key(9), make_blob(9))
        kinds = [kind for _, kind in follow(service, f"{run}.3", 2)]
        assert kinds == ["AllBlocksCleared", "BlockStored"], "another run: nothing that was known holds"


def test_a_tenant_cannot_take_the_whole_budget_of_uploads() -> None:
    budget = UploadBudget(100, 60)
    with budget.taking("greedy", 60):
        with pytest.raises(ProblemError, match="try again"), budget.taking("greedy", 1):
            pass
        with budget.taking("other", 40), pytest.raises(ProblemError, match="try again"), budget.taking("third", 1):
            pass
    with budget.taking("third", 60):
        assert budget.used_bytes == 60
    assert budget.used_bytes == 0


def test_jobs_of_one_tenant_do_not_push_out_those_of_another() -> None:
    jobs = Jobs()
    mine = jobs.add("mine", "test", lambda: None)
    jobs.update(mine, "finished")
    theirs = [jobs.add("theirs", "test", lambda: None) for _ in range(100)]
    for _ in range(2000):
        jobs.update(jobs.add("theirs", "test", lambda: None), "finished")
    assert jobs.get("mine", mine.id) is mine and jobs.get("theirs", theirs[0].id) is theirs[0]
    with pytest.raises(ProblemError, match="jobs are running"):
        for _ in range(200):
            jobs.add("theirs", "test", lambda: None)
    jobs.add("mine", "test", lambda: None)


@pytest.mark.slow
def test_repeated_requests_of_one_tenant_are_known_whatever_others_send(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.service.idempotency._REMEMBERED", 3)
    mine, theirs = service.new_token("mine"), service.new_token("theirs")
    body = {"keys": [make_key(1).hex()], "deadline_s": 60.0}

    def pin(token: str, key: str) -> str:
        return str(service.ask("POST", "/v1/pins", body, token=token, headers={"Idempotency-Key": key}).json()["id"])

    first = pin(mine, "k")
    assert pin(theirs, "k") != first, "another tenant's key is another key"
    for number in range(8):
        pin(theirs, str(number))
    assert pin(mine, "k") == first


@pytest.mark.slow
def test_a_tenant_is_limited_by_itself_even_within_a_pool(service: Service) -> None:
    for name in ("one", "two"):
        limit = {"pool": "shared", "requests_per_s": 0.2 if name == "one" else None}
        assert service.ask("PUT", f"/v1/tenants/{name}", limit).status == 204
    one, two = service.new_token("one"), service.new_token("two")
    assert [service.ask("GET", "/v1/stats", token=one).status for _ in range(4)] == [200, 200, 429, 429]
    assert [service.ask("GET", "/v1/stats", token=two).status for _ in range(4)] == [200] * 4


def test_who_has_no_token_cannot_fill_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = Clock(), AuditLog(tmp_path / "audit.jsonl")
    monkeypatch.setattr(audit, "time", SimpleNamespace(time=time.time, monotonic=clock))
    for number in range(5000):
        log.write_stranger(status=401, number=number)
    log.write(status=204)
    lines = (tmp_path / "audit.jsonl").read_text().splitlines()
    assert len(lines) == 21 and json.loads(lines[-1])["status"] == 204, "what a tenant does is always told"
    clock.now_s += 1.0
    log.write_stranger(status=401)
    assert json.loads((tmp_path / "audit.jsonl").read_text().splitlines()[-1])["left_out_before"] == 4980
    log.close()


def test_the_audit_log_keeps_its_last_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvloom.service.access.audit._MOST_BYTES", 1000)
    log = AuditLog(tmp_path / "audit.jsonl")
    for number in range(1000):
        log.write(number=number)
    log.close()
    files = sorted(tmp_path.iterdir())
    assert [path.name for path in files] == ["audit.jsonl", *(f"audit.jsonl.{n}" for n in range(1, 9))]
    lines = [line for path in [*files[:0:-1], files[0]] for line in path.read_text().splitlines()]
    numbers = [json.loads(line)["number"] for line in lines]
    assert numbers == list(range(numbers[0], 1000)), "nothing in between is missing"
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files)


@pytest.mark.slow
def test_one_tenant_at_ten_times_the_load_of_another(tmp_path: Path) -> None:
    """B puts ten chunks for each that A puts, from ten threads; A keeps its reserve, and every answer is A's own."""
    with service_in_thread(tmp_path, [HostTier(40 * NBYTES)]) as service:
        service.ask("PUT", "/v1/tenants/careful", {"reserve_ratio": 0.5})
        careful_token, flood_token = service.new_token("careful"), service.new_token("flood")
        ended, counts, wrong = threading.Event(), [0] * 10, []

        def flood(thread: int) -> None:
            with service.client(flood_token, shared_memory=False) as client:
                while not ended.is_set():
                    client.put(make_key(counts[thread] % 50), make_blob(5000 + counts[thread]))
                    counts[thread] += 1

        threads = [threading.Thread(target=flood, args=(n,)) for n in range(10)]
        for thread in threads:
            thread.start()
        try:
            with service.client(careful_token, shared_memory=False, timeout_s=30) as client:
                keys = [make_key(number) for number in range(20)]
                for number in range(20):
                    client.put(keys[number], make_blob(number))
                while sum(counts) < 300:
                    if client.match(keys) != 20:
                        wrong.append(client.match(keys))
                    time.sleep(0.02)
                found = [client.get(key) for key in keys]
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert wrong == [] and sum(counts) >= 10 * 20
        assert all(blob is not None and blob.nbytes == NBYTES for blob in found)
