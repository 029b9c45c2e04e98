"""What one rank reads of a store: its own chunks, or those of other sizes, whole or not at all."""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvloom.compress.registry import codec_by_name
from kvloom.connectors.serving.head_splits import heads_of, split_for
from kvloom.connectors.serving.messages import OtherKeys
from kvloom.connectors.serving.worker.arrivals import UNKNOWN
from kvloom.connectors.serving.worker.head_reader import HeadReader
from kvloom.core import ChunkKey, Entry, KVChunk, KVSpec, RopeSpec
from kvloom.kvstore.keys import prefix_keys
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier

from ..support.fakes import Clock
from ..support.faulty import LONG_S, FaultyTier, leaves_no_threads

LAYERS, HEADS, DIM, CHUNK, CHUNKS = 2, 4, 4, 8, 4
TOKENS = torch.arange(CHUNK * CHUNKS)
WHOLE = KVSpec("model", LAYERS, HEADS, DIM, torch.float32, RopeSpec((1.0, 0.1)))
KEYS, VALUES = torch.randn(2, LAYERS, HEADS, len(TOKENS), DIM, generator=torch.Generator().manual_seed(1))


def spec_of(rank: int, size: int, heads: int = HEADS) -> KVSpec:
    first, last = heads_of(rank, size, heads)
    return replace(WHOLE, num_kv_heads=last - first, shard=(rank, size))


def keys_of(spec: KVSpec) -> list[ChunkKey]:
    return prefix_keys(spec, TOKENS, chunk_tokens=CHUNK)


def chunk_of(spec: KVSpec, index: int) -> KVChunk:
    first, last = heads_of(*spec.shard, HEADS)
    here = slice(index * CHUNK, (index + 1) * CHUNK)
    return KVChunk(spec, TOKENS[here], TOKENS[here], KEYS[:, first:last, here], VALUES[:, first:last, here])


def put(store: KVStore, spec: KVSpec, index: int, **options: float) -> None:
    store.put(keys_of(spec)[index], chunk_of(spec, index), **options)  # type: ignore[arg-type]


def others_of(spec: KVSpec, sizes: Sequence[int]) -> list[OtherKeys]:
    rows = [[keys_of(part.spec) for part in split_for(spec, HEADS, size)] for size in sizes]
    return [tuple(tuple(keys[index] for keys in row) for row in rows) for index in range(CHUNKS)]


def reader_of(store: KVStore, spec: KVSpec, *sizes: int, **options: object) -> HeadReader:
    return HeadReader(store, spec, [split_for(spec, HEADS, size) for size in sizes], **options)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def test_heads_are_cut_as_engines_cut_them() -> None:
    assert [heads_of(rank, 2, 8) for rank in range(2)] == [(0, 4), (4, 8)]
    assert [heads_of(rank, 4, 2) for rank in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)], "copies"
    for size, heads in ((3, 8), (16, 6), (2, 0)):
        with pytest.raises(ValueError, match="heads"):
            heads_of(0, size, heads)
    with pytest.raises(ValueError, match="rank 0 of 2 holds 4 KV heads; expected 2 of the model's 4"):
        split_for(replace(WHOLE, shard=(0, 2)), HEADS, 1)


@pytest.mark.parametrize(
    ("heads", "own", "other"), list(product((1, 2, 4, 6, 8, 12), (1, 2, 3, 4, 6, 8, 12), (1, 2, 4, 8)))
)
def test_parts_are_the_heads_of_the_rank_in_order(heads: int, own: int, other: int) -> None:
    if any(heads % size and size % heads for size in (own, other)):
        return
    for rank in range(own):
        spec = spec_of(rank, own, heads)
        found = [
            heads_of(*part.spec.shard, heads)[0] + head
            for part in split_for(spec, heads, other)
            for head in range(part.start, part.stop)
        ]
        assert found == list(range(*heads_of(rank, own, heads)))


RANKS = [(rank, size) for size in (1, 2, 4) for rank in range(size)]


def is_covered(stored: set[tuple[tuple[int, int], int]], spec: KVSpec, index: int) -> bool:
    """Whether some size has every rank that holds one of these heads, by their numbers."""
    wanted = set(range(*heads_of(*spec.shard, HEADS)))
    holders = [rank for rank in RANKS if wanted & set(range(*heads_of(*rank, HEADS)))]
    return any(all((rank, index) in stored for rank in holders if rank[1] == size) for size in (1, 2, 4))


@given(st.sets(st.tuples(st.sampled_from(RANKS), st.integers(0, CHUNKS - 1))))
def test_a_prefix_is_found_as_far_as_some_size_has_every_part(stored: set[tuple[tuple[int, int], int]]) -> None:
    """Whatever is there of three sizes: every rank finds what a search by hand finds, and reads the right heads."""
    with KVStore([HostTier(None)]) as store:
        for rank, index in stored:
            put(store, spec_of(*rank), index)
        for own in RANKS:
            spec, sizes = spec_of(*own), [size for size in (1, 2, 4) if size != own[1]]
            reader, keys, others = reader_of(store, spec, *sizes), keys_of(spec), others_of(spec, sizes)
            covered = [is_covered(stored, spec, index) for index in range(CHUNKS)]
            assert reader.locate_prefix(keys, others) == ("host",) * [*covered, False].index(False)
            for index in range(CHUNKS):
                hit = reader.read(keys[index], others[index])
                assert (hit is not None) == covered[index]
                if hit is not None:
                    right = chunk_of(spec, index)
                    assert hit.chunk.spec == spec and hit.chunk.positions.equal(right.positions)
                    assert hit.chunk.keys.equal(right.keys) and hit.chunk.values.equal(right.values)


