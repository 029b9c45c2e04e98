"""Which families start with kvloom's defaults and give equal tokens: all in one process, one engine after the other.

Whatever is stored is loaded: by default, tiny models on a busy machine may compute what they could load.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...evaluation.page import Row, Table
from ...evaluation.report import Metric
from .engine import KVLOOM
from .exact import SAME_AS
from .families import FAMILIES, VOCABULARY, Family, make_tiny_model
from .inputs import Prompts
from .server import Ask, Served, Setup, generate, line_of, start_engine
from .times import NOTHING

PROMPT_TOKENS = (700, 300)  # of both some chunks are whole, of kvloom's default length
NEW_TOKENS = 20
FAMILY_S = 300.0
_STORED_S, _PAUSE_S = 30.0, 0.1
COLD, WARM, RESTARTED = SAME_AS


@dataclass(frozen=True, slots=True)
class FamilyOutcome:
    """How a family was served.

    Attributes
    ----------
    same : by way of having the KV, whether tokens were those of requests that kvloom leaves alone, and KV was loaded
        where there was some. Empty if the engine did not start.
    why : what went wrong; empty for nothing.
    """

    title: str
    same: Mapping[str, bool] = field(default_factory=dict)
    why: str = ""

    @property
    def is_served(self) -> bool:
        """Whether all was as it should be."""
        return all(self.same.get(way) for way in SAME_AS)

    def row(self) -> dict[str, object]:
        """Plain values by name."""
        return {"what": "family", "family": self.title, "served": self.is_served, **self.same, "why": self.why}


def count_families(
    place: Path, advance: Callable[[], None], families: Mapping[str, Family] = FAMILIES
) -> list[FamilyOutcome]:
    """Serve every family. Where the process ends with one, another process goes on with those behind it.

    Parameters
    ----------
    place : an empty folder, for models, stores and what engines print.
    advance : called after each.
    """
    outcomes: list[FamilyOutcome] = []
    context = multiprocessing.get_context("spawn")
    while len(outcomes) < len(families):
        left = list(families)[len(outcomes) :]
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, place, {title: families[title] for title in left}))
        process.start()  # no daemon: engines of several ranks have processes of their own
        theirs.close()
        try:
            for _ in left:
                if not ours.poll(FAMILY_S):
                    raise TimeoutError(f"said nothing for {FAMILY_S:g} s")
                outcomes.append(ours.recv())
                advance()
        except (EOFError, ConnectionResetError, TimeoutError) as exc:
            why = str(exc) if isinstance(exc, TimeoutError) else "its process ended"
            outcomes.append(FamilyOutcome(left[len(outcomes) - len(families)], why=why))
            advance()
            process.kill()
        process.join()
    return outcomes


def share(outcomes: Sequence[FamilyOutcome]) -> Metric | None:
    """Of the families, those that are served; None of none."""
    return Metric.of_share(sum(each.is_served for each in outcomes), len(outcomes)) if outcomes else None


def families_table(outcomes: Sequence[FamilyOutcome]) -> Table:
    rows: list[Row] = []
    for each in outcomes:
        words = ["" if way not in each.same else "yes" if each.same[way] else "no" for way in SAME_AS]
        rows.append([each.title, *words, each.why])
    return Table(["family", *SAME_AS, ""], rows, "tiny random models: greedy tokens equal", left=(0, 4))


def _serve(pipe: Connection, place: Path, families: Mapping[str, Family]) -> None:
    """A process of its own begins here."""
    log = os.open(place / "families.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for title, family in families.items():
        try:
            pipe.send(FamilyOutcome(title, _same(family, place / title)))
        except Exception as exc:  # noqa: BLE001  whatever an engine raises is the outcome
            pipe.send(FamilyOutcome(title, why=line_of(exc)))


def _same(family: Family, folder: Path) -> dict[str, bool]:
    if (why := family.why_not_here()) is not None:
        raise RuntimeError(why)
    model = make_tiny_model(folder / "model", family.architecture, **family.config)
    extra = {"disk_path": str(folder / "store"), "host_bytes": 1 << 28, "load_or_recompute": "always"}
    connector = {**KVLOOM, "kv_connector_extra_config": extra}
    setup = Setup(model, connector, max_tokens=1024, cache_gib=1, log=folder / "log", options=family.options_here())
    prompts = Prompts(VOCABULARY, (), seed=4)
    texts = [prompts.ids(count) for count in PROMPT_TOKENS]

    llm = start_engine(setup)
    try:
        plain = generate(llm, Ask(texts, NEW_TOKENS, [NOTHING] * len(texts)))
        cold = _ask(llm, texts)
        until_s = time.monotonic() + _STORED_S  # in the background, and perhaps in another process
        warm = _ask(llm, texts)
        while not _is_loaded(warm, "host") and time.monotonic() < until_s:
            time.sleep(_PAUSE_S)
            warm = _ask(llm, texts)
    finally:
        llm.llm_engine.engine_core.shutdown()
    llm = start_engine(setup)
    try:
        restarted = _ask(llm, texts)
    finally:
        llm.llm_engine.engine_core.shutdown()
    return {
        COLD: cold.tokens == plain.tokens,
        WARM: _is_loaded(warm, "host") and warm.tokens == plain.tokens,
        RESTARTED: _is_loaded(restarted, "disk") and restarted.tokens == plain.tokens,
    }


def _ask(llm: Any, texts: Sequence[Sequence[int]]) -> Served:
    """With nothing in vLLM's own cache."""
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM does not forget its prefix cache: blocks are in use")
    return generate(llm, Ask(texts, NEW_TOKENS, [None] * len(texts)))


def _is_loaded(served: Served, tier: str) -> bool:
    """Whether something of every prompt came from this tier, and nothing was lost."""
    return all(usage is not None and usage["loaded_tokens"].get(tier) and not usage["failed"] for usage in served.usage)
