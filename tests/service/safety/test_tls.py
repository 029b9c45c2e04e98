"""Other machines reach the service over TLS with tokens, or not at all: a certificate made here, real clients."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvloom.errors import TierUnavailableError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.remote.client import AsyncKVLoomClient, KVLoomClient
from kvloom.kvstore.tiers.remote.tier import RemoteTier
from kvloom.service.access.certificate import Certificate as ServedCertificate
from kvloom.service.access.credentials import TokenFile
from kvloom.testing.chunks import make_blob, make_chunk, make_key, same_blob, same_chunk

from ..serving import Certificate, ServiceProcess, service_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates; it is not installed"),
]
ELSEWHERE = "127.0.0.2"  # an address that neither side takes for this host: no shared memory


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Certificate(tmp_path_factory.mktemp("tls") / "own")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, certificate: Certificate) -> Iterator[ServiceProcess]:
    """`kvloom serve` at every address, which it takes only with a certificate and tokens."""
    directory = tmp_path_factory.mktemp("service")
    TokenFile(directory / "tokens.json").create("operator", ["admin"])
    options = ("--host", "0.0.0.0", *certificate.options)
    with service_process(directory, *options, certificate=certificate) as service:
        yield service


def test_clients_with_the_certificate_put_and_get(service: ServiceProcess, certificate: Certificate) -> None:
    assert "at every address of this host" in service.lines[0]
    large = make_blob(1, numbers=2_000_000)
    for host, key in ((ELSEWHERE, make_key(1)), ("localhost", make_key(2))):
        with KVLoomClient(
            f"https://{host}:{service.port}", token=service.token, ca_file=certificate.chain, timeout_s=30
        ) as client:
            client.put(key, large)
            for _ in range(2):  # the second time through shared memory, where the host is this one
                found = client.get(key)
                assert found is not None and same_blob(found, large)
            assert found.leased is (host == "localhost")
            part = client.get_layers(key, 1, 3)
            assert part is not None and same_blob(part, large.layers(1, 3))
    tier = RemoteTier(f"https://{ELSEWHERE}:{service.port}", token=service.token, ca_file=certificate.chain)
    with KVStore([tier]) as store:
        store.put(make_key(3), make_chunk(3))
        found = store.get(make_key(3))
        assert found is not None and same_chunk(found, make_chunk(3))


def test_the_asynchronous_client_does_the_same(service: ServiceProcess, certificate: Certificate) -> None:
    async def work() -> None:
        url = f"https://{ELSEWHERE}:{service.port}"
        async with AsyncKVLoomClient(url, token=service.token, ca_file=certificate.chain) as client:
            await asyncio.gather(*(client.put(make_key(n), make_blob(n)) for n in range(10, 20)))
            assert await client.match([make_key(n) for n in range(10, 25)]) == 10

    asyncio.run(work())


def test_who_does_not_trust_the_certificate_says_nothing(
    service: ServiceProcess, certificate: Certificate, tmp_path: Path
) -> None:
    url = f"https://{ELSEWHERE}:{service.port}"
    other = Certificate(tmp_path / "other")
    for client in (
        KVLoomClient(url, token="secret", retries=0),
        KVLoomClient(url, token="secret", retries=0, ca_file=other.chain),
        KVLoomClient(f"https://127.0.0.3:{service.port}", token="secret", retries=0, ca_file=certificate.chain),
    ):
        with pytest.raises(TierUnavailableError, match="certificate verify failed"):
            client.get(make_key(1))
    with KVStore([RemoteTier(url, token="secret")]) as store:
        assert store.get(make_key(1)) is None
    for wrong, says in (
        (lambda: KVLoomClient(url, token="t", ca_file=tmp_path / "none.pem"), "no certificate that can be read"),
        (lambda: KVLoomClient(url, token="t", ca_file=certificate.key), "no certificate that can be read"),
        (lambda: KVLoomClient("http://localhost:1", token="t", ca_file=certificate.chain), "expected https"),
        (
            lambda: KVLoomClient(url, token="t", ca_file=certificate.chain, tls=ssl.create_default_context()),
            "at most one",
        ),
    ):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_curl(service: ServiceProcess, certificate: Certificate) -> None:
    def curl(*options: str, path: str = "/v1/stats") -> subprocess.CompletedProcess[str]:
        command = ["curl", "-sS", "-o", "-", "-w", "\n%{http_code}", *options]
        url = f"https://{ELSEWHERE}:{service.port}{path}"
        return subprocess.run([*command, url], capture_output=True, text=True, timeout=30, check=False)

    trusting = ("--cacert", str(certificate.chain))
    token = ("-H", f"Authorization: Bearer {service.token}")
    assert curl(*trusting, *token).stdout.endswith("\n200")
    assert curl(*trusting).stdout.endswith("\n401")
    assert curl(*trusting, path="/healthz").stdout == '{"status":"ok"}\n200'
    assert curl(*token).returncode == 60  # not trusted
    assert curl("--tls-max", "1.1", "--tlsv1.0", "--ciphers", "DEFAULT@SECLEVEL=0", *trusting, *token).returncode == 35


def test_plain_http_is_not_understood(service: ServiceProcess) -> None:
    with socket.create_connection((ELSEWHERE, service.port), timeout=10) as sock:
        sock.sendall(f"GET /v1/stats HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.token}\r\n\r\n".encode())
        try:
            answer = sock.recv(4096)
        except ConnectionResetError:
            answer = b""
        assert not answer.startswith(b"HTTP/")


def test_connections_that_shake_no_hands_stop_nobody(service: ServiceProcess) -> None:
    silent = [socket.create_connection((ELSEWHERE, service.port)) for _ in range(300)]
    try:
        began_s = time.monotonic()
        assert service.ask("GET", "/v1/stats").status == 200 and time.monotonic() - began_s < 10
    finally:
        for sock in silent:
            sock.close()


def test_a_new_certificate_is_shown_to_new_connections(tmp_path: Path) -> None:
    old = Certificate(tmp_path / "tls")
    served = ServedCertificate(old.chain, old.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(old.chain, old.key)
    assert not served.renew(context)
    before = shown(context)
    new = Certificate(tmp_path / "new")
    shutil.copy(new.chain, old.chain)
    assert not served.renew(context) and shown(context) == before, "the key is still the old one"
    old.chain.unlink()
    assert not served.renew(context) and shown(context) == before
    shutil.copy(new.chain, old.chain)
    shutil.copy(new.key, old.key)
    assert served.renew(context) and shown(context) == ssl.PEM_cert_to_DER_cert(new.chain.read_text()) != before
    assert not served.renew(context)
    for chain, key in ((tmp_path / "none", old.key), (old.key, old.key), (old.chain, tmp_path / "none")):
        with pytest.raises(ValueError, match="expected a certificate and its key"):
            ServedCertificate(chain, key)


def test_a_running_service_takes_a_new_certificate(tmp_path: Path) -> None:
    certificate = Certificate(tmp_path / "tls")
    with service_process(tmp_path / "kv", *certificate.options, certificate=certificate) as service:
        new = Certificate(tmp_path / "new")
        shutil.copy(new.key, certificate.key)
        shutil.copy(new.chain, certificate.chain)
        until_s = time.monotonic() + 30
        while ssl.get_server_certificate(("127.0.0.1", service.port)) != new.chain.read_text():
            assert time.monotonic() < until_s, "the old certificate is still shown"
            time.sleep(0.2)
        with KVLoomClient(f"https://localhost:{service.port}", token=service.token, ca_file=new.chain) as client:
            assert client.match([make_key(1)]) == 0


def shown(context: ssl.SSLContext) -> bytes | None:
    """The certificate that a server with this context shows, by a handshake in memory."""
    client_context = ssl.create_default_context()
    client_context.check_hostname, client_context.verify_mode = False, ssl.CERT_NONE
    (to_server, to_client) = (ssl.MemoryBIO(), ssl.MemoryBIO())
    client = client_context.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (client, server):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client.getpeercert(binary_form=True)
