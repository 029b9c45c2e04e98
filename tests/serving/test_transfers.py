"""The worker's half, without an engine: what arrives, what is reported lost, and what never waits."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kvloom.connectors.serving.messages import Document, Fusion, Load, Loaded, LookUp, Save
from kvloom.connectors.serving.worker.arrivals import Arrival
from kvloom.connectors.serving.worker.other_sizes import holds_others_only
from kvloom.connectors.serving.worker.transfers import Transfers
from kvloom.core import ChunkKey, KVChunk, KVSpec, RopeSpec
from kvloom.errors import TierUnavailableError
from kvloom.kvstore.keys import content_key, prefix_keys
from kvloom.kvstore.placement.catalog import PlacementChange
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.disk.tier import DiskTier
from kvloom.kvstore.tiers.host import HostTier

from ..support.faulty import LONG_S, FaultyTier, eventually, leaves_no_threads

SPEC = KVSpec("model", 2, 2, 4, torch.float32, None)
BLOCK, CHUNK = 4, 8
BLOCKS = (5, 3, 8, 1, 6)


class Pages:
    """A paged cache that is a plain tensor of slots."""

    block_tokens = BLOCK

    def __init__(self) -> None:
        self.keys, self.values = torch.randn(2, 2, 10 * BLOCK, 4), torch.randn(2, 2, 10 * BLOCK, 4)

    def read(self, blocks: Sequence[int], start: int, stop: int) -> tuple[Tensor, Tensor]:
        slots = self._slots(blocks, start, stop)
        return self.keys[:, :, slots], self.values[:, :, slots]

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        slots = self._slots(blocks, start, start + keys.shape[2])
        self.keys[:, :, slots], self.values[:, :, slots] = keys, values

    def _slots(self, blocks: Sequence[int], start: int, stop: int) -> list[int]:
        return [blocks[p // BLOCK] * BLOCK + p % BLOCK for p in range(start, stop)]


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


def make(store: KVStore, pages: Pages | None = None, *, spec: KVSpec = SPEC, **settings: float) -> Transfers:
    settings = {"load_timeout_s": 20.0, "save_pending_bytes": 1 << 20, **settings}
    return Transfers(store, pages or Pages(), spec, 0, chunk_tokens=CHUNK, **settings)  # type: ignore[arg-type]


TOKENS = np.arange(16)
KEYS = prefix_keys(SPEC, TOKENS, chunk_tokens=CHUNK)


def chunk_of(key: ChunkKey) -> KVChunk:
    """Random KV of the first or the second eight tokens."""
    first = CHUNK if key == KEYS[1] else 0
    positions = torch.arange(first, first + CHUNK)
    return KVChunk(SPEC, positions, positions, *(torch.randn(2, 2, CHUNK, 4) for _ in range(2)))


def save_both(transfers: Transfers) -> None:
    """Both chunks of a request of 16 tokens in `BLOCKS`."""
    for chunk, key in enumerate(KEYS):
        start = chunk * CHUNK
        blocks = BLOCKS[start // BLOCK : (start + CHUNK) // BLOCK]
        transfers.save(Save((key,), None, TOKENS[start : start + CHUNK], start, blocks))
    assert eventually(lambda: all(key in transfers.store for key in KEYS))


def load(transfers: Transfers, start: int, stop: int, blocks: tuple[int, ...] = (9, 2, 7, 4)) -> Arrival:
    first = start // CHUNK
    transfers.load(Load("r", (tuple(KEYS[first : -(-stop // CHUNK)]),), first * CHUNK, start, stop, blocks))
    return wait(transfers)


def wait(transfers: Transfers) -> Arrival:
    arrived: list[Arrival] = []
    assert eventually(lambda: arrived or arrived.extend(transfers.arrivals()) or arrived)
    (arrival,) = arrived
    return arrival


@pytest.mark.parametrize(("start", "stop"), [(0, 16), (4, 16), (8, 16), (12, 16), (0, 8)])
def test_what_was_saved_arrives(start: int, stop: int) -> None:
    """In other blocks, from any block on, in another process, and only where it was asked for."""
    pages = Pages()
    transfers = make(KVStore([HostTier(None)]), pages)
    saved = pages.read(BLOCKS, 0, 16)
    save_both(transfers)
    target = (9, 2, 7, 4)
    before = pages.read(target, 0, 16)
    assert transfers.look_up(LookUp("r", (tuple(KEYS),))) == ("host", "host")
    arrival = load(transfers, start, stop)
    assert (arrival.loaded.failed, dict(arrival.loaded.tokens), arrival.bad_blocks) == (
        False,
        {"host": stop - start},
        frozenset(),
    )
    for old, new, now in zip(before, saved, pages.read(target, 0, 16), strict=True):
        assert torch.equal(now[:, :, start:stop], new[:, :, start:stop])
        assert torch.equal(now[:, :, :start], old[:, :, :start])
        assert torch.equal(now[:, :, stop:], old[:, :, stop:])
    transfers.close()


def test_blocks_may_be_overwritten_as_soon_as_save_returns() -> None:
    pages = Pages()
    tier = FaultyTier()
    transfers = make(KVStore([tier]), pages)
    saved = pages.read(BLOCKS, 0, 8)
    tier.gate.clear()
    transfers.save(Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2]))
    pages.keys.zero_()
    pages.values.zero_()
    tier.gate.set()
    assert eventually(lambda: KEYS[0] in transfers.store)
    chunk = transfers.store.get(KEYS[0])
    assert chunk is not None
    assert torch.equal(chunk.keys, saved[0])
    assert torch.equal(chunk.values, saved[1])
    assert chunk.token_ids.tolist() == list(range(8))
    transfers.close()


def test_a_missing_chunk_and_all_behind_it_are_reported() -> None:
    transfers = make(KVStore([HostTier(None)]))
    save_both(transfers)
    transfers.store.delete(KEYS[1])
    assert transfers.look_up(LookUp("r", (tuple(KEYS),))) == ("host",)
    arrival = load(transfers, 4, 16)
    assert arrival.loaded.failed
    assert dict(arrival.loaded.tokens) == {"host": 4}
    assert arrival.bad_blocks == {7, 4}, "blocks of tokens 8 to 16"
    assert transfers.take_counts()["failed_loads"] == 1
    transfers.close()


def test_a_corrupt_chunk_is_lost_not_served(tmp_path: Path) -> None:
    transfers = make(KVStore([DiskTier(tmp_path)]))
    save_both(transfers)
    for segment in (tmp_path / "segments").iterdir():
        data = bytearray(segment.read_bytes())
        data[len(data) // 4] ^= 1  # within the first of two chunks
        segment.write_bytes(data)
    arrival = load(transfers, 0, 16)
    assert arrival.loaded.failed
    assert arrival.bad_blocks == {9, 2, 7, 4}
    transfers.close()


def test_a_late_chunk_is_lost() -> None:
    tier = FaultyTier()
    store = KVStore([tier])
    transfers = make(store, load_timeout_s=0.1)
    save_both(transfers)
    tier.gate.clear()
    began_s = time.monotonic()
    arrival = load(transfers, 0, 16)
    assert time.monotonic() - began_s < 10
    assert arrival.loaded.failed
    assert arrival.bad_blocks == {9, 2, 7, 4}
    tier.gate.set()
    transfers.close()


def test_a_fault_of_our_own_costs_the_load_not_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = make(KVStore([HostTier(None)]))
    save_both(transfers)

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(transfers.store, "read", broken)
    arrival = load(transfers, 4, 16)
    assert arrival.loaded.failed
    assert arrival.bad_blocks == {2, 7, 4}
    assert transfers.take_counts()["errors"] == 1
    transfers.close()


def test_a_store_that_takes_nothing_is_counted() -> None:
    tier = FaultyTier()
    tier.faults["put"] = lambda: TierUnavailableError("gone")
    transfers = make(KVStore([tier]))
    transfers.save(Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2]))
    counts: dict[str, float] = {}
    assert eventually(lambda: counts.update(transfers.take_counts()) or counts.get("failed_saves"))
    assert counts["failed_saves"] == 1
    assert "saved_chunks" not in counts
    transfers.close()


def test_saves_beyond_the_limit_are_dropped() -> None:
    tier = FaultyTier()
    transfers = make(KVStore([tier]), save_pending_bytes=CHUNK * SPEC.token_bytes)
    tier.gate.clear()
    for _ in range(2):  # the second time the first is on its way already
        for chunk, key in enumerate(KEYS):
            tokens = TOKENS[chunk * CHUNK :][:CHUNK]
            transfers.save(Save((key,), None, tokens, chunk * CHUNK, BLOCKS[chunk * 2 :][:2]))
    assert transfers.take_counts()["dropped_saves"] == 2
    tier.gate.set()
    assert eventually(lambda: KEYS[0] in transfers.store)
    assert KEYS[1] not in transfers.store
    transfers.close()


def test_what_is_stored_is_not_copied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = Pages()
    transfers = make(KVStore([HostTier(None)]), pages)
    save_both(transfers)
    monkeypatch.setattr(pages, "read", None)
    transfers.save(Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2]))
    transfers.close()


def test_a_cancelled_load_ends_and_is_told_of() -> None:
    """The scheduler keeps the blocks of an aborted request until it hears of its load."""
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    save_both(transfers)
    tier.gate.clear()
    transfers.load(Load("r", (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4)))
    assert eventually(lambda: "get" in tier.calls)
    transfers.cancel("r")
    transfers.cancel("unknown")
    assert transfers.arrivals() == []
    tier.gate.set()
    arrival = wait(transfers)
    assert arrival.request_id == "r"
    assert transfers.arrivals() == [], "told of once"
    assert "failed_loads" not in transfers.take_counts(), "nobody was waiting for it"
    transfers.close()


def test_an_idle_engine_waits_until_something_has_come() -> None:
    """As long as it is told to at most, not at all without a load, and without being asked again."""
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    save_both(transfers)
    began_s = time.monotonic()
    transfers.wait(LONG_S)
    assert time.monotonic() - began_s < 0.5 * LONG_S, "nothing to wait for"
    tier.gate.clear()
    transfers.load(Load("r", (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4)))
    transfers.wait(0.01)
    assert transfers.arrivals() == []
    threading.Timer(0.05, tier.gate.set).start()
    transfers.wait(LONG_S)
    (arrival,) = transfers.arrivals()
    assert not arrival.loaded.failed
    assert time.monotonic() - began_s < 0.5 * LONG_S
    transfers.close()


def test_documents_are_fetched_to_where_they_stand_now() -> None:
    """Moved by the rotation, into the blocks that were asked for; those that are not stored are told of."""
    spec = replace(SPEC, rope=RopeSpec((1.0, 0.1)))
    pages, store = Pages(), KVStore([HostTier(None)])
    transfers = make(store, pages, spec=spec)
    document = np.arange(6)
    key, other = content_key(spec, document), content_key(spec, document + 1)
    keys, values = pages.read(BLOCKS, 0, 6)
    transfers.save(Save((key,), None, document, 0, BLOCKS[:2]))
    assert eventually(lambda: key in store)
    documents = (Document(3, 9, (key,)), Document(9, 15, (other,)))
    blocks = (9, 2, 7, 4)
    before = pages.read(blocks, 0, 16)
    fusion = Fusion("r", np.arange(16), 4, 15, 3, documents, 0.5, blocks)
    fetched = transfers.fetch(fusion).result(LONG_S)
    assert (fetched.found, dict(fetched.tokens)) == ((True, False), {"host": 5})
    now_keys, now_values = pages.read(blocks, 0, 16)
    assert spec.rope is not None
    assert torch.allclose(now_keys[:, :, 4:9], spec.rope.shift(keys, 3)[:, :, 1:], atol=1e-6)
    assert not torch.allclose(now_keys[:, :, 4:9], keys[:, :, 1:], atol=1e-2)
    assert torch.equal(now_values[:, :, 4:9], values[:, :, 1:])
    for old, new in zip(before, (now_keys, now_values), strict=True):
        assert torch.equal(new[:, :, :4], old[:, :, :4])
        assert torch.equal(new[:, :, 9:], old[:, :, 9:])
    transfers.close()


def test_close_stores_what_was_to_be_stored(tmp_path: Path) -> None:
    transfers = make(KVStore([HostTier(None), DiskTier(tmp_path)]))
    for chunk, key in enumerate(KEYS):
        tokens = TOKENS[chunk * CHUNK :][:CHUNK]
        transfers.save(Save((key,), None, tokens, chunk * CHUNK, BLOCKS[chunk * 2 :][:2]))
    transfers.close()
    with KVStore([DiskTier(tmp_path)]) as store:
        assert store.match(KEYS) == 2


def test_loads_do_not_wait_for_saves() -> None:
    host, slow = HostTier(None), FaultyTier()
    transfers = make(KVStore([host, slow]))
    save_both(transfers)
    slow.gate.clear()
    other = ChunkKey(bytes(32))
    transfers.save(Save((other,), None, TOKENS[:8], 0, BLOCKS[:2]))
    arrival = load(transfers, 0, 16)
    assert not arrival.loaded.failed
    slow.gate.set()
    transfers.close()


def test_what_is_told_of_chunks() -> None:
    """Stored, evicted, there before anybody asked, or not stored at all; what computing them took."""
    with KVStore([HostTier(2000)]) as before:
        save_both_of = make(before, reports_placement=True)
        save = Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2], recompute_s=0.25)
        save_both_of.save(save)
        assert eventually(lambda: KEYS[0] in before)
        assert eventually(lambda: bool(save_both_of._saves[KEYS[0]][1].done()))
        moves = save_both_of.take_placement_changes()
        assert set(moves) == {PlacementChange(KEYS[0], "host", True)}
        assert save_both_of.take_placement_changes() == []
        assert before.explain([KEYS[0]])[0].recompute_s == 0.25
        save_both_of.save(Save((KEYS[1],), (KEYS[0],), TOKENS[8:], 8, BLOCKS[2:4]))
        assert eventually(lambda: KEYS[1] in before and bool(save_both_of._saves[KEYS[1]][1].done()))
        assert PlacementChange(KEYS[0], "host", False) in (moves := save_both_of.take_placement_changes())
        assert PlacementChange(KEYS[1], "host", True) in moves

        late_comer = make(before, reports_placement=True, save_pending_bytes=1)
        late_comer.save(Save((KEYS[1],), None, TOKENS[8:], 8, BLOCKS[2:4]))
        assert late_comer.take_placement_changes() == [PlacementChange(KEYS[1], "host", True)]
        late_comer.save(save)
        assert late_comer.take_placement_changes() == [PlacementChange(KEYS[0], "", False)], "too much is waiting"
        silent = make(before)
        silent.save(save)
        assert silent.take_placement_changes() == []
        for transfers in (save_both_of, late_comer, silent):
            transfers.close()


def test_loads_tell_what_they_are_worth() -> None:
    transfers = make(KVStore([HostTier(None)]))
    transfers.save(Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2], recompute_s=0.5))
    transfers.save(Save((KEYS[1],), None, TOKENS[8:], 8, BLOCKS[2:4]))
    assert eventually(lambda: all(key in transfers.store for key in KEYS))
    loaded = load(transfers, 4, 16).loaded
    assert (loaded.recompute_s, loaded.unpriced_tokens) == (0.25, 8)
    transfers.close()


def test_who_settles_waits_for_what_is_on_its_way() -> None:
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    assert transfers.settle(0.0), "nothing is on its way"
    tier.gate.clear()
    transfers.save(Save((KEYS[0],), None, TOKENS[:8], 0, BLOCKS[:2]))
    assert not transfers.settle(0.05)
    assert KEYS[0] not in transfers.store
    tier.gate.set()
    assert transfers.settle(LONG_S)
    assert KEYS[0] in transfers.store
    transfers.close()


class SlowPages(Pages):
    """Writes wait until they may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_write = threading.Event()
        self.begun = 0

    def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
        self.begun += 1
        self.may_write.wait(LONG_S)
        super().write(blocks, start, keys, values)


