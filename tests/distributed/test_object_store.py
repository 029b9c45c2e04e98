"""What is particular to an object store as a tier: S3's requests, counted at a proxy."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvloom.bench.harness.samples import encoded, sample_chunk, sample_key
from kvloom.bench.harness.servers import Server
from kvloom.core import ChunkInfo
from kvloom.errors import ChunkCorruptError, TierTimeoutError, TierUnavailableError
from kvloom.testing import make_blob, make_key, same_blob

from .servers import BUCKET, MIB, a_sharing, s3_tier


def test_large_objects_come_in_parts_and_appear_whole(s3: Server) -> None:
    sharing = a_sharing(timeout_s=30.0)
    tier, reader = s3_tier(s3, sharing, multipart_bytes=MIB), s3_tier(s3, sharing)
    key = sample_key(1)
    (blob,) = encoded({key: sample_chunk(24 * MIB, seed=1)}).values()
    seen: list[bool] = []
    putting = threading.Thread(target=lambda: tier.put(key, blob))
    putting.start()
    while putting.is_alive():
        found = reader.get(key)
        seen.append(found is not None)
        assert found is None or same_blob(found, blob)
    putting.join()
    found = reader.get(key)
    assert found is not None and same_blob(found, blob)
    layers = reader.get_layers(key, 2, 3)
    assert layers is not None and same_blob(layers, blob.layers(2, 3))
    assert sorted(seen) == seen  # absent, then there for good


def test_the_same_chunk_is_not_written_twice(s3: Server) -> None:
    import obstore

    sharing = a_sharing()
    tier, other = s3_tier(s3, sharing), s3_tier(s3, sharing)
    store = tier._store._store
    name = sharing.prefix + make_key(1).hex()
    tier.put(make_key(1), make_blob(1))
    first = obstore.head(store, name)["last_modified"]
    time.sleep(1.1)  # times are whole seconds
    other.put(make_key(1), make_blob(1))
    assert obstore.head(store, name)["last_modified"] == first
    other.put(make_key(1), make_blob(1), ChunkInfo(namespace="team"))
    assert obstore.head(store, name)["last_modified"] > first
    found = s3_tier(s3, sharing)
    (entry,) = found.find([make_key(1)])
    assert entry is not None and entry.info.namespace == "team"


def test_damage_is_found(s3: Server) -> None:
    import obstore

    sharing = a_sharing()
    tier = s3_tier(s3, sharing)
    for number, offset in enumerate((-3, 20, 400)):
        tier.put(make_key(number), make_blob(number))
        name = sharing.prefix + make_key(number).hex()
        data = bytearray(obstore.get(tier._store._store, name).bytes())
        data[offset] ^= 1
        obstore.put(tier._store._store, name, bytes(data))
        with pytest.raises(ChunkCorruptError):
            tier.get(make_key(number))


def test_a_chunk_that_has_expired_is_absent_and_removed(s3: Server) -> None:
    sharing = a_sharing()
    tier = s3_tier(s3, sharing)
    expires_at_s = time.time() + 2.0
    tier.put(make_key(1), make_blob(1), ChunkInfo(expires_at_s=expires_at_s))
    assert tier.get(make_key(1)) is not None
    time.sleep(max(0.0, expires_at_s - time.time()))
    assert tier.find([make_key(1)]) == [None] and tier.get(make_key(1)) is None and make_key(1) not in tier


class Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(403)

    def do_PUT(self) -> None:
        self.send_error(403)

    def log_message(self, *_: object) -> None:
        pass


def test_refusals_and_silence_are_unavailability() -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tier = s3_tier(Server([], server.server_port, None), a_sharing(timeout_s=1.0))
        for call in (lambda: tier.get(make_key(1)), lambda: tier.put(make_key(1), make_blob(1))):
            with pytest.raises(TierUnavailableError):
                call()
        server.shutdown()


def test_a_bucket_that_is_not_there(s3: Server) -> None:
    from kvloom.kvstore.tiers.distributed.object_tier import ObjectStoreTier, s3_store

    store = s3_store(f"{BUCKET}-none", endpoint=f"http://127.0.0.1:{s3.port}", access_key_id="a", secret_access_key="b")
    tier = ObjectStoreTier(store, sharing=a_sharing())
    assert tier.get(make_key(1)) is None
    with pytest.raises(TierUnavailableError):
        tier.put(make_key(1), make_blob(1))


def test_deadline(s3: Server) -> None:
    from ..support.proxy import Proxy

    with Proxy(s3.port or 0) as proxy:
        proxy.is_frozen = True
        tier = s3_tier(s3, a_sharing(timeout_s=0.5), port=proxy.port)
        began_s = time.monotonic()
        with pytest.raises(TierTimeoutError):
            tier.get(make_key(1))
        assert time.monotonic() - began_s < 4.5  # one more try; without the deadline 5 s at least
