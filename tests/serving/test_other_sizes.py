"""Engines of different tensor-parallel sizes on one folder: what one stores, the other finds, and nothing else."""

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest

from kvloom.connectors.serving.head_splits import heads_of
from kvloom.connectors.serving.messages import Loaded, StepReport
from kvloom.connectors.serving.settings import RequestOptions
from kvloom.connectors.serving.worker.other_sizes import warn_of_other_sizes
from kvloom.kvstore.store import KVStore

from ..support.faulty import leaves_no_threads
from .ranks import BLOCKS, CHUNK, ROPE, Ranks, truth

SIZES = [
    (4, 1, 2),
    (4, 2, 1),
    (4, 2, 4),
    (4, 4, 2),
    (4, 4, 1),
    (6, 2, 3),  # one does not divide the other
    (6, 3, 2),
    (2, 1, 4),  # more ranks than heads: copies
    (2, 4, 1),
    (2, 2, 4),
    (2, 4, 8),
    (2, 8, 2),
    (1, 1, 2),
    (1, 2, 1),
]
TOKENS = list(range(100, 100 + 5 * CHUNK + 3))


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    yield from leaves_no_threads()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    with ExitStack() as stack:

        def made(size: int, heads: int, **settings: object) -> Ranks:
            ranks = Ranks(tmp_path, size, heads, **settings)
            stack.callback(ranks.close)
            return ranks

        yield made


@pytest.mark.parametrize("mode", ["async", "layerwise"])
@pytest.mark.parametrize(("heads", "one", "two"), SIZES)
def test_what_one_size_stores_the_other_finds(
    engine: Callable[..., Ranks], heads: int, one: int, two: int, mode: str
) -> None:
    writer = engine(one, heads)
    assert writer.ask(TOKENS) and writer.stored() == 5 * one
    reader = engine(two, heads, tensor_parallel_sizes=[1, one, two], load_mode=mode)
    assert reader.ask(TOKENS), "right in every head"
    assert reader.loaded == {"disk": 5 * CHUNK} and reader.computed == 3
    assert set(reader.counts("joined_chunks")) <= {5, 6}, "and those of probes"
    assert reader.stored() == 5 * one, "what is found is not stored a second time"