@pytest.mark.parametrize("is_lost", [False, True], ids=["whole", "second chunk lost"])
def test_a_load_is_over_when_nothing_is_being_written_any_more(is_lost: bool) -> None:
    """The blocks of a failed load are given away as soon as it is told of."""
    pages = SlowPages()
    transfers = make(KVStore([HostTier(None)]), pages)
    saved = pages.read(BLOCKS, 0, 16)
    save_both(transfers)
    if is_lost:
        transfers.store.delete(KEYS[1])
    transfers.load(Load("r", (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4)))
    assert eventually(lambda: pages.begun == 1 + (not is_lost))  # chunks do not wait for one another
    time.sleep(0.05)
    assert transfers.is_loading
    assert transfers.arrivals() == []
    pages.may_write.set()
    arrival = wait(transfers)
    assert not transfers.is_loading
    assert arrival.bad_blocks == ({7, 4} if is_lost else set())
    written = pages.read((9, 2, 7, 4), 0, 16)
    count = 8 if is_lost else 16
    assert all(torch.equal(old[:, :, :count], new[:, :, :count]) for old, new in zip(saved, written, strict=True))
    transfers.close()


def test_a_write_that_fails_loses_the_load() -> None:
    class BadPages(Pages):
        def write(self, blocks: Sequence[int], start: int, keys: Tensor, values: Tensor) -> None:
            if start:
                raise RuntimeError("out of memory")
            super().write(blocks, start, keys, values)

    transfers = make(KVStore([HostTier(None)]), BadPages())
    save_both(transfers)
    arrival = load(transfers, 0, 16)
    assert arrival.loaded.failed
    assert arrival.bad_blocks == {9, 2, 7, 4}
    assert transfers.take_counts()["errors"] == 1
    assert transfers.take_counts() == {}
    transfers.close()


