"""Chunks over HTTP: what is put is what comes back, and nothing else is ever given."""

import base64
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.core import ChunkInfo
from kvloom.kvstore.chunk_store import ChunkStore
from kvloom.kvstore.format import from_bytes, to_bytes
from kvloom.kvstore.placement.quota import Quota
from kvloom.kvstore.tiers.host import HostTier
from kvloom.service.access.tenants import KeySpace
from kvloom.service.documents.tenant_store import TenantStore
from kvloom.service.served_store import ServedStore
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk

from ..support.patience import eventually
from .serving import Service, service_in_thread

KEY = make_key(7)
BLOB = make_blob(3, numbers=50_000)
BODY = to_bytes(KEY, BLOB)
PATH = f"/v1/chunks/{KEY.hex()}"


@pytest.fixture(scope="module", params=[1, 2], ids=["alone", "workers"])
def shared_service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service_in_thread(tmp_path_factory.mktemp("service"), workers=request.param) as service:
        yield service


@pytest.fixture
def service(shared_service: Service) -> Iterator[Service]:
    yield shared_service
    shared_service.ask("DELETE", PATH)


def test_a_chunk_comes_back_as_it_was_put(service: Service) -> None:
    put = service.ask("PUT", PATH, BODY)
    assert put.status == 201 and put.headers["etag"].startswith('"')
    got = service.ask("GET", PATH)
    assert got.status == 200 and got.body == BODY and got.headers["etag"] == put.headers["etag"]
    assert got.headers["content-type"] == "application/vnd.kvloom.chunk"
    assert service.ask("PUT", PATH, BODY).status == 204
    assert service.ask("DELETE", PATH).status == 204
    assert service.ask("GET", PATH).status == 404 and service.ask("DELETE", PATH).status == 404
    assert service.ask("HEAD", PATH).status == 404


def test_head_says_what_get_says(service: Service) -> None:
    etag = service.ask("PUT", PATH, BODY).headers["etag"]
    head = service.ask("HEAD", PATH)
    assert head.status == 200 and head.body == b"" and head.headers["etag"] == etag


def test_layers_come_alone_and_verified(service: Service) -> None:
    service.ask("PUT", PATH, BODY)
    got = service.ask("GET", PATH, headers={"Range": "layers=1-2"})
    assert got.status == 206 and got.headers["content-range"] == "layers 1-2/4"
    assert same_blob(from_bytes(KEY, got.body), BLOB.layers(1, 3))
    assert service.ask("GET", PATH, headers={"Range": "layers=9-12"}).status == 416
    assert service.ask("GET", PATH, headers={"Range": "layers=-1"}).headers["content-range"] == "layers 3-3/4"


@pytest.mark.parametrize(
    ("part", "span"),
    [("bytes=0-99", (0, 100)), ("bytes=100-", (100, len(BODY))), ("bytes=-7", (len(BODY) - 7, len(BODY)))],
)
def test_byte_ranges_resume_a_download(service: Service, part: str, span: tuple[int, int]) -> None:
    etag = service.ask("PUT", PATH, BODY).headers["etag"]
    got = service.ask("GET", PATH, headers={"Range": part, "If-Range": etag})
    assert got.status == 206 and got.body == BODY[slice(*span)]
    assert got.headers["content-range"] == f"bytes {span[0]}-{span[1] - 1}/{len(BODY)}"
    assert service.ask("GET", PATH, headers={"Range": part, "If-Range": '"other"'}).body == BODY


def test_ranges_that_are_none(service: Service) -> None:
    service.ask("PUT", PATH, BODY)
    beyond = service.ask("GET", PATH, headers={"Range": f"bytes={len(BODY)}-"})
    assert beyond.status == 416 and beyond.headers["content-range"] == f"bytes */{len(BODY)}"
    for ignored in ("bytes=5-2", "bytes=-", "lines=1-2", "bytes=0-1,3-4", "nonsense"):
        assert service.ask("GET", PATH, headers={"Range": ignored}).status == 200


def test_conditions(service: Service) -> None:
    etag = service.ask("PUT", PATH, BODY).headers["etag"]
    assert service.ask("GET", PATH, headers={"If-None-Match": f'"x", {etag}'}).status == 304
    assert service.ask("GET", PATH, headers={"If-None-Match": '"x"'}).status == 200
    assert service.ask("PUT", PATH, BODY, headers={"If-None-Match": "*"}).status == 412


def test_digests(service: Service) -> None:
    digest = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    assert service.ask("PUT", PATH, BODY, headers={"Content-Digest": f"sha-256=:{digest}:"}).status == 201
    got = service.ask("GET", PATH, headers={"Want-Content-Digest": "sha-256=10"})
    assert got.headers["content-digest"] == f"sha-256=:{digest}:"
    for wrong in ("sha-256=:AAAA:", "md5=:AAAA:", "?"):
        assert service.ask("PUT", PATH, BODY, headers={"Content-Digest": wrong}).status == 400


