"""Keys: stable, chained or position-free, and different as soon as anything that shapes the KV differs."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.core import ChunkKey, KVChunk, KVSpec, RopeSpec
from kvloom.kvstore import keys as kvstore_keys
from kvloom.kvstore.keys import content_key, page_hashes, page_keys, prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.testing import SPEC, make_chunk

from ..project.test_core import OTHER_SPECS

GOLDEN_SPEC = KVSpec("tiny@1", 3, 2, 8, torch.float32, RopeSpec((1.0, 0.1, 0.01, 0.001)))

GOLDEN_HASHES = [
    "34fb5c825de7ca4aea6e712f19d439c1da0c92c37b423936c5f618545ca4fa1f",
    "c57b445f90651b9a650e516ab2238c965b21af35608a31c303e6d9e407f2915c",
]
GOLDEN_WIDE = "66af2f218931e670270f1b4ea79f49befb670188f60c94856ed7a1743298f181"

token_lists = st.lists(st.integers(0, 2**63 - 1), max_size=20)


def test_golden_values() -> None:
    """These are in everybody's stores: a change here orphans them all."""
    found = [key.hex() for key in prefix_keys(GOLDEN_SPEC, [1, 2, 3, 4, 5], chunk_tokens=2, salt=b"tenant")]
    assert found == [
        "3178ed1cb2e61a7a669ca58e8dcce6f861c41aed2a307b81e1214917ef19e52d",
        "c9c26b3c3b3908cc4952eb078202b696a94f4fcef866f3427d0c7d917b82df3b",
    ]
    assert (
        content_key(GOLDEN_SPEC, [1, 2, 3], salt=b"tenant").hex()
        == "57fd2880d445909833c1c4f7170ceb9a6fe75aef1ef39a4b4abf70951230e0f0"
    )
    assert (
        content_key(GOLDEN_SPEC, [2, 3], lead_ids=[1]).hex()
        == "946226cd73ab0dd74f97e87db6c5bc4d71d687ea7008087637d3065e017df30b"
    )


def test_a_text_that_grows_is_hashed_once() -> None:
    tokens = list(range(10))
    hashes = page_hashes(tokens, chunk_tokens=3)
    continued = page_hashes(tokens[3:], chunk_tokens=3, after=hashes[0])
    assert [hashes[0], *continued] == hashes
    keys = page_keys(SPEC, hashes, chunk_tokens=3, salt=b"s")
    assert keys == prefix_keys(SPEC, tokens, chunk_tokens=3, salt=b"s")
    with pytest.raises(ValueError, match="after has b'short'"):
        page_hashes(tokens, chunk_tokens=3, after=b"short")
    with pytest.raises(ValueError, match="hashes has 'text'"):
        page_keys(SPEC, ["text"], chunk_tokens=3)  # type: ignore[list-item]


def test_page_hashes_are_those_of_sglang() -> None:
    """Computed by SGLang 0.5.23's own module; tests/engines/sglang compares many."""
    assert [each.hex() for each in page_hashes([1, 2, 3, 4, 5], chunk_tokens=2)] == GOLDEN_HASHES
    assert page_hashes([1, 2**32], chunk_tokens=2)[0].hex() == GOLDEN_WIDE


def test_pages_of_another_length_have_other_keys() -> None:
    """SGLang's hashes of pairs of tokens (drafts) are those of twice as many tokens: the length tells them apart."""
    (pairs,) = page_hashes([1, 2, 2, 3], chunk_tokens=4)
    assert page_keys(SPEC, [pairs], chunk_tokens=2) != page_keys(SPEC, [pairs], chunk_tokens=4)


@given(token_lists, st.integers(1, 7))
def test_prefix_keys_of_whole_chunks(tokens: list[int], chunk_tokens: int) -> None:
    keys = prefix_keys(SPEC, tokens, chunk_tokens=chunk_tokens)
    assert len(keys) == len(tokens) // chunk_tokens == len(set(keys)) and all(len(key) == 32 for key in keys)
    whole = len(keys) * chunk_tokens
    assert prefix_keys(SPEC, tokens[:whole], chunk_tokens=chunk_tokens) == keys
    assert prefix_keys(SPEC, [*tokens, 1], chunk_tokens=chunk_tokens)[: len(keys)] == keys