def test_a_placed_chunk_is_rotated_as_its_owner_would() -> None:
    with KVStore([HostTier(None)]) as store:
        for rank in (0, 1):
            put(store, spec_of(rank, 2), 1, recompute_s=2.0 + rank)
        positions = torch.arange(50, 50 + CHUNK)
        hit = reader_of(store, WHOLE, 2).read(keys_of(WHOLE)[1], others_of(WHOLE, [2])[1], positions)
        assert hit is not None and WHOLE.rope is not None and hit.recompute_s == 3.0
        right = chunk_of(WHOLE, 1)
        assert hit.chunk.keys.equal(WHOLE.rope.shift(right.keys, positions - right.positions))
        assert hit.chunk.values.equal(right.values) and hit.chunk.positions.equal(positions)
        for layer in range(LAYERS):
            one = reader_of(store, WHOLE, 2).read(
                keys_of(WHOLE)[1], others_of(WHOLE, [2])[1], layers=(layer, layer + 1)
            )
            assert one is not None and one.chunk.first_layer == layer
            assert one.chunk.keys.equal(right.keys[layer : layer + 1])


def test_a_part_that_is_too_old_is_no_part() -> None:
    clock = Clock()
    with KVStore([HostTier(None)], clock=clock) as store:
        put(store, spec_of(0, 2), 0)
        put(store, spec_of(1, 2), 0, ttl_s=10.0)
        reader, keys, others = reader_of(store, WHOLE, 2), keys_of(WHOLE), others_of(WHOLE, [2])
        assert len(reader.locate_prefix(keys, others)) == 1
        clock.now_s += 11
        assert reader.locate_prefix(keys, others) == () and reader.read(keys[0], others[0]) is None
        assert "in host, but expired" in reader.explain(keys[0], others[0])[2]


def test_a_part_that_is_pinned_is_not_evicted() -> None:
    nbytes = spec_of(0, 2).token_bytes * CHUNK
    with KVStore([HostTier(int(4.9 * nbytes))], policy="lru") as store:
        for rank in (0, 1):
            put(store, spec_of(rank, 2), 0)
        reader, keys, others = reader_of(store, WHOLE, 2), keys_of(WHOLE), others_of(WHOLE, [2])
        with reader.pinned(keys[:1], others[:1], deadline_s=60.0):
            for index in range(CHUNKS):
                put(store, spec_of(0, 4), index), put(store, spec_of(1, 4), index), put(store, spec_of(2, 4), index)
            assert len(reader.locate_prefix(keys, others)) == 1
        for index in range(CHUNKS):
            put(store, spec_of(3, 4), index), put(store, spec_of(0, 4), index), put(store, spec_of(1, 4), index)
        assert reader.locate_prefix(keys, others) == () and reader.read(keys[0], others[0]) is None


def test_a_join_that_is_interrupted_gives_nothing() -> None:
    """By a signal, or as the second part is gone."""
    tier = FaultyTier()
    with KVStore([tier], timeout_s=None) as store:
        for rank in (0, 1):
            put(store, spec_of(rank, 2), 0)
        key, other = keys_of(WHOLE)[0], others_of(WHOLE, [2])[0]
        reader, get, second = reader_of(store, WHOLE, 2), tier.get, other[0][1]

        def broken(wanted: ChunkKey) -> object:
            if wanted == second:
                raise KeyboardInterrupt
            return get(wanted)

        tier.get = broken  # type: ignore[method-assign, assignment]
        with pytest.raises(KeyboardInterrupt):
            reader.read(key, other)
        tier.get = get  # type: ignore[method-assign]
        assert reader.read(key, other) is not None and store.check() == [], "which does no harm"
        tier.delete(second)  # behind the store's back
        assert reader.read(key, other) is None
        assert reader.locate_prefix([key], [other]) == ()


def test_a_join_ends_in_time() -> None:
    """All parts share the time of one read."""
    tier = FaultyTier()
    with KVStore([tier], timeout_s=LONG_S) as store:
        for rank in (0, 1):
            put(store, spec_of(rank, 2), 0)
        key, other = keys_of(WHOLE)[0], others_of(WHOLE, [2])[0]
        tier.delay_s = 0.4
        begun_s = time.monotonic()
        assert reader_of(store, WHOLE, 2).read(key, other, timeout_s=0.6) is None
        assert 0.4 < time.monotonic() - begun_s < LONG_S / 2
        tier.delay_s = 0.0
        assert reader_of(store, WHOLE, 2).read(key, other, timeout_s=LONG_S) is not None


