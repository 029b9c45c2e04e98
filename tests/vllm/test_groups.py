"""What kvloom makes of vLLM's KV cache groups, told by the kinds of their specs."""

from types import SimpleNamespace
from typing import Any

import pytest

from kvloom.connectors.serving.groups import GroupShape
from kvloom.connectors.vllm.groups import groups_of
from kvloom.errors import EngineError

from ..engines.groups.families import committed, section


def config(*specs: tuple[str, dict[str, Any]]) -> Any:
    made = [type(kind, (), {"block_size": 16, **fields})() for kind, fields in specs]
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in made])


FULL: tuple[str, dict[str, Any]] = ("FullAttentionSpec", {})
WINDOW = ("SlidingWindowSpec", {"sliding_window": 100, "extra_retained_tokens": 2})
LOCAL = ("ChunkedLocalAttentionSpec", {"attention_chunk_size": 64, "block_size": 32})


def states(**changes: Any) -> tuple[str, dict[str, Any]]:
    """Of layers that keep states, as vLLM's spec has it."""
    fields = {"mamba_cache_mode": "align", "num_speculative_blocks": 0, "num_prefill_checkpoint_blocks": 0}
    kind = SimpleNamespace(name=changes.pop("kind", "GDN_ATTN"))
    return "MambaSpec", {"tokens_per_state": -1, "mamba_type": kind, **fields, **changes}


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


def test_layers_with_states_are_a_group_of_their_own() -> None:
    groups = groups_of(config(states(block_size=32), FULL, states(block_size=48, num_prefill_checkpoint_blocks=1)))
    assert groups.numbers == (1, 0, 2)
    assert groups.shapes[1:] == (GroupShape(32, keeps_state=True), GroupShape(48, keeps_state=True))
    assert groups.keeps_states and groups.saves_within_steps and not groups.is_plain
    assert groups.chunk_tokens(256) == 96, "chunks end where all groups have blocks that end"
    assert groups_of(config(states())).keeps_states, "a model without attention"
    assert groups_of(config(FULL, WINDOW)).chunk_tokens(256) == 256


def test_of_states_only_what_vllm_offers_is_saved() -> None:
    groups = groups_of(config(states(), FULL, states()))
    rows = [[7, 8, 9], [1, 2, 3], [4, 5, 6]]
    assert groups.rows_to_save(rows, []) == [[1, 2, 3], [], []], "rows of blocks say nothing of states"
    offered = [(0, 9, 48), (2, 5, 32), (2, 6, 40), (0, 7, 16)]  # one of them within a block
    assert groups.rows_to_save(rows, offered) == [[1, 2, 3], [7, 0, 9], [0, 5]]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"mamba_cache_mode": "none"}, "--enable-prefix-caching"),
        ({"num_speculative_blocks": 2}, "it drafts tokens"),
    ],
)
def test_states_that_are_not_kept_behind_blocks_are_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(EngineError, match=f"state spaces, linear attention.*{why}.*or leave the connector out"):
        groups_of(config(FULL, states(**changes)))


def test_states_beside_latents_are_refused() -> None:
    with pytest.raises(EngineError, match=r"latents .MLA. beside other KV cache groups .*MambaSpec"):
        groups_of(config(("MLAAttentionSpec", {}), states()))


def test_an_engine_without_a_cache_is_refused() -> None:
    with pytest.raises(EngineError, match="no KV cache"):
        groups_of(config())


def test_the_table_of_families_is_what_engines_are_tested_with() -> None:
    """`python -m kvloom.tests.engines.groups.families` writes it."""
    assert committed() == section()
