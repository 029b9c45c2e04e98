"""One codec per tier: exact chunks take the form of the tier that they go into, lossy ones stay as they are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from kvloom.compress.capabilities import Allocator
from kvloom.compress.raw import RawCodec
from kvloom.core import Codec, EncodedChunk, KVChunk
from kvloom.errors import CodecError, TierFullError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier
from kvloom.testing import SPEC, make_chunk, make_key, same_blob, same_chunk

from ..support.fakes import HEADER_BYTES, Shelf, ShelfTier, assert_adds_up, filled
from ..support.lossy import CoarseCodec, TwinCodec, certify

RAW, TWIN, COARSE, COARSER = RawCodec(), TwinCodec(), CoarseCodec(), CoarseCodec(1 / 8)
CERTIFICATES = [certify(COARSE, SPEC), certify(COARSER, SPEC)]
RAW_BYTES, COARSE_BYTES = RAW.encode(make_chunk(0)).nbytes, COARSE.encode(make_chunk(0)).nbytes


def opened(host: HostTier | ShelfTier, disk: DiskTier | ShelfTier, **options: object) -> KVStore:
    settings = {"tier_codecs": {"disk": COARSE}, "certificates": CERTIFICATES}
    return KVStore([host, disk], **(settings | options))


def in_coarse(number: int, codec: Codec = COARSE) -> KVChunk:
    return codec.decode(codec.encode(make_chunk(number)))


class CountingCodec(CoarseCodec):
    """Counts what it encodes."""

    made = 0

    def encode(self, chunk: KVChunk) -> EncodedChunk:
        type(self).made += 1
        return super().encode(chunk)


class RoomyCodec(CoarseCodec):
    """Decodes into memory that it is given, a good deal of it."""

    def decode_into(self, blob: EncodedChunk, positions: Tensor | None, allocate: Allocator) -> KVChunk:
        chunk = self.decode(blob, positions)
        keys = allocate(1 << 20)[: chunk.keys.nbytes].view(chunk.keys.dtype).view(chunk.keys.shape)
        return replace(chunk, keys=keys.copy_(chunk.keys))


def test_hits_are_decoded_into_memory_that_is_free() -> None:
    with KVStore([HostTier(None, pinned=False)], codec=RoomyCodec(), certificates=CERTIFICATES) as store:
        for number in range(3):
            store.put(make_key(number), make_chunk(number))
        held, dropped = store.get(make_key(0)), store.get(make_key(1))
        assert held is not None and dropped is not None
        place = dropped.keys.data_ptr()
        del dropped
        others = [torch.empty(1 << 20, dtype=torch.uint8) for _ in range(8)]  # an allocator would give it to these
        found = store.get(make_key(2))
        assert found is not None and found.keys.data_ptr() == place and len(others) == 8
        assert same_chunk(found, in_coarse(2)) and same_chunk(held, in_coarse(0))


def test_put_writes_each_tier_in_its_form(tmp_path: Path) -> None:
    host = HostTier(None, pinned=False)
    with opened(host, DiskTier(tmp_path)) as store:
        store.put(make_key(1), make_chunk(1))
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, make_chunk(1))
        host_stats, disk_stats = store.stats().tiers
        assert (host_stats.bytes_written, disk_stats.bytes_written) == (RAW_BYTES, COARSE_BYTES)
        assert disk_stats.transcodes == host_stats.transcodes == 0 and store.check() == []
    with KVStore([DiskTier(tmp_path)], codec=COARSE, certificates=CERTIFICATES) as store:
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, in_coarse(1))


def test_put_encodes_once_for_every_form() -> None:
    CountingCodec.made = 0
    tiers = [ShelfTier(Shelf(), None, name=name) for name in "abc"]
    same = {"b": CountingCodec(), "c": CountingCodec()}
    with KVStore(tiers, tier_codecs=same, certificates=CERTIFICATES) as store:
        store.put(make_key(1), make_chunk(1))
        assert CountingCodec.made == 1 and store.stats().writes == 3


def test_a_chunk_that_cannot_be_encoded_is_nowhere(tmp_path: Path) -> None:
    bad = make_chunk(1)
    bad.keys[0, 0, 0, 0] = torch.inf
    with opened(HostTier(None, pinned=False), DiskTier(tmp_path)) as store:
        with pytest.raises(CodecError, match="out of range"):
            store.put(make_key(1), bad)
        assert store.locate(make_key(1)) is None
        assert_adds_up(store.stats())
    with KVStore([DiskTier(tmp_path)]) as store:
        assert store.get(make_key(1)) is None


def test_demotion_transcodes_and_counts_what_the_chunk_takes_then(tmp_path: Path) -> None:
    host = filled(ShelfTier(Shelf(), 3 * (RAW_BYTES + HEADER_BYTES), name="host"), 0, 1, 2)
    disk = ShelfTier(Shelf(), 6 * (COARSE_BYTES + HEADER_BYTES), name="disk")
    with opened(host, disk) as store:
        for number in range(3, 6):
            store.put(make_key(number), make_chunk(number))
        assert sorted(disk.shelf.chunks) == [make_key(number) for number in range(6)]
        for number in range(3):
            blob = disk.shelf.chunks[make_key(number)][0]
            assert same_blob(blob, COARSE.encode(make_chunk(number)))
        disk_stats = store.stats().tiers[1]
        assert disk_stats.transcodes == 3 and disk_stats.held_bytes == disk.used_bytes and store.check() == []
        assert_adds_up(store.stats())


def test_what_was_lossy_is_promoted_as_it_is(tmp_path: Path) -> None:
    with opened(HostTier(None, pinned=False), DiskTier(tmp_path)) as store:
        store.put(make_key(1), make_chunk(1))
    host = HostTier(None, pinned=False)
    with opened(host, DiskTier(tmp_path)) as store:
        moved = torch.arange(100, 105)
        assert store.get(make_key(1), moved) is not None  # promoted as stored, not as placed
        assert host.get(make_key(1)).codec == "coarse" and store.stats().tiers[0].transcodes == 0
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, in_coarse(1)) and store.stats().tiers[0].hits == 1
        blob = host.get(make_key(1))
        assert blob is not None
    host = HostTier(None, pinned=False)
    host.put(make_key(1), blob)
    with KVStore([host], codecs=[COARSE]) as store:  # in a raw tier it is lossy all the same
        assert store.get(make_key(1)) is None and store.stats().misses == {"uncertified": 1}


def test_what_is_exact_is_promoted_in_the_form_of_the_first_tier(tmp_path: Path) -> None:
    with KVStore([DiskTier(tmp_path)], codec=TWIN) as store:
        store.put(make_key(1), make_chunk(1))
        store.put(make_key(2), make_chunk(2))
    host = HostTier(None, pinned=False)
    with opened(host, DiskTier(tmp_path), tier_codecs={"disk": TWIN}) as store:
        found = store.get(make_key(1), torch.arange(100, 105))
        assert found is not None and int(found.positions[0]) == 100
        assert store.prefetch([make_key(2)]).result(10) == 1
        for number in (1, 2):
            assert host.get(make_key(number)).codec == "raw"
            found = store.get(make_key(number))
            assert found is not None and same_chunk(found, make_chunk(number))
        assert store.stats().tiers[0].transcodes == 2 and store.check() == []


def test_what_cannot_be_transcoded_moves_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = make_chunk(1)
    bad.values[1, 0, 0, 0] = torch.nan
    host = HostTier(2 * RAW_BYTES, pinned=False)
    host.put(make_key(1), RAW.encode(bad)), host.put(make_key(2), RAW.encode(make_chunk(2)))
    with opened(host, DiskTier(tmp_path)) as store:
        store.put(make_key(3), make_chunk(3)), store.put(make_key(4), make_chunk(4))
        assert store.stats().tiers[0].demotions == 2
    assert "out of range" in caplog.text
    with KVStore([DiskTier(tmp_path)]) as store:
        found = store.get(make_key(1))
        assert found is not None and same_chunk(found, bad)
        assert store.get(make_key(2)) is None  # coarse, which is not known here


def test_chunks_of_a_model_without_a_certificate_are_not_transcoded(tmp_path: Path) -> None:
    disk = ShelfTier(Shelf(), None, name="disk")
    host = filled(ShelfTier(Shelf(), RAW_BYTES + HEADER_BYTES, name="host"), 1)
    with opened(host, disk, certificates=[]) as store:
        store.put_encoded(make_key(2), RAW.encode(make_chunk(2)))  # which demotes the other
        assert store.stats().tiers[0].demotions == 1
    for number in (1, 2):
        assert same_blob(disk.shelf.chunks[make_key(number)][0], RAW.encode(make_chunk(number)))


def test_codecs_of_unknown_tiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tier_codecs are for \['dusk'\]; the tiers are \['host', 'disk'\]"):
        opened(HostTier(None), DiskTier(tmp_path), tier_codecs={"dusk": COARSE})


FORMS = {"raw": RAW, "twin": TWIN, "coarse": COARSE, "coarser": COARSER}


class TierCodecMachine(RuleBasedStateMachine):
    """What comes back is the chunk, or the chunk after exactly one loss that a tier's codec makes."""

    @initialize(
        host=st.sampled_from(sorted(FORMS)),
        disk=st.sampled_from(sorted(FORMS)),
        sizes=st.sampled_from([(1500, 2500), (2500, 1500)]),
    )
    def begin(self, host: str, disk: str, sizes: tuple[int, int]) -> None:
        self.codecs = [FORMS[host], FORMS[disk]]
        self.sizes = sizes
        self.options = {"codecs": [TWIN, COARSE]}
        self.shelf = Shelf()
        self.open()

    def open(self) -> None:
        host_bytes, disk_bytes = self.sizes
        tiers = [ShelfTier(Shelf(), host_bytes, name="host"), ShelfTier(self.shelf, disk_bytes, name="disk")]
        self.tiers = tiers
        self.store = opened(*tiers, codec=self.codecs[0], tier_codecs={"disk": self.codecs[1]}, **self.options)

    def possible(self, number: int) -> list[KVChunk]:
        lossy = [in_coarse(number, codec) for codec in self.codecs if not codec.is_lossless]
        exact = any(codec.is_lossless for codec in self.codecs)  # a tier below a lossy one may have been put exact
        return [make_chunk(number), *lossy] if exact else lossy

    @rule(number=st.integers(0, 5))
    def put(self, number: int) -> None:
        self.store.put(make_key(number), make_chunk(number))

    @rule(number=st.integers(0, 5))
    def get(self, number: int) -> None:
        held = make_key(number) in self.store
        found = self.store.get(make_key(number))
        assert (found is not None) == held
        assert found is None or any(same_chunk(found, chunk) for chunk in self.possible(number))

    @rule(number=st.integers(0, 5))
    def prefetch(self, number: int) -> None:
        self.store.prefetch([make_key(number)]).result(10)

    @rule(number=st.integers(0, 5))
    def delete(self, number: int) -> None:
        self.store.delete(make_key(number))

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.open()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()

    @invariant()
    def every_blob_was_encoded_once(self) -> None:
        if not hasattr(self, "store"):
            return
        assert self.store.check() == []
        assert_adds_up(self.store.stats())
        for tier, own in zip(self.tiers, self.codecs, strict=True):
            for key, (blob, _) in tier.shelf.chunks.items():
                chunk = make_chunk(int.from_bytes(key, "big"))
                # Its own form; or, lossy, that of the tier that it came from.
                allowed = [own, *(codec for codec in self.codecs if not codec.is_lossless)]
                assert any(same_blob(blob, codec.encode(chunk)) for codec in allowed)


TestTierCodecMachine = TierCodecMachine.TestCase
TestTierCodecMachine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


def test_the_fakes_fill_up() -> None:
    """The machine above evicts in every form: neither tier holds all six chunks raw, nor the host coarse."""
    for codec, capacity_bytes in ((RAW, 2500), (COARSE, 1500)):
        tier = ShelfTier(Shelf(), capacity_bytes)
        with pytest.raises(TierFullError):
            for number in range(6):
                tier.put(make_key(number), codec.encode(make_chunk(number)))
