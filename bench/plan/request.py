"""One request of a given length: computed, loaded from each tier under each codec, or fused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ...connectors.serving.controller.controller import Controller
from ...connectors.serving.controller.decisions import StoredPrefix, StoredRun
from ...evaluation.page import Plot, Point, Row, Table
from ..schedule.queues import teach
from .setup import Setup


@dataclass(frozen=True, slots=True)
class RequestTime:
    """The time to the first token of a request that meets no queue.

    Attributes
    ----------
    tier : where all but the question is stored; empty if nothing is.
    nbytes : read from there.
    load_s, compute_s : its parts.
    decision : what the controller does with it; empty for fusions, of which it knows nothing.
    """

    way: str
    tier: str
    codec: str
    nbytes: int
    load_s: float
    compute_s: float
    decision: str = ""

    @property
    def seconds(self) -> float:
        return self.load_s + self.compute_s

    def as_row(self) -> dict[str, object]:
        return asdict(self) | {"ttft_s": self.seconds}


def request_rows(setup: Setup, tokens: int) -> list[RequestTime]:
    """Computing everything first; then every tier under every codec, as a prefix and fused from documents."""
    prefill = setup.machine.prefill
    found = [RequestTime("compute", "", "", 0, 0.0, prefill.seconds(tokens))]
    ratio, question = setup.assume.fusion_ratio, int(setup.assume.question_tokens)
    for tier in setup.tiers:
        for codec, form in setup.forms.items():
            costs = setup.costs(codec)
            chunks = (tokens - question) // form.tokens
            left, nbytes = tokens - chunks * form.tokens, form.bytes_in(tier.name, chunks)
            controller = Controller()
            teach(controller, costs)
            run = StoredRun(tier.name, chunks, costs.chunk_bytes, form.tokens)
            decision = controller.decide(StoredPrefix([run], 0, 0, tokens))
            what = "loads all" if decision.chunks == chunks else f"loads {decision.chunks} of {chunks} chunks"
            decided = what if decision.chunks else f"computes: {decision.reason}"
            times = loaded_time(setup, tier.name, codec, chunks, left)
            found.append(RequestTime("prefix", tier.name, codec, nbytes, *times, decided))
            times = loaded_time(setup, tier.name, codec, chunks, left, ratio)
            found.append(RequestTime(f"fusion, {ratio:.0%}", tier.name, codec, nbytes, *times))
    return found


def loaded_time(
    setup: Setup, tier: str, codec: str, chunks: int, left: int, recompute_ratio: float | None = None
) -> tuple[float, float]:
    """Seconds to load chunks, and to compute the `left` tokens behind them.

    Parameters
    ----------
    recompute_ratio : chunks are documents, moved to where they stand now, and this share of their tokens is computed:
        then the question is asked twice, for the choice of these tokens and for the answer. None for a prefix.
    """
    prefill, behind = setup.machine.prefill, chunks * setup.forms[codec].tokens
    compute_s = prefill.seconds(left, behind)
    if recompute_ratio:
        compute_s = 2 * compute_s + prefill.scattered_s(recompute_ratio * behind, behind)
    return setup.costs(codec, is_moved=recompute_ratio is not None).load_s({tier: chunks}), compute_s


def figure(value: float) -> str:
    """Three digits, and never an exponent for what is large."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def request_table(rows: Sequence[RequestTime], tokens: int, setup: Setup) -> Table:
    """What `request_rows` found, beside computing everything."""
    whole = rows[0].seconds
    cells: list[Row] = [
        [
            each.way,
            each.tier or "-",
            each.codec or "-",
            f"{each.nbytes / 1e9:.3g}" if each.nbytes else "-",
            figure(each.load_s),
            figure(each.compute_s),
            figure(each.seconds),
            f"{whole / each.seconds:.3g}x",
            each.decision or "-",
        ]
        for each in (rows[0], *sorted(rows[1:], key=lambda each: each.seconds))
    ]
    heads = ["way", "from", "codec", "GB read", "load s", "compute s", "TTFT s", "speed-up", "the controller"]
    caption = f"one request of {tokens:,} tokens, the last {setup.assume.question_tokens:g} new: time to first token"
    return Table(heads, cells, caption, left=(0, 1, 2, 8))


def ttft_plot(setup: Setup, tokens: int) -> Plot:
    """Time to first token by the length of the prompt."""
    least = int(setup.assume.chunk_tokens + setup.assume.question_tokens)
    lengths = [tokens]
    while lengths[-1] // 2 >= least and len(lengths) < 10:
        lengths.append(lengths[-1] // 2)
    series: dict[str, list[Point]] = {}
    for length in reversed(lengths):
        for each in request_rows(setup, length):
            name = each.way if each.way == "compute" else f"{each.way}: {each.tier}, {each.codec}"
            series.setdefault(name, []).append(Point(length, each.seconds))
    caption = "Time to first token of one request, all but the question stored. Lines that end low are worth buying."
    return Plot("tokens of the prompt", "seconds to the first token", series, caption, log_x=True, log_y=True)