def test_a_damaged_container_is_refused_wherever_it_is_damaged(service: Service) -> None:
    rng = random.Random(1)
    for _ in range(40):
        body = bytearray(BODY)
        body[rng.choice([rng.randrange(80), rng.randrange(len(BODY))])] ^= 1 << rng.randrange(8)
        put = service.ask("PUT", PATH, bytes(body))
        assert put.status == 422 and put.headers["content-type"] == "application/problem+json"
        assert put.json()["type"] == "urn:kvloom:problem:corrupt"
    assert service.ask("PUT", PATH, BODY[:-1]).status == 422
    assert service.ask("PUT", f"/v1/chunks/{make_key(8).hex()}", BODY).status == 422  # the container of another key
    assert service.ask("GET", PATH).status == 404


def test_expiry_and_namespace(service: Service) -> None:
    headers = {"KVLoom-Namespace": "rag", "KVLoom-TTL": "2"}
    assert service.ask("PUT", PATH, BODY, headers=headers).status == 201
    listed = service.ask("GET", "/v1/chunks").json()["chunks"]
    assert [(each["key"], each["namespace"]) for each in listed] == [(KEY.hex(), "rag")]
    assert eventually(lambda: service.ask("GET", PATH).status == 404)
    assert service.ask("PUT", PATH, BODY, headers={"KVLoom-Namespace": "x" * 200}).status == 422


def test_chunks_survive_a_restart(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service:
        service.client().put(KEY, BLOB, ChunkInfo(namespace="rag", recompute_s=0.5))
        etag = service.ask("GET", PATH).headers["etag"]
    with service_in_thread(tmp_path) as service:
        found = service.client().get(KEY)
        assert found is not None and same_blob(found, BLOB)
        assert service.ask("GET", PATH).headers["etag"] == etag
        (entry,), _ = service.client().entries()
        assert entry.key == KEY and entry.info == ChunkInfo(namespace="rag", recompute_s=0.5)
        assert entry.nbytes == -(-len(BODY) // 4096) * 4096


def test_lists_and_changes_tell_all_in_order(tmp_path: Path) -> None:
    with service_in_thread(tmp_path) as service, service.client() as client:
        for number in range(5):
            client.put(make_key(number), make_blob(number))
        client.put(make_key(1), make_blob(1))
        pages, cursor = [], ""
        while True:
            page = service.ask("GET", f"/v1/chunks?limit=2&cursor={cursor}").json()
            pages += [each["key"] for each in page["chunks"]]
            cursor = page["cursor"]
            if page["is_complete"]:
                break
        assert pages == [make_key(number).hex() for number in (0, 2, 3, 4, 1)]
        client.delete(make_key(3))
        client.put(make_key(9), make_blob(9))
        changes, after = client.changes(cursor)
        assert changes[0] == make_key(3) and changes[1].key == make_key(9) and len(changes) == 2
        assert client.changes(after) == ([], after)
        assert client.changes("00000000.5") is None
        assert service.ask("GET", "/v1/changes?cursor=x.y").status == 422


def test_full_tiers_evict_and_tell(tmp_path: Path) -> None:
    nbytes = BLOB.nbytes
    with service_in_thread(tmp_path, [HostTier(3 * nbytes + 100)]) as service, service.client() as client:
        for number in range(5):
            client.put(make_key(number), make_blob(number, numbers=50_000))
        kept, _ = client.entries()
        assert len(kept) == 3
        assert all(
            (client.get(make_key(number)) is not None) == (make_key(number) in {e.key for e in kept})
            for number in range(5)
        )
        big = make_blob(99, numbers=200_000)
        assert service.ask("PUT", f"/v1/chunks/{make_key(50).hex()}", to_bytes(make_key(50), big)).status == 507


def test_a_tenant_has_a_store_of_its_own_over_the_one_that_is_served(tmp_path: Path) -> None:
    """The embedded engine's view: every method of `ChunkStore`, in the tenant's key space, whatever store is served."""
    served = ServedStore([HostTier(None)], quotas={}, timeout_s=1.0)
    mine, theirs = (TenantStore(served, KeySpace(salt * 32), f"{salt.decode()}/documents") for salt in (b"a", b"b"))
    assert isinstance(mine, ChunkStore)
    key, chunk = make_key(1), make_chunk(1)
    mine.put(key, chunk, recompute_s=0.5)
    found = mine.get(key)
    assert found is not None and same_chunk(found, chunk) and key in mine and mine.locate(key) == "host"
    assert (mine.match([key]), mine.locate_prefix([key]), theirs.match([key])) == (1, ("host",), 0)
    assert theirs.get(key) is None and key not in theirs and not theirs.delete(key)
    assert mine.explain([key])[0].recompute_s == 0.5
    with mine.pinned([key]), served.use() as store:
        assert store.stats().pinned == 1
        assert store.stats().tiers[0].namespace_bytes.keys() == {"a/documents"}
    served.replace(quotas={"x": Quota(0.1, 0.5)})
    hit = mine.read(key, layers=(0, 1))
    assert hit is not None and hit.recompute_s == 0.5
    mine.close()
    assert mine.delete(key) and mine.read(key) is None
    served.close()
