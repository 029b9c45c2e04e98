"""Tiers by URL: what opens, what is refused and how, and that settings and the service take the same."""

from pathlib import Path

import pytest

from kvloom.bench.harness.servers import Server
from kvloom.connectors.serving.settings import ServingSettings
from kvloom.connectors.tier_url import check_url, open_tier, shown
from kvloom.kvstore.tiers.remote.tier import RemoteTier
from kvloom.testing import make_blob, make_key, same_blob

from .servers import BUCKET, Cluster


def test_every_engine_opens(redis: Server, s3: Server, mooncake: Cluster, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("access\nsecret\n")
    urls = (
        f"redis://127.0.0.1:{redis.port}/1?prefix=url-test/&capacity=1MiB&in_flight=64MiB&recheck_s=0.1&ttl_s=60",
        f"s3://{BUCKET}/folder?endpoint=http://127.0.0.1:{s3.port}&credentials_file={tmp_path / 'keys'}&multipart=8MiB",
        f"mooncake://{mooncake.address}?replicas=2&staging=8MiB",
    )
    for url in urls:
        tier = open_tier(url, name="far", timeout_s=5.0)
        tier.put(make_key(1), make_blob(1))
        found = tier.get(make_key(1))
        assert found is not None and same_blob(found, make_blob(1)) and tier.name == "far"
        assert tier.capacity_bytes == (1 << 20 if url.startswith("redis") else None)
        tier.delete(make_key(1))
        tier.close()


def test_a_service_by_url(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    for tier in (open_tier(f"http://127.0.0.1:1?token_file={token}"), open_tier("http://h:1", token_file=str(token))):
        assert isinstance(tier, RemoteTier) and "?" not in tier.client.url
    with pytest.raises(ValueError, match="needs a token"):
        open_tier("http://127.0.0.1:1")
    with pytest.raises(ValueError, match="for a kvloom service"):
        open_tier("redis://127.0.0.1", token_file=str(token))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host", "begins with one of http, https, redis"),
        ("/tmp/folder", "is no tier"),
        ("redis://", "names no host"),
        ("s3://", "names no host"),
        ("redis://:secret@h:1?replicas=2", "redis://h:1 has the option 'replicas'; known are password_file"),
        ("s3://b?region=", "empty option 'region'"),
        ("s3://b?region=a&region=b", "an option twice"),
    ],
)
def test_wrong_urls_are_refused_in_one_line(url: str, message: str) -> None:
    for check in (check_url, open_tier, lambda url: ServingSettings.of({"remote_url": url})):
        with pytest.raises(ValueError) as refused:
            check(url)
        text = str(refused.value)
        assert message in text and "\n" not in text and "secret" not in text
    assert shown("redis://user:secret@h:1/0?password_file=x") == "redis://h:1/0"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://h?capacity=much", "option capacity is 'much'; expected bytes"),
        ("redis://h?recheck_s=soon", "option recheck_s is 'soon'; expected a number"),
        ("redis://h?ttl_s=0", "ttl_s is 0"),
        ("mooncake://h", "expected host:port"),
        ("mooncake://h:1?replicas=0", "replicas is 0"),
    ],
)
def test_wrong_options_are_refused_when_the_tier_is_opened(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_tier(url)


def test_settings(tmp_path: Path) -> None:
    settings = ServingSettings.of({"remote_url": "redis://h:6379/0?prefix=a/"})
    assert settings.remote_url == "redis://h:6379/0?prefix=a/"
    token = tmp_path / "token"
    token.write_text("t")
    with pytest.raises(ValueError, match="belong together"):
        ServingSettings.of({"remote_url": "redis://h:6379/0", "remote_token_file": str(token)})
    with pytest.raises(ValueError, match="belong together"):
        ServingSettings.of({"remote_url": "http://h:8700"})


def test_a_service_attaches_one_at_run_time(redis: Server, tmp_path: Path) -> None:
    from ..service.serving import service_in_thread

    url = f"redis://127.0.0.1:{redis.port}/2"
    tiers = {"far": url, "wrong": "redis://:pw@h?x=1"}
    with service_in_thread(tmp_path, remote_tiers=tiers) as service:
        admin = service.new_token(scopes=("read", "write", "admin"))
        user = service.new_token()
        assert service.ask("PUT", "/v1/tiers/far", {"kind": "remote"}, token=user).status == 403
        wrong = service.ask("PUT", "/v1/tiers/wrong", {"kind": "remote"}, token=admin)
        assert wrong.status == 422 and "'x'" in str(wrong.json()) and "pw" not in str(wrong.json())
        assert service.ask("PUT", "/v1/tiers/unknown", {"kind": "remote"}, token=admin).status == 422
        assert service.ask("PUT", "/v1/tiers/far", {"kind": "remote", "url": url}, token=admin).status == 422
        assert service.ask("PUT", "/v1/tiers/far", {"kind": "remote"}, token=admin).status == 201
        service.client().put(make_key(1), make_blob(1))
        attached = {each["name"]: each for each in service.ask("GET", "/v1/tiers", token=admin).json()}
        assert attached["far"]["chunks"] == 1
    with service_in_thread(
        tmp_path / "other", remote_tiers=tiers
    ) as other:  # another machine's service, the same Redis
        admin = other.new_token(scopes=("read", "write", "admin"))
        assert other.ask("PUT", "/v1/tiers/far", {"kind": "remote"}, token=admin).status == 201
