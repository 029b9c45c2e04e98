"""Traffic: hits are the simulator's, documents are fused in any order, and large pools follow the formula for LRU."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from kvloom.bench.eviction.replay import TimedRequest, replay, replay_tiers
from kvloom.bench.plan.machines import Assumptions, TierPlan, gpu_by_name
from kvloom.bench.plan.predict import FUSION, PREFIX, Predictor, Way, engines_needed, job_of, ways
from kvloom.bench.plan.scale import Pool, catalog_bytes, lru_hit_ratio, parts_of
from kvloom.bench.plan.setup import Setup, gpu_machine, measured_forms
from kvloom.bench.plan.shapes import read_shape
from kvloom.bench.plan.traffic import Traffic, Zipf, read_traffic
from kvloom.bench.schedule.costs import Costs, LoadCost, PrefillCost
from kvloom.bench.schedule.jobs import Job
from kvloom.bench.schedule.queues import schedule
from kvloom.testing import make_key

CHUNK = 32
SHAPE = "layers=2,kv_heads=1,head_dim=16,params=1e6"


def setup_of(*tiers: TierPlan) -> Setup:
    shape, assume = read_shape(SHAPE), Assumptions(step_s=0.0, question_tokens=8)
    machine = gpu_machine(shape, gpu_by_name("flops=1e9,hbm=1e9,memory=1e8,link=1e8"), assume)
    return Setup(shape, machine, tiers, measured_forms(shape, ["raw"], CHUNK), assume)


def tier(name: str, blocks: int, setup: Setup | None = None, block_chunks: int = 1) -> TierPlan:
    form = (setup or setup_of()).forms["raw"]
    return TierPlan(name, blocks * form.bytes_in(name, block_chunks), 1e6 if name != "host" else float("inf"), 0.0)


def zipf(**options: float) -> Traffic:
    fields = {"documents": 200, "alpha": 0.8, "tokens": 2 * CHUNK, "per_request": 3, "question": 8, "output": 4}
    found = Zipf(**(fields | {"requests": 300, "rate": 2.0, "seed": 1} | options))  # type: ignore[arg-type]
    return Traffic("zipf", found.draw(), found.tokens, False)


def test_zipf_is_what_it_says() -> None:
    traffic = zipf(requests=4000, alpha=1.0, per_request=1)
    counts: dict[bytes, int] = {}
    for request in traffic.requests:
        (key,) = request.keys
        counts[key] = counts.get(key, 0) + 1
    ordered = sorted(counts.values(), reverse=True)
    harmonic = sum(1 / i for i in range(1, 201))
    assert ordered[0] / 4000 == pytest.approx(1 / harmonic, rel=0.1)
    assert sum(ordered[:20]) / 4000 == pytest.approx(sum(1 / i for i in range(1, 21)) / harmonic, rel=0.05)
    assert traffic.duration_s == pytest.approx(2000, rel=0.1)
    assert all(len(set(request.keys)) == 3 for request in zipf().requests)
    assert (
        [r.keys for r in zipf().requests]
        == [r.keys for r in zipf().requests]
        != [r.keys for r in zipf(seed=2).requests]
    )


def test_a_document_is_found_in_any_order_a_prefix_is_not() -> None:
    a, b = make_key(1), make_key(2)
    requests = [TimedRequest(0.0, [a, b], 100, 1), TimedRequest(1.0, [b, a], 100, 1)]
    traffic = Traffic("two", requests, CHUNK, False)
    assert replay_tiers([r.keys for r in traffic.requests], [4], "lru", is_chained=False) == [(0,), (2,)]
    assert replay_tiers([r.keys for r in traffic.as_prefixes().requests], [4], "lru") == [(0,), (0,)]
    same = Traffic("same", [requests[0], requests[0]], CHUNK, False).as_prefixes()
    assert replay_tiers([r.keys for r in same.requests], [4], "lru") == [(0,), (2,)]


def test_hits_come_from_the_fastest_tier_that_has_them() -> None:
    """The first tier holds the two blocks used last; all others are found below, and come up."""
    keys = [[make_key(i)] for i in (1, 2, 3, 3, 1, 1)]
    assert replay_tiers(keys, [2, 9], "lru") == [(0, 0), (0, 0), (0, 0), (1, 0), (0, 1), (1, 0)]
    with_one = replay_tiers(keys, [9], "lru")
    assert [sum(found) for found in replay_tiers(keys, [2, 9], "lru")] == [found for (found,) in with_one]


@pytest.mark.parametrize("policy", ["default", "lru", "s3-fifo"])
def test_hits_are_those_of_the_simulator(policy: str) -> None:
    traffic, base = zipf(), setup_of()
    for blocks in (10, 100):
        predictor = Predictor(setup_of(tier("host", blocks, base, 2)), traffic, policy=policy)
        way = Way(("host",))
        assert predictor.capacities(way) == (blocks,)
        keys = [request.keys for request in traffic.as_prefixes().requests]
        hits = replay(keys, blocks * 1000, 1000, policy)
        outcome = predictor.outcome(way)
        assert 0 < hits == round(outcome.hit_ratio * traffic.blocks) and outcome.hits == {"host": outcome.hit_ratio}


def test_an_outcome_adds_up() -> None:
    traffic, base = zipf(rate=0.05), setup_of()
    setup = setup_of(tier("host", 20, base, 2), tier("disk", 1000, base, 2))
    predictor = Predictor(setup, traffic, engines=1)
    none, both = predictor.outcome(Way()), predictor.outcome(Way(("host", "disk"), reuse=FUSION))
    assert none.hit_ratio == 0.0 and none.loading == 0.0 and none.busy.keys() == {"computing"}
    prefill_s = setup.machine.prefill.seconds(3 * 2 * CHUNK + 8)
    assert none.ttft_s[0] > none.alone_s - 1e-9 and none.alone_s == pytest.approx(prefill_s)
    assert none.busy["computing"] == pytest.approx(300 * prefill_s / traffic.duration_s)
    assert both.hit_ratio == pytest.approx(1 - len({k for r in traffic.requests for k in r.keys}) / traffic.blocks)
    assert both.hits["host"] > 0 < both.hits["disk"]
    found = both.read_bytes_s["disk"][0] * traffic.duration_s
    assert found == pytest.approx(both.hits["disk"] * traffic.blocks * setup.forms["raw"].bytes_in("disk", 2))
    assert both.read_bytes_s["disk"][1] >= both.read_bytes_s["disk"][0]
    assert both.alone_s < none.alone_s and both.bottleneck == max(both.busy, key=lambda name: both.busy[name])
    prices = {"gpu": 2.0, "disk": 1e3}
    assert both.hourly_cost(prices, setup.tiers, 2) == pytest.approx(4.0 + 1e3 * setup.tiers[1].capacity_bytes / 1e9)
    assert none.hourly_cost(prices, setup.tiers, 2) == 4.0


def test_as_many_engines_as_the_work_needs() -> None:
    setup, traffic = setup_of(tier("host", 10)), zipf(rate=10.0)
    work_s = setup.machine.prefill.seconds(3 * 2 * CHUNK + 8)
    outcome = Predictor(setup, traffic).outcome(Way())
    assert outcome.engines == -(-300 * work_s // (0.8 * traffic.duration_s)) > 1


def test_as_many_engines_as_the_loads_of_fusions_need() -> None:
    costs = Costs(PrefillCost(0.0, 1e-3, 0.0), CHUNK, 1, {"disk": LoadCost(read_s=1.0)}, lanes=2)
    prefix, fusion = ([Job(0.0, 4 * CHUNK + 8, {"disk": 4}, ratio)] * 1000 for ratio in (0.0, 0.25))
    assert engines_needed(prefix, costs, 15.0, 0.8) == 1  # computes 8 tokens each: 8 s
    assert engines_needed(fusion, costs, 1010.0, 0.5) == 4  # loads 4 s each, two at once
    assert engines_needed(fusion, costs, 1e6, 0.5) == 1
    dear = replace(costs, prefill=PrefillCost(0.0, 1.0, 0.0))
    assert engines_needed(fusion, dear, 1010.0, 1.0) == 40  # computes 8 tokens and a quarter of 128 each


def test_ways_are_all_choices() -> None:
    setup, traffic = setup_of(tier("host", 1), tier("disk", 1)), zipf()
    found = list(ways(setup, traffic))
    assert found[0] == Way() and len(found) == 1 + 3 * 2
    assert {way.reuse for way in ways(setup, traffic.as_prefixes())} == {PREFIX}


def test_the_last_token_is_always_computed() -> None:
    request = TimedRequest(0.0, [], 4 * CHUNK, 1)
    job = job_of(request, {"host": 1, "disk": 9}, 2, CHUNK)
    assert job == Job(0.0, 4 * CHUNK, {"host": 2, "disk": 1})
    costs = setup_of(tier("host", 1), tier("disk", 1)).costs("raw")
    (served,) = schedule([job], costs, "always")
    assert served.job.leading(served.chunks) == {"host": 2, "disk": 1}


def lru_hits(keys: Sequence[object], capacity: int) -> int:
    held: OrderedDict[object, None] = OrderedDict()
    hits = 0
    for key in keys:
        hits += key in held
        held[key] = None
        held.move_to_end(key)
        if len(held) > capacity:
            held.popitem(last=False)
    return hits


@pytest.mark.parametrize(("alpha", "capacity"), [(0.6, 300), (1.0, 100), (1.2, 30)])
def test_large_pools_follow_the_formula(alpha: float, capacity: int) -> None:
    traffic = zipf(documents=2000, alpha=alpha, per_request=1, requests=40_000)
    keys = [request.keys[0] for request in traffic.requests]
    warm = lru_hits(keys, capacity) - lru_hits(keys[:10_000], capacity)
    assert lru_hit_ratio(2000, alpha, capacity) == pytest.approx(warm / 30_000, abs=0.02)


def test_bands_of_ranks_change_nothing() -> None:
    """A hundred thousand chunks in bands beside each for itself."""
    import kvloom.bench.plan.scale as scale

    banded = lru_hit_ratio(100_000, 0.9, 5000)
    scale._EXACT_RANKS, before = 100_000, scale._EXACT_RANKS  # type: ignore[misc]
    try:
        assert lru_hit_ratio(100_000, 0.9, 5000) == pytest.approx(banded, abs=1e-4)
    finally:
        scale._EXACT_RANKS = before  # type: ignore[misc]
    assert lru_hit_ratio(100, 1.0, 100) == 1.0 and lru_hit_ratio(100, 1.0, 0) == 0.0


def test_a_catalog_takes_bytes() -> None:
    assert 100 < catalog_bytes(5000) < 3000


def test_parts_of_a_pool_by_hand() -> None:
    setup = setup_of(tier("host", 100), tier("disk", 1000))
    pool = Pool(nodes=10, chunks=10_000, alpha=0.0, rate=2.0, tokens=8 * CHUNK, network=1e9)
    hit_ratio, parts = parts_of(setup, pool, "raw", 500.0)
    found = {name: (need, have) for name, need, have, _ in parts}
    assert hit_ratio == pytest.approx(1.0)  # the disks of all hold everything
    form = setup.forms["raw"]
    host = lru_hit_ratio(10_000, 0.0, 1000)
    assert found["reading from disk"][0] == pytest.approx(16 * (1 - host) * form.disk_bytes)
    assert found["network"] == (pytest.approx(16 * 0.9 * form.disk_bytes), 1e9)
    assert found["host to engine"][0] == pytest.approx(16 * form.raw_bytes)
    assert found["catalog of what it holds"][0] == 1000 * 500.0
    assert found["computing"][0] == pytest.approx(2 * setup.machine.prefill.seconds(8, 8 * CHUNK - 8))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.jsonl", "there is no trace missing.jsonl"),
        ("zipf:documents=0", "documents of the traffic is 0"),
        ("zipf:documents=3,per_request=4", "per_request of the traffic is 4; there are 3 documents"),
        ("zipf:rate=0", "expected rate above 0"),
        ("zipf:tokens=1.5", "tokens of the traffic is 1.5; expected a whole number"),
        ("zipf:size=3", "zipf: has 'size=3'; expected documents"),
        ("zipf:documents=1e9", "expected at most 10,000,000"),
    ],
)
def test_no_traffic(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"expected|there are") as refused:
        read_traffic(text)
    assert message in str(refused.value)


def test_pools_are_read() -> None:
    assert Pool.read("nodes=10,chunks=1e6") == Pool(nodes=10, chunks=1e6)
    for text, message in (
        ("nodes=1.5", "nodes of --pool is 1.5"),
        ("rate=0", "rate of --pool is 0"),
        ("x=1", "has 'x=1'"),
    ):
        with pytest.raises(ValueError, match=message):
            Pool.read(text)


def test_a_trace_keeps_its_times(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    fields = {"input_length": 700, "output_length": 3}
    lines = [json.dumps({"timestamp": at, "hash_ids": ids} | fields) for at, ids in ((2500, [1, 2]), (500, [1]))]
    trace.write_text("\n".join(lines))
    traffic = read_traffic(str(trace))
    assert [request.arrival_s for request in traffic.requests] == [0.5, 2.5] and traffic.duration_s == 2.0
    assert traffic.requests[1].input_tokens == 700 and traffic.is_chained and traffic.block_tokens == 512