def test_a_load_that_waits_is_given_back_and_its_blocks_are_reported() -> None:
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    save_both(transfers)
    tier.gate.clear()
    for name in ("a", "b", "c", "d", "late"):
        transfers.load(Load(name, (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4)))
    assert eventually(lambda: tier.calls.count("get") == 4)
    transfers.give_back("late")
    (arrival,) = transfers.arrivals()
    assert (arrival.request_id, arrival.bad_blocks) == ("late", {9, 2, 7, 4})
    assert arrival.loaded.given_back and arrival.loaded.failed and dict(arrival.loaded.tokens) == {}
    transfers.give_back("a")  # has begun: it ends behind the chunk that is being read
    tier.gate.set()
    arrived: list[Arrival] = []
    assert eventually(lambda: arrived.extend(transfers.arrivals()) or len(arrived) == 4)
    told = {each.request_id: each for each in arrived}
    assert told["a"].loaded.given_back and dict(told["a"].loaded.tokens) == {"disk": 8}
    assert told["a"].bad_blocks == {7, 4}
    assert not told["b"].loaded.failed and set(told["b"].loaded.read_s) == {"disk"}
    counts = transfers.take_counts()
    assert counts["given_back_loads"] == 2 and "failed_loads" not in counts
    transfers.close()


def test_a_load_that_takes_too_long_is_given_back() -> None:
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    save_both(transfers)
    tier.gate.clear()
    transfers.load(Load("r", (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4), limit_s=0.05))
    time.sleep(0.1)
    tier.gate.set()
    arrival = wait(transfers)
    assert arrival.loaded.given_back and arrival.bad_blocks == {9, 2, 7, 4}
    assert arrival.loaded.read_s[""] > 0.04, "a chunk that did not come took at least that long"
    transfers.close()