@pytest.mark.parametrize(("heads", "one", "two"), SIZES)
def test_sizes_that_are_not_named_share_nothing(
    engine: Callable[..., Ranks], heads: int, one: int, two: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine(one, heads).ask(TOKENS)
    asked: list[int] = []
    locate = KVStore.locate_prefix
    monkeypatch.setattr(KVStore, "locate_prefix", lambda store, keys: asked.append(len(keys)) or locate(store, keys))
    reader = engine(two, heads)
    assert reader.ask(TOKENS, save=False)
    assert reader.loaded == {} and reader.computed == len(TOKENS)
    assert asked == [5] * two, "one look-up a rank, and no key beside its own"


def test_sizes_that_do_not_fit_are_refused(engine: Callable[..., Ranks], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "kvloom"):
        reader = engine(2, 4, tensor_parallel_sizes=[1, 3, 6, 2])
    assert "size 3 is not looked for: 3 ranks cannot divide 4 KV heads evenly" in caplog.text
    assert "size 6 is not looked for: 6 ranks cannot divide 4 KV heads evenly" in caplog.text
    assert [len(worker.info.splits) for worker in reader.workers] == [1, 1]


def test_a_text_that_grows_on_engines_in_turn(engine: Callable[..., Ranks]) -> None:
    """Chunks of every size stand in one prefix; each engine finds all, and stores what is new."""
    sizes = {"tensor_parallel_sizes": [1, 2, 4]}
    engines = [engine(size, 4, **sizes) for size in (1, 2, 4)]
    known = 0
    for turn, length in enumerate((2, 3, 5, 6, 8)):
        ranks, tokens = engines[turn % 3], TOKENS[:1] * (length * CHUNK) + [7]
        assert ranks.ask(tokens)
        assert sum(ranks.loaded.values()) == known * CHUNK and ranks.computed == (length - known) * CHUNK + 1
        known = length
    assert engines[0].stored() == 2 * 1 + 1 * 2 + 2 * 4 + 1 * 1 + 2 * 2


@pytest.mark.parametrize("mode", ["async", "layerwise"])
@pytest.mark.parametrize("seed", range(6))
def test_parts_that_are_lost_at_random(engine: Callable[..., Ranks], seed: int, mode: str) -> None:
    """Before the look-up, or between it and the load: never a wrong head, and no more is computed than was lost."""
    rng = random.Random(seed)
    heads, one, two = rng.choice(SIZES)
    writer = engine(one, heads)
    assert writer.ask(TOKENS)
    reader = engine(two, heads, tensor_parallel_sizes=[one], load_mode=mode)
    rows = writer.planner._keys.prefixes(TOKENS, writer.planner._keys.salt(b""))
    rows.extend()
    parts = rows.between(0)
    needed = {part.spec.shard[0] for worker in reader.workers for part in worker.info.splits[0]}
    chunk, rank = rng.randrange(5), rng.choice(sorted(needed))

    def lose() -> None:
        assert writer.workers[rank].transfers.store.delete(parts[rank][chunk])

    if seed % 2:
        lose()
        assert reader.ask(TOKENS) and sum(reader.loaded.values()) == chunk * CHUNK
    else:
        assert reader.ask(TOKENS, meanwhile=lose) and sum(reader.loaded.values()) == chunk * CHUNK
    assert reader.computed == len(TOKENS) - chunk * CHUNK
    assert reader.ask(TOKENS) and reader.computed == 3, "what was lost is stored again, by the reader"


def test_what_was_offered_is_pinned_in_every_part(engine: Callable[..., Ranks]) -> None:
    assert engine(2, 4).ask(TOKENS)
    reader = engine(1, 4, tensor_parallel_sizes=[2])
    store, pinned = reader.workers[0].transfers.store, []
    assert reader.ask(TOKENS, meanwhile=lambda: pinned.append(store.stats().pinned))
    assert pinned == [5 * 3], "both parts of each chunk, and its own key"
    reader.step()
    assert store.stats().pinned == 0


@pytest.mark.parametrize("codec", ["lossless", "int8"])
@pytest.mark.parametrize(("heads", "one", "two"), [(4, 1, 2), (4, 2, 1), (2, 4, 1)])
def test_codecs(engine: Callable[..., Ranks], codec: str, heads: int, one: int, two: int) -> None:
    """A head that is cut out of a chunk, or joined to others, is decoded to the very numbers that its owner gets."""
    settings: dict[str, Any] = {"disk_codec": codec, "allow_uncertified": True}
    with pytest.warns(UserWarning) if codec == "int8" else nullcontext():
        writer = engine(one, heads, **settings)
        writer.ask(TOKENS)
        owner = engine(one, heads, **settings)
        reader = engine(two, heads, tensor_parallel_sizes=[one], **settings)
        assert owner.ask(TOKENS) == reader.ask(TOKENS) == (codec == "lossless")
    assert owner.loaded == reader.loaded == {"disk": 5 * CHUNK}
    whole = {}
    for ranks in (owner, reader):
        for worker, pages in zip(ranks.workers, ranks.pages, strict=True):
            first, last = heads_of(*worker.info.spec.shard, heads)
            for head in range(first, last):
                slots = slice(0, 5 * CHUNK)
                numbers = (pages.keys[:, head - first, slots], pages.values[:, head - first, slots])
                for mine, theirs in zip(numbers, whole.setdefault(head, numbers), strict=True):
                    assert mine.equal(theirs)


def test_chunks_of_an_unknown_codec_stay_with_their_owner(
    engine: Callable[..., Ranks], caplog: pytest.LogCaptureFixture
) -> None:
    """The reader goes on without that size, and says so once for each rank."""
    settings: dict[str, Any] = {"disk_codec": "int8", "allow_uncertified": True}
    with pytest.warns(UserWarning), caplog.at_level(logging.WARNING, "kvloom"):
        assert engine(1, 4, **settings).ask(TOKENS)
        reader = engine(2, 4, tensor_parallel_sizes=[1])
        for tokens in (TOKENS, TOKENS[: 2 * CHUNK], list(range(2 * CHUNK))):
            assert reader.ask(tokens, save=False) and reader.loaded == {} and reader.computed == len(tokens)
        assert caplog.text.count("size 1 are not used: their codec is not known here") == 2
        owner = engine(1, 4, **settings)
        owner.ask(TOKENS)
        assert owner.loaded == {"disk": 5 * CHUNK}


@pytest.mark.parametrize(("heads", "one", "two"), [(4, 1, 2), (4, 2, 1), (2, 4, 1), (2, 2, 4)])
def test_documents_of_another_size_are_known_and_moved(
    engine: Callable[..., Ranks], heads: int, one: int, two: int
) -> None:
    """Stored by content, recognised in a prompt that names none, and rotated to where they stand."""
    settings: dict[str, Any] = {"tensor_parallel_sizes": [1, 2, 4], "match_tokens": 8, "fusion_ratio": 0.5}
    document = list(range(300, 320))
    assert engine(one, heads, **settings).ask([*document, 1], documents=((0, 20),))
    reader = engine(two, heads, **settings)
    prompt = [*range(9), *document, 5, 6]
    assert reader.planner.open("r", prompt, b"", RequestOptions()) == 9
    assert reader.planner.matched_tokens("r", 0) == 28
    reader.planner.allocated("r", 28, tuple(range(BLOCKS)))
    (fusion,) = reader.planner.plan_step([]).fusions
    (known,) = fusion.documents
    assert (known.start, known.stop) == (9, 29)
    keys, values = truth(document, heads)
    for worker, pages in zip(reader.workers, reader.pages, strict=True):
        fetched = worker.transfers.fetch(fusion).result(30)
        assert fetched.found == (True,) and dict(fetched.tokens) == {"disk": 28 - 9}
        first, last = heads_of(*worker.info.spec.shard, heads)
        moved = ROPE.shift(keys[:, first:last], 9)[:, :, : 28 - 9]
        assert pages.keys[:, :, 9:28].equal(moved)
        assert pages.values[:, :, 9:28].equal(values[:, first:last, : 28 - 9])
    reader.planner.close("r")
    reader.planner.apply_report(StepReport(loaded={"r": Loaded({}, False, 0.0, ranks=two)}, found_documents={}))
    reader.planner.arrived({"r"})


def test_the_log_says_what_is_missing(engine: Callable[..., Ranks], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "kvloom"):
        writer = engine(2, 4)
        assert writer.ask(TOKENS)
        reader = engine(1, 4)
        assert "holds KV of this model" not in caplog.text
        worker = reader.workers[0]
        warn_of_other_sizes(reader.settings, worker.info.spec, worker.transfers.store)
        assert "size 2; this engine has size 1 and does not look for it" in caplog.text
        assert '"tensor_parallel_sizes": [1, 2]' in caplog.text
        caplog.clear()
        named = engine(1, 4, tensor_parallel_sizes=[1, 2])
        warn_of_other_sizes(named.settings, worker.info.spec, worker.transfers.store)
        warn_of_other_sizes(writer.settings, writer.workers[0].info.spec, worker.transfers.store)
        assert not caplog.text
        keys = writer.planner._keys.prefixes(TOKENS, writer.planner._keys.salt(b""))
        keys.extend()
        assert writer.workers[1].transfers.store.delete(keys.of(3)[1])
        assert named.ask(TOKENS) and sum(named.loaded.values()) == 3 * CHUNK
    assert "a chunk of another tensor-parallel size is not complete" in caplog.text
    assert "tensor-parallel size 2, rank 1, heads 0 to 1 of its 2: chunk" in caplog.text
    assert caplog.text.count("not stored; was removed from disk by another process") == 1
