"""What the two halves tell one another reaches other processes: engines of several ranks pickle it."""

import pickle

import numpy as np
import pytest

from kvloom.connectors.serving.messages import (
    Advance,
    Load,
    Loaded,
    LookUp,
    Revocation,
    Save,
    StepPlan,
    StepReport,
    both,
)
from kvloom.core import ChunkKey

from .ranks import sent

KEYS = ((ChunkKey(bytes(32)),),)
LOADED = Loaded({"host": 4}, False, 0.5)
MESSAGES = (
    LookUp("r", KEYS, 1, 0),
    Load("r", KEYS, 0, 0, 4, (1,), 1),
    Advance("r", (True,)),
    Revocation("r", frozenset((1,))),
    LOADED,
    both(LOADED, LOADED),
    StepPlan(),
    StepPlan(loads=[Load("r", KEYS, 0, 0, 4, (1,), 1)]),
    StepPlan(probe=Load("", KEYS, 0, 0, 4, ())),
    StepReport(),
    StepReport(loaded={"r": LOADED}).merged(StepReport(loaded={"r": LOADED}, missing={1: "evicted"})),
    StepReport(probed=LOADED).merged(StepReport(probed=LOADED)),
)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_messages_arrive_as_they_were_sent(message: object) -> None:
    """With what they have by default, too."""
    assert sent(message) == message


def test_saves_arrive_as_they_were_sent() -> None:
    save = Save(KEYS[0], None, np.arange(4), 0, (1,))
    received = sent(save)
    assert received.keys == save.keys and received.token_ids.tolist() == [0, 1, 2, 3]


def test_a_probe_is_something_to_do_and_to_tell() -> None:
    assert not StepPlan(probe=Load("", KEYS, 0, 0, 4, ())).is_empty and not StepReport(probed=LOADED).is_empty
    slow = Loaded({"host": 4}, False, 0.9, read_s={"host": 0.9})
    for merged in (
        StepReport(probed=slow).merged(StepReport(probed=LOADED)),
        StepReport(probed=LOADED).merged(StepReport(probed=slow)),
    ):
        assert merged.probed is not None
        assert (merged.probed.ranks, merged.probed.read_s) == (2, {"host": 0.9}), "the slower rank counts"
    assert (
        StepReport(probed=LOADED).merged(StepReport()).probed == StepReport().merged(StepReport(probed=LOADED)).probed
    )


def test_a_probe_is_small() -> None:
    """Beside what any plan takes."""
    beside = len(pickle.dumps(StepPlan(probe=Load("", KEYS, 0, 0, 256, ())))) - len(pickle.dumps(StepPlan()))
    assert beside < 300