def test_loads_that_run_at_once_share_what_they_tell() -> None:
    """Four that wait for one device for the same 0.2 s tell 0.05 s each, and all of it together."""
    tier = FaultyTier()
    transfers = make(KVStore([tier]))
    save_both(transfers)
    tier.gate.clear()
    for name in ("a", "b", "c", "d"):
        transfers.load(Load(name, (tuple(KEYS),), 0, 0, 16, (9, 2, 7, 4)))
    assert eventually(lambda: tier.calls.count("get") == 4)
    time.sleep(0.2)
    tier.gate.set()
    arrived: list[Arrival] = []
    assert eventually(lambda: arrived.extend(transfers.arrivals()) or len(arrived) == 4)
    told = sorted(sum(each.loaded.read_s.values()) for each in arrived)
    assert all(each.loaded.spent_s >= 0.2 for each in arrived)
    assert told[0] > 0.04
    assert 0.2 <= sum(told) < 1.05 * max(each.loaded.spent_s for each in arrived)
    transfers.close()


def test_a_probe_reads_as_a_load_does_and_writes_nothing() -> None:
    pages = Pages()
    transfers = make(KVStore([HostTier(None)]), pages)
    save_both(transfers)
    before = pages.keys.clone()
    probe = Load("", ((KEYS[1],),), 8, 8, 16, ())
    transfers.prober.begin(probe)
    transfers.prober.begin(probe)  # nothing: one at a time
    loaded = probed(transfers)
    assert (dict(loaded.tokens), loaded.failed, set(loaded.read_s)) == ({"host": 8}, False, {"host"})
    assert 0.0 < loaded.read_s["host"] <= loaded.spent_s
    assert not transfers.prober.is_probing and transfers.prober.take() is None
    assert torch.equal(pages.keys, before)
    assert transfers.store.stats().tiers[0].hits == 1
    transfers.store.delete(KEYS[1])
    transfers.prober.begin(probe)
    lost = probed(transfers)
    assert (dict(lost.tokens), lost.failed, set(lost.read_s)) == ({}, True, {""})
    counts = transfers.take_counts()
    assert counts["probes"] == 2 and "loads" not in counts
    transfers.close()