def test_a_chunk_of_another_rank_under_a_parts_key_is_refused() -> None:
    with KVStore([HostTier(None)]) as store:
        parts = [keys_of(spec_of(rank, 2))[0] for rank in (0, 1)]
        store.put(parts[0], chunk_of(spec_of(0, 2), 0))
        store.put(parts[1], chunk_of(spec_of(0, 2), 0))
        assert reader_of(store, WHOLE, 2).read(keys_of(WHOLE)[0], others_of(WHOLE, [2])[0]) is None
        store.put(parts[1], chunk_of(spec_of(1, 2), 1))
        assert reader_of(store, WHOLE, 2).read(keys_of(WHOLE)[0], others_of(WHOLE, [2])[0]) is None, "other tokens"


def test_parts_of_engines_that_tell_no_tokens() -> None:
    """SGLang stores pages without tokens, some of them without positions: what the others know counts."""
    unknown = torch.full((CHUNK,), UNKNOWN)
    with KVStore([HostTier(None)]) as store:
        put(store, spec_of(0, 2), 1)
        blind = replace(chunk_of(spec_of(1, 2), 1), token_ids=unknown, positions=unknown)
        store.put(keys_of(spec_of(1, 2))[1], blind)
        hit = reader_of(store, WHOLE, 2).read(keys_of(WHOLE)[1], others_of(WHOLE, [2])[1])
        assert hit is not None and hit.chunk.keys.equal(chunk_of(WHOLE, 1).keys)
        assert hit.chunk.token_ids.tolist() == hit.chunk.positions.tolist() == list(range(CHUNK, 2 * CHUNK))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_size_that_cannot_be_decoded_is_left_alone(is_known: bool, caplog: pytest.LogCaptureFixture) -> None:
    """One lossy without a certificate, or of a codec that is not known: said once, and nothing of it is removed."""
    tier, theirs = HostTier(None), codec_by_name("int8")
    with KVStore([tier], codecs=[theirs] if is_known else []) as store, caplog.at_level(logging.WARNING, "kvloom"):
        for rank, index in product((0, 1), range(CHUNKS)):
            store.put_encoded(keys_of(spec_of(rank, 2))[index], theirs.encode(chunk_of(spec_of(rank, 2), index)))
        reader, keys, others = reader_of(store, WHOLE, 2), keys_of(WHOLE), others_of(WHOLE, [2])
        assert len(reader.locate_prefix(keys, others)) == CHUNKS
        assert reader.read(keys[0], others[0]) is None
        reason = "no certificate here covers their codec" if is_known else "their codec is not known here"
        assert f"chunks of tensor-parallel size 2 are not used: {reason}" in caplog.text
        assert reader.locate_prefix(keys, others) == () and reader.read(keys[1], others[1]) is None
        assert caplog.text.count("are not used") == 1
        assert len(tier.entries()) == 2 * CHUNKS
        put(store, WHOLE, 0)
        assert len(reader.locate_prefix(keys, others)) == 1, "its own chunks are found as ever"


class AskedTier(HostTier):
    """A tier on another machine, which counts how often it is asked."""

    recheck_s = 60.0

    def __init__(self) -> None:
        super().__init__(None)
        self.asked: list[int] = []

    def find(self, keys: Sequence[ChunkKey]) -> list[Entry | None]:
        self.asked.append(len(keys))
        held = {entry.key: entry for entry in self.entries()}
        return [held.get(key) for key in keys]


@pytest.mark.parametrize(("sizes", "asked"), [((), 1), ((2,), 2), ((2, 4), 3)])
def test_what_a_look_up_in_vain_costs_a_remote_tier(sizes: tuple[int, ...], asked: int) -> None:
    """One exchange for each size that is named beside the own: nothing for those who name none."""
    tier = AskedTier()
    with KVStore([tier]) as store:
        reader, keys, others = reader_of(store, WHOLE, *sizes), keys_of(WHOLE), others_of(WHOLE, sizes) if sizes else []
        assert reader.locate_prefix(keys, others) == () and len(tier.asked) == asked
        assert reader.locate_prefix(keys, others) == () and len(tier.asked) == asked, "not asked again at once"


@pytest.mark.parametrize(("own", "other", "factor"), [(1, 2, 1), (2, 1, 2), (4, 1, 4), (4, 2, 2), (2, 4, 1)])
def test_bytes_that_are_read(own: int, other: int, factor: int, tmp_path: Path) -> None:
    """A join reads what the rank needs; a rank that needs some heads of a wider chunk reads that whole."""
    with KVStore([HostTier(None)]) as store:
        for rank in range(other):
            put(store, spec_of(rank, other), 0)
        for rank in range(own):
            spec = spec_of(rank, own)
            hit = reader_of(store, spec, other).read(keys_of(spec)[0], others_of(spec, [other])[0])
            tokens = 2 * 8 * CHUNK * (HEADS // own and max(other // own, 1))  # token ids and positions of each part
            assert hit is not None and hit.nbytes == factor * spec.token_bytes * CHUNK + tokens
