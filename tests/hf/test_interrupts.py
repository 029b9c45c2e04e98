"""A Ctrl-C anywhere in a session's turn: nothing stays pinned, locked or switched, and later answers are right.

A trace raises `KeyboardInterrupt` in the main thread at the n-th place of kvloom's transformers connector, retrieval
and blender where CPython looks at signals: behind a call, and at the beginning of a function. Threads of a session's
own are not interrupted, since Python delivers signals to the main thread only.
"""

from __future__ import annotations

import dis
import gc
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import pytest
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

import kvloom
from kvloom.blend.blender import Blender
from kvloom.connectors.hf.connector import TransformersConnector
from kvloom.errors import EngineError
from kvloom.kvstore.store import KVStore
from kvloom.kvstore.tiers.host import HostTier
from kvloom.retrieval.settings import Retrieval

from ..support.models import DOCUMENTS, QUESTION, make_model, make_tokenizer
from ..support.patience import eventually
from .test_retrieval import prompts

ROOT = str(Path(kvloom.__file__).parent)
TRACED = tuple(f"{ROOT}/{name}" for name in ("connectors/hf", "retrieval", "blend"))
POINTS = 6  # of each scenario in the default run; the torture takes hundreds
RETRIEVAL = Retrieval("landmarks", budget_ratio=0.1, window_tokens=16, break_even_tokens=0)


@cache
def checks(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions before which the interpreter has looked at signals."""
    instructions = list(dis.get_instructions(code))
    looks = [i.opname.startswith(("CALL", "RESUME")) for i in instructions]
    return frozenset(i.offset for i, has_looked in zip(instructions[1:], looks, strict=False) if has_looked)


class Interrupt:
    """Raises `KeyboardInterrupt` at place `at` of the traced code; `places` counts them."""

    def __init__(self, at: int | None) -> None:
        self.at, self.places, self.has_struck = at, 0, False

    def __enter__(self) -> Self:
        sys.settrace(self._on_call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(TRACED):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_opcode

    def _on_opcode(self, frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        if event == "opcode" and frame.f_lasti in checks(frame.f_code):
            self.places += 1
            if self.places == self.at:
                self.has_struck = True
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._on_opcode


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model("llama", max_position_embeddings=1024, num_hidden_layers=2)


def connect(model: PreTrainedModel) -> TransformersConnector:
    store, blender = KVStore([HostTier(None)]), Blender(recompute_ratio=0.3)
    return TransformersConnector(model, make_tokenizer(bos=True), store, blender, model_id="m", allow_uncertified=True)


ASKED = prompts(600, 300)
LONG = [" ".join([text] * 3) for text in DOCUMENTS]


def talk(rag: TransformersConnector) -> list[Sequence[int]]:
    """Two turns, saved."""
    with rag.session(RETRIEVAL) as session:
        first = session.generate(ASKED, max_new_tokens=3)
        second = session.generate(prompts(5, 6, seed=1), max_new_tokens=2)
        session.save()
    return [*first.token_ids, *second.token_ids]


def resume(rag: TransformersConnector) -> list[Sequence[int]]:
    """A conversation that is taken up where another one was saved."""
    with rag.session(RETRIEVAL) as session:
        session.generate(ASKED[0], max_new_tokens=3)
        session.save()
        history = session.token_ids
    with rag.session(RETRIEVAL, history=history) as session:
        return list(session.generate([3, 1, 4], max_new_tokens=3).token_ids)


def ask_documents(rag: TransformersConnector) -> list[Sequence[int]]:
    """A session over fused documents."""
    with rag.session(RETRIEVAL, documents=LONG) as session:
        return list(session.generate(QUESTION, max_new_tokens=3).token_ids)


def answer(rag: TransformersConnector) -> list[str]:
    """No session at all."""
    rag.precompute(LONG[:2])
    return [rag.answer(LONG, QUESTION, max_new_tokens=3)]


def settles(holds: Callable[[], bool]) -> bool:
    """What the worker of a lost session still does takes a moment, and so does the collector, if nobody holds it."""
    return eventually(lambda: holds() or (gc.collect() and holds()))


def index_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("kvloom-index")]


def check(model: PreTrainedModel, scenario: Callable[[TransformersConnector], list[Any]], points: int) -> None:
    """Interrupt `scenario` at so many places spread over it, each in a store of its own."""
    before = model.config._attn_implementation
    expected = scenario(connect(model))
    rag = connect(model)
    with Interrupt(None) as counted:
        assert scenario(rag) == expected
    assert counted.places > points
    for n in range(points):
        at = 1 + n * (counted.places - 1) // (points - 1)
        rag = connect(model)
        try:
            with Interrupt(at) as interrupt:
                scenario(rag)
        except KeyboardInterrupt:
            pass
        where = f"place {at} of {counted.places}"
        assert interrupt.has_struck, where
        assert model.config._attn_implementation == before, where
        assert settles(lambda: rag.store.stats().pinned == 0), where  # noqa: B023
        assert settles(lambda: not index_threads()), where
        assert rag.store.check() == [], where
        assert scenario(rag) == expected, where  # of the same store: nothing that is half done is served
        assert settles(lambda: rag.store.stats().pinned == 0), where  # noqa: B023
        rag.store.close()


@pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")
@pytest.mark.parametrize("scenario", [talk, resume, ask_documents, answer])
def test_an_interrupt_leaves_nothing_behind(
    model: PreTrainedModel, scenario: Callable[[TransformersConnector], list[Any]]
) -> None:
    check(model, scenario, POINTS)


@pytest.mark.torture
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")
@pytest.mark.parametrize("scenario", [talk, resume, ask_documents, answer])
def test_an_interrupt_at_hundreds_of_places(
    model: PreTrainedModel, scenario: Callable[[TransformersConnector], list[Any]]
) -> None:
    check(model, scenario, 200)


def interrupt_third() -> Callable[[Tensor, Tensor], Tensor]:
    """A logits processor in which the third token is interrupted."""
    calls: list[int] = []

    def process(input_ids: Tensor, scores: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return scores

    return process


@pytest.mark.filterwarnings("ignore::kvloom.errors.UncertifiedWarning")
def test_an_interrupted_session_says_so(model: PreTrainedModel) -> None:
    """It can still be read, and closed; another one goes on from it."""
    rag = connect(model)
    with rag.session(RETRIEVAL) as session:
        session.generate(ASKED[0], max_new_tokens=2)
        said = session.token_ids
        with pytest.raises(KeyboardInterrupt):
            session.generate([3, 1, 4], max_new_tokens=20, logits_processor=LogitsProcessorList([interrupt_third()]))
        with pytest.raises(EngineError, match="failed in the middle of a turn; begin another, with its `token_ids`"):
            session.generate([3], max_new_tokens=1)
        with pytest.raises(EngineError, match="failed in the middle of a turn"):
            session.save()
        assert session.token_ids[0][: len(said[0])] == said[0]
    with pytest.raises(EngineError, match="this session is closed"):
        session.generate([3], max_new_tokens=1)
    with rag.session(RETRIEVAL, history=said) as session:
        session.generate([3], max_new_tokens=1)
    assert rag.store.stats().pinned == 0
