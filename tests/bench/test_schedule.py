"""What `kvloom bench schedule` makes of what it measured, without an engine."""

import math
from collections.abc import Sequence

import pytest

from kvloom.bench.schedule.check import FIGURES, Compared, figures, order_of, result_of
from kvloom.bench.schedule.costs import Costs, LoadCost, PrefillCost, pairs
from kvloom.bench.schedule.jobs import Policy
from kvloom.bench.schedule.probes import Times, costs_of, fitted, prefill_of
from kvloom.bench.schedule.queues import schedule
from kvloom.bench.schedule.trace import BURST, draw_trace, prompts_of
from kvloom.bench.vllm.inputs import Prompts
from kvloom.connectors.serving.messages import LOADERS

CHUNK = 256


def test_costs_are_found_in_steps_that_follow_them() -> None:
    true = PrefillCost(fixed_s=4e-3, token_s=1e-4, pair_s=4e-8, behind_s=2e-7)
    rows: list[Sequence[float]] = [(1.0, n, pairs(n), 0.0) for n in (256, 900, 1800)]
    rows += [(1.0, b, b * n, b * n) for b in (1, 8) for n in (256.0, 900.0, 1800.0)]
    seconds = [true.fixed_s + true.token_s * n + true.pair_s * p + true.behind_s * b for _, n, p, b in rows]
    found = fitted(rows, seconds)
    for name in ("fixed_s", "token_s", "pair_s", "behind_s"):
        assert getattr(found, name) == pytest.approx(getattr(true, name), rel=1e-4)


def test_no_cost_is_negative() -> None:
    rows = [(1.0, n, pairs(n), 0.0) for n in (256, 900, 1800)]
    found = fitted(rows, [0.1 + 1e-4 * n - 1e-9 * n * n for _, n, _, _ in rows])
    assert found.pair_s == 0.0 and found.fixed_s > 0.0
    assert found.seconds(900) == pytest.approx(0.1 + 0.09, rel=0.02)


def test_loads_alone_and_together_say_what_they_cost() -> None:
    prefill = PrefillCost(0.0, 1e-3, 0.0)
    times: Times = {(1, 1, 0): [0.03], (7, 1, 0): [0.02, 0.09, 0.8], (7, LOADERS, 0): [0.18], (7, LOADERS, 1): [9.0]}
    times |= {(1, 1, 1): [0.03 + 0.032 + 0.001], (7, 1, 1): [0.09 + 0.032 + 0.003]}
    sizes = {"chunks": 7, "chunk_tokens": CHUNK, "chunk_bytes": 1 << 20}
    costs = costs_of(prefill, times, tier="disk", **sizes)
    cost = costs.loads["disk"]
    assert (cost.chunk_s, cost.start_s) == (pytest.approx(0.01), pytest.approx(0.02))
    assert cost.seconds(7) == pytest.approx(0.09) and costs.call_s == pytest.approx(0.002)
    assert costs.lanes == pytest.approx(2.0)
    for crowded_s, lanes in ((9.0, 1.0), (0.01, LOADERS)):
        costs = costs_of(prefill, {**times, (7, LOADERS, 0): [crowded_s]}, tier="disk", **sizes)
        assert costs.lanes == lanes


def test_medians_of_steps_are_fitted() -> None:
    true = PrefillCost(fixed_s=4e-3, token_s=1e-4, pair_s=4e-8)
    lengths = (256, 900, 1800)
    times = {(1.0, n, pairs(n), 0.0): [true.seconds(n), true.seconds(n), 99.0] for n in lengths}
    found = prefill_of(times)
    assert [found.seconds(n) for n in lengths] == pytest.approx([true.seconds(n) for n in lengths], rel=1e-3)


def test_a_trace_is_as_busy_as_asked_for() -> None:
    found = draw_trace(4000, 12, 7, CHUNK, busy_ratio=0.8)
    assert found == draw_trace(4000, 12, 7, CHUNK, busy_ratio=0.8)
    work = sum(each.chunks + each.new_tokens / CHUNK for each in found)
    assert work / found[-1].work == pytest.approx(0.8, rel=0.05)
    times = [each.work for each in found]
    assert times == sorted(times) and max(times.count(at) for at in set(times)) == BURST
    new = [each for each in found if each.document is None]
    assert len(new) / len(found) == pytest.approx(0.2, abs=0.03)
    assert all(each.chunks == 0 and CHUNK <= each.new_tokens <= 7 * CHUNK for each in new)
    stored = [each for each in found if each.document is not None]
    assert {each.chunks for each in stored} == set(range(1, 8)) and {each.document for each in stored} == set(range(12))
    prompts = Prompts(100, (), seed=1)
    texts = prompts.documents(12, 7 * CHUNK)
    for each, ids in zip(found[:50], prompts_of(found[:50], texts, prompts, CHUNK), strict=True):
        job = each.job("disk", CHUNK, 2.0)
        assert len(ids) == job.tokens and job.arrival_s == 2 * each.work and sum(job.stored.values()) == each.chunks
        assert each.document is None or ids[: each.chunks * CHUNK] == texts[each.document][: each.chunks * CHUNK]
    costs = Costs(PrefillCost(0.0, 1e-4, 0.0), CHUNK, 1 << 20, {"disk": LoadCost(1e-3)})
    assert len(schedule([each.job("disk", CHUNK, 0.1) for each in found], costs, "always")) == 4000


def compared(tier: str, way: Policy, predicted: float, measured: float) -> Compared:
    return Compared(tier, way, dict.fromkeys(FIGURES, predicted), dict.fromkeys(FIGURES, measured), {"a": 1}, {"a": 1})


def test_errors_and_order() -> None:
    found = [compared("disk", "always", 1.5, 2.0), compared("disk", "never", 1.0, 1.0)]
    found += [compared("host", "always", 3.0, 1.0), compared("host", "never", 1.05, 1.09)]
    assert order_of(found) == (4, 4), "ways of one tier that differ by a tenth at least"
    found[-1] = compared("host", "never", 1.05, 1.2)
    assert order_of(found) == (4, 8)
    costs = Costs(PrefillCost(0.0, 1.0, 0.0), 16, 16, {"disk": LoadCost(1.0), "host": LoadCost(1.0)})
    result = result_of(found, {"disk": costs, "host": costs})
    assert result.metrics["schedule_error"].value == pytest.approx((0.125 + 0.25) / 2)
    assert result.metrics["schedule_order"].value == 0.5
    assert {target.metric for target in result.targets} <= result.metrics.keys()
    assert figures([3.0, 1.0, 2.0], 9.0)["ttft_p50_s"] == 2.0 and math.isfinite(figures([1.0], 1.0)["ttft_p99_s"])
