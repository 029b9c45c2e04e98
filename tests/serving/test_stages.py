"""Engines whose layers are in stages, and engines whose ranks all have the same: what each rank stores and finds."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .ranks import CHUNK, Ranks

TEXT = [(7 * i) % 50 for i in range(5 * CHUNK + 3)]
WHOLE = 5 * CHUNK
Open = Callable[..., Ranks]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    made: list[Ranks] = []

    def make(size: int, heads: int = 4, **options: object) -> Ranks:
        made.append(Ranks(tmp_path, size, heads, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


@pytest.mark.parametrize("size", [1, 2])
def test_stages_find_what_stages_have_stored(opened: Open, size: int) -> None:
    engine = opened(size, stages=2)
    assert engine.ask(TEXT) and engine.loaded == {}
    assert engine.stored() == 2 * size * 5, "each rank its layers and heads of each chunk"
    assert engine.ask(TEXT) and engine.loaded == {"host": WHOLE}
    later = opened(size, stages=2)
    assert later.ask(TEXT) and later.loaded == {"disk": WHOLE}
    assert later.computed == len(TEXT) - WHOLE


def test_engines_of_other_stages_do_not_meet(opened: Open) -> None:
    """Two chunks of one layer each are no chunk of two layers; none is taken for another."""
    one, two = opened(1), opened(1, stages=2)
    assert one.ask(TEXT) and two.ask(TEXT)
    assert two.loaded == {} and one.stored() == 5 + 10
    assert two.ask(TEXT) and one.ask(TEXT)
    assert two.loaded == one.loaded == {"host": WHOLE}


@pytest.mark.parametrize("stage", [0, 1])
def test_what_one_stage_has_lost_all_compute(opened: Open, stage: int) -> None:
    engine = opened(1, stages=2)
    assert engine.ask(TEXT)
    store = engine.workers[stage].transfers.store
    keys = engine.planner._keys.prefixes(TEXT, engine.planner._keys.salt(b""))
    keys.extend()
    lost = keys.of(3)[stage]

    assert engine.ask(TEXT, meanwhile=lambda: [store.delete(lost)])
    assert engine.loaded == {"host": 3 * CHUNK} and engine.computed == len(TEXT) - 3 * CHUNK
    store.delete(lost)
    assert engine.ask(TEXT) and engine.loaded == {"host": 3 * CHUNK}, "offered up to what every stage has"


def test_of_copies_the_first_rank_stores_and_all_find_it(opened: Open) -> None:
    engine = opened(2, copies=True)
    assert engine.ask(TEXT) and engine.loaded == {}
    assert engine.stored() == 5, "once, not once a rank"
    assert engine.counts("saved_chunks") == [5, 0]
    assert engine.ask(TEXT) and sum(engine.loaded.values()) == WHOLE
    alone, wider = opened(1), opened(4, copies=True)
    assert wider.ask(TEXT) and wider.loaded == {"disk": WHOLE}, "whatever the size"
    assert alone.ask(TEXT) and alone.loaded == {"disk": WHOLE}
    assert wider.stored() == 5
