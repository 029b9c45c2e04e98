"""What kvloom makes of vLLM's KV cache groups, told by the kinds of their specs."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.connectors.serving.groups import GroupShape
from kvloom.connectors.vllm.groups import groups_of
from kvloom.errors import EngineError

from ..engines.groups.families import committed, section


def config(*specs: tuple[str, dict[str, int]]) -> Any:
    made = [type(kind, (), {"block_size": 16, **fields})() for kind, fields in specs]
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in made])


FULL = ("FullAttentionSpec", {})
WINDOW = ("SlidingWindowSpec", {"sliding_window": 100, "extra_retained_tokens": 2})
LOCAL = ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64, "block_size": 32})


def test_one_group_of_full_attention_is_plain() -> None:
    groups = groups_of(config(FULL))
    assert groups.is_plain
    assert groups.shapes == (GroupShape(16),)


def test_groups_of_full_attention_come_first() -> None:
    groups = groups_of(config(WINDOW, FULL, LOCAL, FULL))
    assert groups.numbers == (1, 3, 0, 2)
    assert groups.shapes == (
        GroupShape(16),
        GroupShape(16),
        GroupShape(16, window_tokens=102),
        GroupShape(32, local_tokens=64),
    )
    assert groups.in_order("abcd") == ["b", "d", "a", "c"]
    assert not groups.is_plain
    assert not groups_of(config(WINDOW)).is_plain


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("MambaSpec", "recurrent states"),
        ("UniformTypeKVCacheSpecs", "size of their heads"),
        ("SlidingWindowMLASpec", "latent cache .MLA. has windows"),
        ("RSWASpec", "kind RSWASpec"),
    ],
)
def test_other_kinds_are_refused(kind: str, why: str) -> None:
    with pytest.raises(EngineError, match=f"{kind}.*{why}.* leave the connector out"):
        groups_of(config(FULL, (kind, {})))


def test_latents_are_full_attention() -> None:
    groups = groups_of(config(("MLAAttentionSpec", {})))
    assert groups.is_plain and groups.shapes == (GroupShape(16),)
    with pytest.raises(EngineError, match="one state for several tokens; leave the connector out"):
        groups_of(config(("MLAAttentionSpec", {"tokens_per_state": 4})))


def test_an_engine_without_a_cache_is_refused() -> None:
    with pytest.raises(EngineError, match="no KV cache"):
        groups_of(config())


def test_the_table_of_families_is_what_engines_are_tested_with() -> None:
    """`python -m kvloom.tests.engines.groups.families` writes it."""
    assert committed() == section()