def test_a_probe_that_breaks_is_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = make(KVStore([HostTier(None)]))

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(transfers.reader, "read", broken)
    transfers.prober.begin(Load("", ((KEYS[1],),), 8, 8, 16, ()))
    assert probed(transfers).failed
    assert transfers.take_counts()["errors"] == 1
    transfers.close()


def probed(transfers: Transfers) -> Loaded:
    found: list[Loaded] = []
    assert eventually(lambda: bool(found.extend(filter(None, [transfers.prober.take()])) or found))
    return found[0]


@pytest.mark.parametrize(
    ("expected", "happen"),
    [
        ("never stored", lambda store: None),
        ("evicted", lambda store: [store.put(key, chunk_of(key)) for key in KEYS]),
        ("removed", lambda store: (store.put(KEYS[0], chunk_of(KEYS[0])), store.delete(KEYS[0]))),
        ("expired", lambda store: store.put(KEYS[0], chunk_of(KEYS[0]), ttl_s=1e-9)),
    ],
)
def test_why_a_prompt_was_not_found(expected: str, happen: Callable[[KVStore], object]) -> None:
    transfers = make(KVStore([HostTier(chunk_of(KEYS[0]).keys.nbytes * 3)]))
    happen(transfers.store)
    lookup = LookUp("r", (tuple(KEYS),))
    assert transfers.look_up(lookup) == ()
    assert transfers.why_missing(lookup) == expected
    transfers.close()


def test_a_store_of_another_model_says_so_until_something_is_stored(tmp_path: Path) -> None:
    other = replace(SPEC, model_id="another")
    with KVStore([DiskTier(tmp_path)]) as store:
        (key,) = prefix_keys(other, TOKENS[:CHUNK], chunk_tokens=CHUNK)
        store.put(key, replace(chunk_of(key), spec=other))
    store = KVStore([HostTier(None), DiskTier(tmp_path)])
    assert holds_others_only(SPEC, store) and not holds_others_only(other, store)
    transfers = Transfers(
        store, Pages(), SPEC, 0, chunk_tokens=CHUNK, load_timeout_s=20.0, save_pending_bytes=1 << 20, is_foreign=True
    )
    lookup = LookUp("r", (tuple(KEYS),))
    assert transfers.why_missing(lookup) == "other model"
    save_both(transfers)
    later = LookUp("r", (tuple(prefix_keys(SPEC, range(100, 108), chunk_tokens=CHUNK)),))
    assert transfers.why_missing(later) == "never stored"
    transfers.close()
