"""Tokens and tenants: nothing secret at rest, nothing guessed, nothing shared unless it is said."""

import json
import stat
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvloom.service.access.credentials import TokenFile
from kvloom.service.access.tenants import KeySpace, TenantFile, client_namespace, store_namespace


def test_tokens_are_hashed_at_rest_and_expire(tmp_path: Path) -> None:
    now_s = 1000.0
    path = tmp_path / "tokens.json"
    tokens = TokenFile(path, clock=lambda: now_s)
    token = tokens.create("team-a", ["write", "read"], ttl_s=10)
    secret = token.split("_", 2)[2]
    assert secret not in path.read_text() and stat.S_IMODE(path.stat().st_mode) == 0o600
    credential = tokens.verify(token)
    assert credential is not None and credential.tenant == "team-a" and credential.scopes == {"read", "write"}
    for wrong in (
        "",
        "x",
        token[:-1],
        token + "a",
        token.replace("kvl_", "kvm_"),
        f"kvl_{'0' * 12}_{secret}",
        "é" * 60,
    ):
        assert tokens.verify(wrong) is None
    now_s = 1010.0
    assert tokens.verify(token) is None


def test_what_another_process_writes_counts_and_a_broken_file_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvloom.service.access.credentials._CHECK_INTERVAL_S", 0.0)
    ours, theirs = TokenFile(tmp_path / "tokens.json"), TokenFile(tmp_path / "tokens.json")
    first = theirs.create("a", ["read"])
    assert ours.verify(first) is not None
    second = ours.create("b", ["admin"])
    assert theirs.verify(second) is not None and len(theirs.entries()) == 2
    assert theirs.revoke(first.split("_")[1]) and not theirs.revoke("nothing")
    assert ours.verify(first) is None and ours.verify(second) is not None
    for broken in ("{", "[]", '{"tokens": [{"id": 1}]}', '{"tokens": 7}'):
        (tmp_path / "tokens.json").write_text(broken)
        assert ours.verify(second) is not None


def test_bad_tokens_are_refused_when_they_are_made(tmp_path: Path) -> None:
    tokens = TokenFile(tmp_path / "tokens.json")
    for tenant, scopes, ttl_s in (
        ("A b", ["read"], None),
        ("a", [], None),
        ("a", ["root"], None),
        ("a", ["read"], 0.0),
    ):
        with pytest.raises(ValueError, match="expected"):
            tokens.create(tenant, scopes, ttl_s=ttl_s)


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=1, max_size=40))
def test_a_key_space_is_a_permutation(key: bytes, salt: bytes) -> None:
    space = KeySpace(salt)
    stored = space.to_store(key)
    assert space.to_client(stored) == key and len(stored) == 32 and stored != key
    assert KeySpace(salt + b"x").to_store(key) != stored


def test_key_spaces_stay_as_they_are_across_releases() -> None:
    assert (
        KeySpace(b"salt").to_store(bytes(32)).hex()
        == "01518306efec550a4de7b8b332d89cc35bf76f3eb74f757d9acd5f037b95027d"
    )


def test_tenants_are_alone_unless_an_operator_says_otherwise(tmp_path: Path) -> None:
    tenants = TenantFile(tmp_path / "tenants.json")
    keys = {name: tenants.keys_of(name).to_store(bytes(32)) for name in ("a", "b")}
    assert keys["a"] != keys["b"]
    tenants.update("b", pool="a")
    assert tenants.keys_of("b").to_store(bytes(32)) == keys["a"]
    again = TenantFile(tmp_path / "tenants.json")
    assert again.keys_of("a").to_store(bytes(32)) == keys["a"]
    assert stat.S_IMODE((tmp_path / "tenants.json").stat().st_mode) == 0o600


def test_two_workers_agree_on_the_salt_of_a_new_tenant(tmp_path: Path) -> None:
    files = [TenantFile(tmp_path / "tenants.json") for _ in range(8)]
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda file=file: found.append(file.keys_of("new").to_store(bytes(32))))
        for file in files
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert len(json.loads((tmp_path / "tenants.json").read_text())["salts"]) == 1


def test_namespaces_keep_their_names() -> None:
    for name in ("", "rag", "a/b", "é" * 90):
        assert client_namespace(store_namespace("team", name)) == ("team", name)
    with pytest.raises(ValueError, match="at most 180"):
        store_namespace("team", "é" * 91)