@given(st.lists(st.integers(0, 9), min_size=12, max_size=12), st.integers(0, 11))
def test_prefix_keys_chain(tokens: list[int], changed: int) -> None:
    keys = prefix_keys(SPEC, tokens, chunk_tokens=3)
    tokens[changed] += 1
    others = prefix_keys(SPEC, tokens, chunk_tokens=3)
    assert [a == b for a, b in zip(keys, others, strict=True)] == [chunk < changed // 3 for chunk in range(4)]


def test_content_key_forgets_the_place() -> None:
    tokens = [5, 6, 7, 5, 6, 7]
    assert content_key(SPEC, tokens[:3]) == content_key(SPEC, tokens[3:])
    first, second = prefix_keys(SPEC, tokens, chunk_tokens=3)
    assert len({first, second, content_key(SPEC, tokens[:3]), content_key(SPEC, tokens)}) == 4


def test_lead_is_not_content() -> None:
    keys = {
        content_key(SPEC, [1, 2, 3]),
        content_key(SPEC, [2, 3], lead_ids=[1]),
        content_key(SPEC, [3], lead_ids=[1, 2]),
        content_key(SPEC, [2, 3]),
    }
    assert len(keys) == 4


def test_there_is_a_variant_of_every_field_of_a_spec() -> None:
    """A field added to a spec needs one, and thereby a proof that it is part of the key."""

    def differing(spec: KVSpec) -> list[str]:
        names = [field.name for field in fields(KVSpec) if getattr(spec, field.name) != getattr(SPEC, field.name)]
        if names != ["rope"] or not isinstance(spec.rope, RopeSpec):
            return names
        return [f.name for f in fields(RopeSpec) if getattr(spec.rope, f.name) != getattr(SPEC.rope, f.name)]

    changed = [differing(spec) for spec in OTHER_SPECS.values()]
    assert all(len(names) == 1 for names in changed)
    every = {field.name for kind in (KVSpec, RopeSpec) for field in fields(kind)}
    assert {name for names in changed for name in names} == every


def test_one_change_at_a_time_changes_every_key() -> None:
    """Whatever makes KV incompatible: spec, tenant, kind of reuse, the tokens, their order and what precedes them."""
    tokens, salt = [5, 6, 7, 8], b"tenant"
    first, second = prefix_keys(SPEC, tokens, chunk_tokens=2, salt=salt)
    named: dict[str, bytes] = {"first": first, "second": second, "content": content_key(SPEC, tokens[:2], salt=salt)}
    for name, spec in OTHER_SPECS.items():
        named[f"{name}, first"], named[f"{name}, second"] = prefix_keys(spec, tokens, chunk_tokens=2, salt=salt)
        named[f"{name}, content"] = content_key(spec, tokens[:2], salt=salt)
    for other_salt in (b"", b"tenan", b"tenant\0", b"Tenant"):
        named[f"{other_salt!r}, first"], named[f"{other_salt!r}, second"] = prefix_keys(
            SPEC, tokens, chunk_tokens=2, salt=other_salt
        )
        named[f"{other_salt!r}, content"] = content_key(SPEC, tokens[:2], salt=other_salt)
    for place in range(4):
        changed = [token + 100 * (place == i) for i, token in enumerate(tokens)]
        keys = prefix_keys(SPEC, changed, chunk_tokens=2, salt=salt)
        if place < 2:
            named[f"token {place}, first"] = keys[0]
            named[f"token {place}, content"] = content_key(SPEC, changed[:2], salt=salt)
        named[f"token {place}, second"] = keys[1]
    named["tokens swapped"] = prefix_keys(SPEC, [6, 5], chunk_tokens=2, salt=salt)[0]
    named["tokens swapped, content"] = content_key(SPEC, [6, 5], salt=salt)
    named["chunks swapped, first"], named["chunks swapped, second"] = prefix_keys(
        SPEC, [7, 8, 5, 6], chunk_tokens=2, salt=salt
    )
    (named["one chunk of all"],) = prefix_keys(SPEC, tokens, chunk_tokens=4, salt=salt)
    named["first alone"], named["rest of three"] = (prefix_keys(SPEC, tokens, chunk_tokens=n)[0] for n in (1, 3))
    named["content of all"] = content_key(SPEC, tokens, salt=salt)
    named["content behind a lead"] = content_key(SPEC, tokens[:2], lead_ids=[1], salt=salt)
    named["lead taken from the content"] = content_key(SPEC, tokens[1:2], lead_ids=tokens[:1], salt=salt)
    assert len(set(named.values())) == len(named) > 60
    assert prefix_keys(SPEC, tokens, chunk_tokens=2, salt=salt) == [first, second]


def test_every_field_of_the_spec_and_the_salt_count() -> None:
    variants = [(SPEC, b""), (SPEC, b"a"), (SPEC, b"b"), *((spec, b"") for spec in OTHER_SPECS.values())]
    keys = {content_key(spec, [1, 2], salt=salt) for spec, salt in variants}
    keys |= {prefix_keys(spec, [1, 2], chunk_tokens=2, salt=salt)[0] for spec, salt in variants}
    assert len(keys) == 2 * len(variants)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.tensor([7, 8, 9]),
        torch.tensor([7, 8, 9], dtype=torch.int32),
        torch.tensor([7, 0, 8, 0, 9])[::2],
        np.array([7, 8, 9], dtype=np.uint16),
        np.array([7, 8, 9], dtype=">i8"),
        (7, 8, 9),
        range(7, 10),
    ],
    ids=repr,
)
def test_token_ids_of_any_kind(tokens: Sequence[int]) -> None:
    assert content_key(SPEC, tokens) == content_key(SPEC, [7, 8, 9])
    assert prefix_keys(SPEC, tokens, chunk_tokens=3) == prefix_keys(SPEC, [7, 8, 9], chunk_tokens=3)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1.0, 2.0], "expected integers"),
        ([True, False], "expected integers"),
        ("12", r"one dimension|expected integers"),
        ([1, None], "expected integers"),
        ([[1, 2]], r"shape \[1, 2\]; expected one dimension"),
        ([[1, 2], [3]], "ragged"),
        ([1, -1], "reaches from -1 to 1"),
        ([2**63], "reaches from"),
        ([2**64], "expected integers"),
        (torch.zeros(2, 2, dtype=torch.int64), "expected one dimension"),
        (torch.zeros(2), "expected integers"),
    ],
)
def test_bad_token_ids(tokens: Sequence[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        content_key(SPEC, tokens)
    with pytest.raises(ValueError, match=message):
        content_key(SPEC, [1], lead_ids=tokens)
    with pytest.raises(ValueError, match=message):
        prefix_keys(SPEC, tokens, chunk_tokens=1)


def test_bad_lengths() -> None:
    with pytest.raises(ValueError, match="token_ids is empty"):
        content_key(SPEC, [])
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        prefix_keys(SPEC, [1], chunk_tokens=0)


def test_keys_of_an_older_format_are_misses_that_eviction_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that an earlier release filled: it opens, nothing in it is served, and new chunks take its room."""

    def chunk_of(number: int) -> tuple[ChunkKey, KVChunk]:
        chunk = make_chunk(number)
        return content_key(chunk.spec, chunk.token_ids), chunk

    with monkeypatch.context() as earlier, KVStore([DiskTier(tmp_path)]) as store:
        earlier.setattr(kvstore_keys, "_CONTEXT", "kvloom chunk keys, version 1")
        old = [chunk_of(number) for number in range(4)]
        for key, chunk in old:
            store.put(key, chunk)
        chunk_bytes = store.stats().tiers[0].used_bytes // len(old)
    with KVStore([DiskTier(tmp_path, 4 * chunk_bytes + chunk_bytes // 2)]) as store:
        assert store.check() == []
        for number, (old_key, _) in enumerate(old):
            key, chunk = chunk_of(number)
            assert key != old_key and store.get(key) is None
            assert old_key in store, "takes room until it is needed"
            store.put(key, chunk)
            found = store.get(key)
            assert found is not None and torch.equal(found.keys, chunk.keys)
        assert all(key not in store for key, _ in old)
        assert all(chunk_of(number)[0] in store for number in range(4))
        assert store.check() == []
