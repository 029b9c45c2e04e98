"""What a plan found, as tables for people: the answer first, what it rests on last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ...evaluation.page import Plot, Point, Row, Table
from ...retrieval.selector import LayerShape
from ...retrieval.settings import Retrieval
from .predict import FUSION, Outcome
from .request import RequestTime, figure
from .setup import Setup
from .traffic import Traffic

_PROBE_TOKENS = 1024


def answer_notes(
    setup: Setup,
    requests: Sequence[RequestTime],
    context_tokens: int,
    outcomes: Sequence[Outcome],
    prices: Mapping[str, float],
    gpus: int,
) -> list[str]:
    """The answer in sentences."""
    whole, best = requests[0], min(requests, key=lambda each: each.seconds)
    said = [
        f"{setup.shape.name} on {setup.machine.name}: a prompt of {context_tokens:,} tokens takes "
        f"{figure(whole.seconds)} s to compute"
        + (
            f" and {figure(best.seconds)} s at best with its KV stored ({best.way} from {best.tier}, {best.codec})."
            if best is not whole
            else "; no tier is faster than that."
        )
    ]
    if not outcomes:
        return said
    none, fastest = outcomes[0], min(outcomes, key=lambda each: each.ttft_s[0])
    fewest = min(outcomes, key=lambda each: (each.engines, each.ttft_s[0]))
    said.append(
        f"Without a cache: {_engines(none)}, median TTFT {figure(none.ttft_s[0])} s. Shortest median TTFT: "
        f"{_way(fastest)}, {figure(fastest.ttft_s[0])} s, {_engines(fastest)}"
        + (f"; fewest engines: {_way(fewest)}, {_engines(fewest)}." if fewest is not fastest else ".")
    )
    if prices:
        cheapest = min(outcomes, key=lambda each: each.hourly_cost(prices, setup.tiers, gpus))
        cost, before = (each.hourly_cost(prices, setup.tiers, gpus) for each in (cheapest, none))
        said.append(f"Cheapest: {_way(cheapest)}, {cost:.4g} an hour beside {before:.4g} without a cache.")
    said.append(
        "Hits are counted by replaying the requests through the store; times by a schedule in which each request is "
        "loaded or computed as the controller decides. Tiers are those of all engines together, and requests go where "
        "their KV lies. TTFT includes queues; `alone` does not. Time spent on generating tokens is left out."
    )
    return said


def _count(number: float) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _way(outcome: Outcome) -> str:
    if not outcome.way.is_cached:
        return "no cache"
    return f"{outcome.way.text}, {outcome.way.codec}" + (", fused" if outcome.way.reuse == FUSION else "")


def _engines(outcome: Outcome) -> str:
    return f"{outcome.engines} engine" + ("s" if outcome.engines > 1 else "")


def traffic_tables(
    setup: Setup, traffic: Traffic, outcomes: Sequence[Outcome], prices: Mapping[str, float], gpus: int
) -> tuple[list[Table], list[Plot], list[dict[str, object]]]:
    """Tables, plots and rows of what each way would do for the requests."""
    cells: list[Row] = []
    moved: list[Row] = []
    rows: list[dict[str, object]] = []
    for each in outcomes:
        cost = each.hourly_cost(prices, setup.tiers, gpus)
        per_million = cost * each.duration_s / 3600 / each.tokens * 1e6
        way = [
            each.way.text,
            each.way.codec if each.way.is_cached else "-",
            each.way.reuse if each.way.is_cached else "-",
        ]
        busiest = f"{each.bottleneck} {each.busy[each.bottleneck]:.0%}"
        cells.append(
            [
                *way,
                f"{each.hit_ratio:.1%}",
                str(each.engines),
                figure(each.alone_s),
                figure(each.ttft_s[0]),
                figure(each.ttft_s[1]),
                f"{each.loading:.0%}",
                busiest,
                *([f"{cost:.4g}", f"{per_million:.3g}"] if prices else []),
            ]
        )
        for name in each.way.tiers:
            mean, peak = each.read_bytes_s[name]
            written, busy = each.written_bytes_s[name], each.busy.get(name)
            shares = [f"{each.hits[name]:.1%}", f"{mean / 1e9:.3g}", f"{peak / 1e9:.3g}", f"{written / 1e9:.3g}"]
            moved.append([*way, name, *shares, "-" if busy is None else f"{busy:.1%}"])
        rows.append(_row(each, cost, per_million))
    heads = ["tiers", "codec", "reuse", "hits", "engines", "alone s", "TTFT s", "p99 s", "load", "busiest resource"]
    heads += ["cost an hour", "cost of 1M tokens"] if prices else []
    mean_tokens = sum(request.input_tokens for request in traffic.requests) / len(traffic.requests)
    caption = (
        f"{traffic.name}: {len(traffic.requests):,} requests of {mean_tokens:,.0f} tokens in "
        f"{traffic.duration_s:,.0f} s, {traffic.blocks:,} references to blocks of {traffic.block_tokens:,} tokens"
    )
    first = Table(heads, cells, caption, left=(0, 1, 2, 9))
    heads = ["tiers", "codec", "reuse", "tier", "hits", "read GB/s", "in the busiest minute", "written GB/s", "busy"]
    second = Table(heads, moved, "bytes that each tier has to move, of all engines together", left=(0, 1, 2, 3))
    return [first, second], [_hit_plot(setup, outcomes), _time_plot(outcomes)], rows


def _row(outcome: Outcome, cost: float, per_million: float) -> dict[str, object]:
    return {
        "subject": "traffic",
        "tiers": list(outcome.way.tiers),
        "codec": outcome.way.codec,
        "reuse": outcome.way.reuse,
        "hit_ratio": outcome.hit_ratio,
        "hits": dict(outcome.hits),
        "engines": outcome.engines,
        "ttft_p50_s": outcome.ttft_s[0],
        "ttft_p99_s": outcome.ttft_s[1],
        "alone_p50_s": outcome.alone_s,
        "loading": outcome.loading,
        "read_bytes_s": {name: list(pair) for name, pair in outcome.read_bytes_s.items()},
        "written_bytes_s": dict(outcome.written_bytes_s),
        "busy": dict(outcome.busy),
        "bottleneck": outcome.bottleneck,
        "hourly_cost": cost,
        "cost_per_million_tokens": per_million,
    }


def _hit_plot(setup: Setup, outcomes: Sequence[Outcome]) -> Plot:
    sizes = {tier.name: tier.capacity_bytes for tier in setup.tiers}
    series: dict[str, list[Point]] = {}
    for each in outcomes:
        if each.way.is_cached:
            form = setup.forms[each.way.codec]
            tokens = max(sizes[name] / form.bytes_in(name) * form.tokens for name in each.way.tiers)
            series.setdefault(f"{each.way.codec}, {each.way.reuse}", []).append(Point(tokens / 1e6, each.hit_ratio))
    found = {name: sorted(points) for name, points in series.items()}
    return Plot("million tokens that fit into the largest tier", "hit ratio", found, "Hits by capacity.", log_x=True)


def _time_plot(outcomes: Sequence[Outcome]) -> Plot:
    series = {
        f"{_way(each)} ({each.engines})": [Point(100 * share, max(seconds, 1e-6)) for share, seconds in each.times]
        for each in outcomes
    }
    caption = "Times to first token of the requests, queues included, with so many engines as the name says."
    return Plot("% of the requests", "TTFT s, that many or faster", series, caption, log_y=True)


def byte_table(setup: Setup) -> Table:
    """What a chunk takes under each codec."""
    cells: list[Row] = []
    for name, form in setup.forms.items():
        origin = "KV of this model" if form.is_sampled else "any KV takes as much"
        speeds = [f"{form.raw_bytes / s / 1e9:.3g}" if s else "-" for s in (form.decode_s, form.moved_s)]
        sizes = [f"{form.token_bytes:,.1f}", f"{form.memory_bytes:,}", f"{form.disk_bytes:,}", f"{form.ratio:.3g}x"]
        cells.append([name, *sizes, *speeds, "nothing" if form.is_lossless else "some", origin])
    heads = [
        "codec",
        "bytes a token",
        "chunk in memory",
        "chunk on disk",
        "smaller",
        "decodes GB/s",
        "and moves GB/s",
        "loses",
        "measured on",
    ]
    form = next(iter(setup.forms.values()))
    caption = f"bytes of a chunk of {form.tokens:,} tokens, {form.raw_bytes:,} in the engine, encoded by each codec"
    return Table(heads, cells, caption, left=(0, 7, 8))


def capacity_table(setup: Setup, context_tokens: int) -> Table:
    """Tokens and whole contexts that fit."""
    cells: list[Row] = []
    if setup.gpu_kv_bytes:
        tokens = setup.gpu_kv_bytes / setup.shape.spec().token_bytes
        cells.append(
            ["GPU", f"{setup.gpu_kv_bytes / 1e9:,.1f}", "as computed", int(tokens), int(tokens // context_tokens)]
        )
    for tier in setup.tiers:
        for name, form in setup.forms.items():
            tokens = tier.capacity_bytes // form.bytes_in(tier.name) * form.tokens
            cells.append([tier.name, f"{tier.capacity_bytes / 1e9:,.1f}", name, tokens, tokens // context_tokens])
    heads = ["place", "GB for KV", "codec", "tokens", f"contexts of {context_tokens:,}"]
    return Table(heads, cells, "how much fits", left=(0, 2))


def decode_table(setup: Setup, context_tokens: int) -> Table:
    """A decode step of one sequence, attending to everything or to what retrieval chooses."""
    shape, spec = setup.shape, setup.shape.spec()
    heads = ["attention", "bytes read in the GPU", "from the host", "step ms", "contexts on the GPU"]
    caption = f"a token of the answer behind {context_tokens:,} tokens, one sequence alone"
    kv, link = spec.token_bytes * context_tokens, setup.machine.link_bytes_s
    index = index_token_bytes(setup) * context_tokens
    chosen = setup.assume.budget_ratio * kv
    places = (
        ("dense", kv, 0.0, spec.token_bytes),
        (f"retrieval, {setup.assume.budget_ratio:.0%}", index + chosen, 0.0, spec.token_bytes + index / context_tokens),
        (f"retrieval, {setup.assume.budget_ratio:.0%}, KV in host memory", index, chosen, index / context_tokens),
    )
    cells: list[Row] = []
    for name, near, far, token_bytes in places:
        step_s = (shape.read_bytes + near) / setup.machine.hbm_bytes_s + far / link
        fits = setup.gpu_kv_bytes // (token_bytes * context_tokens) if token_bytes else 0
        cells.append(
            [name, f"{(shape.read_bytes + near) / 1e9:.3g} GB", f"{far / 1e9:.3g} GB", f"{step_s * 1e3:.3g}", int(fits)]
        )
    return Table(heads, cells, caption)


def index_token_bytes(setup: Setup) -> float:
    """Bytes a token that the default index of retrieval takes in all layers, of an index that was built."""
    shape = setup.shape
    group = max(1, shape.query_heads // shape.kv_heads)
    layer = LayerShape(shape.kv_heads, group, shape.head_dim, shape.head_dim**-0.5, None)
    index = Retrieval(sink_tokens=0).selector(layer, 0)
    keys = torch.randn(shape.kv_heads, _PROBE_TOKENS, shape.head_dim, generator=torch.Generator().manual_seed(0))
    value_dim = shape.head_dim if shape.value_dim is None else shape.value_dim
    index.add(keys, torch.zeros(shape.kv_heads, _PROBE_TOKENS, value_dim))
    return shape.layers * float(getattr(index, "held_bytes")) / _PROBE_TOKENS  # noqa: B009  no part of the protocol


def assumption_table(setup: Setup) -> Table:
    """What the figures rest on."""
    shape, assume = setup.shape, setup.assume
    heads = f"{shape.layers} layers, {shape.kv_heads} KV heads of {shape.query_heads}, head dim {shape.head_dim}"
    cells: list[Row] = [["model", f"{heads}, {_count(shape.params)} weights, {str(shape.dtype)[6:]}", shape.name]]
    cells += [["model", text, "assumed"] for text in shape.assumed]
    if shape.windows:
        few = sum(window is not None for window in shape.windows)
        cells.append(["model", f"{few} layers with a window; their KV is counted whole", "config.json"])
    cells += [list(fact) for fact in setup.machine.facts]
    for tier in setup.tiers:
        speed = (setup.machine.read_bytes_s or {}).get(tier.name, tier.read_bytes_s)
        start = (setup.machine.read_s or {}).get(tier.name, tier.latency_s)
        measured = tier.name in (setup.machine.read_s or {})
        text = f"{tier.capacity_bytes / 1e9:,.4g} GB" + (f" at {speed / 1e9:.3g} GB/s" if speed < float("inf") else "")
        cells.append([tier.name, f"{text}, {start * 1e6:,.0f} µs a chunk", "measured here" if measured else "assumed"])
    cells += [
        ["chunk_tokens, question_tokens", f"{assume.chunk_tokens:g}, {assume.question_tokens:g}", "assumed"],
        ["lanes", f"{setup.machine.lanes} loads at once in an engine", setup.machine.lanes_of],
        ["busy_ratio", f"{assume.busy_ratio:.0%} of the time that engines compute", "assumed"],
    ]
    return Table(["what", "value", "from"], cells, "what the figures rest on (--assume NAME=VALUE)", left=(0, 1, 2))
