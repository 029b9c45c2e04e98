"""Queues with known answers: by hand, and by the formula for one server with random arrivals and equal work."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from kvloom.bench.schedule.costs import Costs, LoadCost, PrefillCost, pairs
from kvloom.bench.schedule.jobs import Job
from kvloom.bench.schedule.queues import schedule
from kvloom.connectors.serving.messages import LOADERS

CHUNK = 256
TOKEN_S = PrefillCost(0.0, 0.001, 0.0)  # a millisecond a token
SLOW, FAST = LoadCost(read_s=0.5), LoadCost(read_s=0.01)


def costs(
    load: LoadCost = FAST, *, prefill: PrefillCost = TOKEN_S, call_s: float = 0.0, lanes: float = 4, step: int = 2048
) -> Costs:
    return Costs(prefill, CHUNK, 1 << 20, {"disk": load}, call_s, lanes, step_tokens=step)


def ttfts(jobs: Sequence[Job], found: Costs, policy: str, **options: int) -> list[float]:
    return [each.ttft_s for each in schedule(jobs, found, policy, **options)]  # type: ignore[arg-type]


def test_prompts_that_fit_into_a_step_are_computed_together() -> None:
    jobs = [Job(0.0, 1000), Job(0.5, 1000), Job(0.6, 500), Job(5.0, 2000)]
    assert ttfts(jobs, costs(), "never") == pytest.approx([1.0, 2.0, 1.9, 2.0])
    assert ttfts(jobs, costs(step=1000), "never") == pytest.approx([1.0, 1.5, 1.9, 2.0])
    assert ttfts(jobs, costs(), "never", engines=2) == pytest.approx([1.0, 1.0, 0.9, 2.0])


def test_a_long_prompt_is_computed_in_pieces() -> None:
    """The second fills up the step in which the first one ends."""
    prefill = PrefillCost(fixed_s=0.5, token_s=0.001, pair_s=0.0, behind_s=0.0001)
    jobs = [Job(0.0, 2500), Job(0.1, 800)]
    first_s, second_s = 1.5, 1.5 + 0.1
    third_s = 0.5 + 0.5 + 0.2 + 0.5  # 500 behind 2000, and 500 of the other
    fourth_s = 0.5 + 0.3 + 0.05
    ends = [first_s + second_s + third_s, first_s + second_s + third_s + fourth_s - 0.1]
    assert ttfts(jobs, costs(prefill=prefill, step=1000), "never") == pytest.approx(ends)


def test_answers_go_on_beside_prompts() -> None:
    """The first one's second token waits for the step that computes the other prompt, and makes it longer."""
    prefill = PrefillCost(fixed_s=0.1, token_s=0.001, pair_s=0.0, behind_s=0.001)
    jobs = [Job(0.0, 100, output_tokens=4), Job(0.15, 500)]
    one, other = schedule(jobs, costs(prefill=prefill), "never")
    assert one.ttft_s == pytest.approx(0.2)
    mixed_s = 0.1 + 0.501 + 0.1
    assert other.ttft_s == pytest.approx(0.05 + mixed_s)
    assert one.done_s == pytest.approx(0.2 + mixed_s + (0.101 + 0.101) + (0.101 + 0.102))


@pytest.mark.parametrize("output", [1, 2, 3, 50, 2000])
def test_answers_alone_take_what_their_steps_take(output: int) -> None:
    prefill = PrefillCost(fixed_s=0.1, token_s=0.001, pair_s=1e-6, behind_s=0.001)
    (served,) = schedule([Job(0.0, 100, output_tokens=output)], costs(prefill=prefill), "never")
    steps = [prefill.seconds(1, 100 + i) for i in range(output - 1)]
    assert served.done_s == pytest.approx(prefill.seconds(100) + sum(steps))
    jobs = [Job(0.0, 100, output_tokens=output), Job(1.0, 50)]  # comes within a step of the answer
    _, other = schedule(jobs, costs(prefill=prefill), "never")
    spent_s = prefill.seconds(100)
    steps = [step for step in steps if (spent_s := spent_s + step) - step < 1.0]
    begun_s = max(1.0, prefill.seconds(100) + sum(steps))
    done = len(steps) + 1 < output
    pieces = [(1, 100 + len(steps)), (50, 0)] if done else [(50, 0)]
    assert other.first_token_s == pytest.approx(begun_s + prefill.step_s(pieces))


def test_no_more_requests_run_than_there_is_room_for() -> None:
    few = replace(costs(), most_running=1)
    assert ttfts([Job(0.0, 100)] * 2, few, "never") == pytest.approx([0.1, 0.2])
    small = replace(costs(), kv_tokens=250)
    assert ttfts([Job(0.0, 100)] * 3, small, "never") == pytest.approx([0.2, 0.2, 0.3])
    assert ttfts([Job(0.0, 1000)] * 2, small, "never") == pytest.approx([1.0, 2.0])  # more than there is, but alone


def test_always_loads_what_is_stored_and_computes_the_rest() -> None:
    found = costs(LoadCost(read_s=0.1, decode_s=0.2, copy_s=0.05), call_s=0.5)
    job = Job(2.0, 1024, {"disk": 3})
    (served,) = schedule([job], found, "always")
    assert served.chunks == 3 and served.loaded_s == pytest.approx(2.0 + 3 * 0.35 + 0.5)
    assert served.ttft_s == pytest.approx(3 * 0.35 + 0.5 + 0.256) and served.reason == "always"
    (served,) = schedule([job], found, "never")
    assert served.ttft_s == pytest.approx(1.024) and served.chunks == 0


def test_copies_overlap_reading() -> None:
    apart, overlapping = (LoadCost(0.1, 0.1, 0.3, overlaps=each) for each in (False, True))
    assert apart.seconds(4) == pytest.approx(2.0) and overlapping.seconds(4) == pytest.approx(0.2 + 4 * 0.3)
    assert overlapping.seconds(1) == pytest.approx(0.5) and overlapping.seconds(0) == 0.0


def test_other_prompts_are_computed_during_a_load() -> None:
    """The second comes later and is through sooner; the first, loaded meanwhile, waits for it."""
    jobs = [Job(0.0, 1024, {"disk": 2}), Job(0.1, 2000)]
    assert ttfts(jobs, costs(SLOW), "always") == pytest.approx([2.1 + 0.512, 2.0])


def test_loads_at_once_share_what_an_engine_can_do() -> None:
    jobs = [Job(0.0, CHUNK + 1, {"disk": 1})] * 3
    assert ttfts(jobs, costs(SLOW, lanes=1), "always") == pytest.approx([1.503] * 3)
    assert ttfts(jobs, costs(SLOW, lanes=3), "always") == pytest.approx([0.503] * 3)
    later = [jobs[0], Job(0.3, CHUNK + 1, {"disk": 1})]  # alone for 0.3 s, then at half the speed until 0.7 s
    assert ttfts(later, costs(SLOW, lanes=1), "always") == pytest.approx([0.701, 0.701])


def test_loads_beyond_the_threads_wait() -> None:
    jobs = [Job(0.0, CHUNK + 1, {"disk": 1})] * (LOADERS + 1)
    *first, last = ttfts(jobs, costs(SLOW), "always")
    assert first == pytest.approx([0.5 + 0.001 * LOADERS] * LOADERS) and last == pytest.approx(1.001)


def test_engines_share_the_speed_of_a_tier() -> None:
    shared = LoadCost(read_s=0.5, shared_s=0.4)
    jobs = [Job(0.0, CHUNK + 1, {"disk": 1})] * 3
    assert ttfts(jobs, costs(shared), "always", engines=3) == pytest.approx([1.201] * 3)
    assert ttfts(jobs, costs(SLOW), "always", engines=3) == pytest.approx([0.501] * 3)


def test_tiers_are_read_one_after_the_other() -> None:
    both = Costs(TOKEN_S, CHUNK, 1 << 20, {"host": LoadCost(0.1, start_s=0.05), "disk": SLOW})
    (served,) = schedule([Job(0.0, 1024, {"host": 2, "disk": 1})], both, "always")
    assert served.loaded_s == pytest.approx(0.25 + 0.5)


def test_a_fusion_computes_a_share_of_what_it_loads() -> None:
    (served,) = schedule([Job(0.0, 1024, {"disk": 3}, recompute_ratio=0.25)], costs(), "always")
    assert served.ttft_s == pytest.approx(0.03 + 0.256 + 0.25 * 0.768)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_waiting_is_that_of_one_server_with_equal_work(load: float) -> None:
    """M/D/1 (Pollaczek and Khinchine): a request waits `load / (2 (1 - load))` services on average."""
    draw, now = random.Random(1), 0.0
    jobs = []
    for _ in range(60_000):
        now += draw.expovariate(load)
        jobs.append(Job(now, 1000))
    found = ttfts(jobs, costs(step=1000), "never")
    assert sum(found) / len(found) == pytest.approx(1.0 + load / (2 * (1 - load)), rel=0.05)


def test_two_engines_share_the_work() -> None:
    """M/D/2 lies between half of what one engine of twice the speed lets wait, and all of it."""
    draw, now = random.Random(2), 0.0
    jobs = []
    for _ in range(30_000):
        now += draw.expovariate(1.6)
        jobs.append(Job(now, 1000))
    wait_s = sum(ttfts(jobs, costs(step=1000), "never", engines=2)) / len(jobs) - 1.0
    one_s = 0.8 / (2 * 0.2) / 2  # of an engine of twice the speed
    assert 0.5 * one_s < wait_s < 2 * one_s


def test_the_controller_is_no_worse_than_either_rule() -> None:
    """A tier that is slower than computing, one that is faster, and one that is faster until it is crowded."""
    draw = random.Random(3)
    jobs = []
    now = 0.0
    for _ in range(400):
        now += draw.expovariate(1.0)
        jobs.append(Job(now, 1024, {"disk": 3} if draw.random() < 0.7 else {}))
    for load in (LoadCost(0.4), LoadCost(0.01), LoadCost(0.1)):
        found = {
            policy: sum(ttfts(jobs, costs(load, lanes=1), policy, is_taught=True))
            for policy in ("always", "never", "controller")
        }
        assert found["controller"] <= 1.03 * min(found["always"], found["never"])
    assert found["controller"] < 0.9 * found["never"]


def test_a_controller_learns_what_nobody_has_told_it() -> None:
    """From the first request, and from chunks that are read beside it; computing is known after three prompts."""
    jobs = [Job(10.0 * i, 1024, {"disk": 3}) for i in range(30)]
    served = schedule(jobs, costs(SLOW), "controller")
    assert [(each.chunks, each.reason) for each in served[:3]] == [(3, "untried")] * 3
    assert [(each.chunks, each.reason) for each in served[3:]] == [(0, "slow tier")] * 27
    served = schedule(jobs, costs(FAST), "controller")
    assert [each.reason for each in served[3:]] == ["loads"] * 27


def test_whatever_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="policy is 'sometimes'; expected one of always"):
        schedule([], costs(), "sometimes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="engines is 0"):
        schedule([], costs(), "never", engines=0)
    with pytest.raises(ValueError, match="chunks are stored in tape; costs are of disk"):
        schedule([Job(0.0, 1000, {"tape": 1})], costs(), "never")
    with pytest.raises(ValueError, match="4 chunks of 256 are stored of a prompt of 1024 tokens"):
        schedule([Job(0.0, 1024, {"disk": 4})], costs(), "never")


@pytest.mark.parametrize(("new", "behind", "window"), [(5, 0, None), (5, 7, None), (5, 7, 3), (5, 1, 4), (3, 0, 8)])
def test_pairs_are_counted(new: int, behind: int, window: int | None) -> None:
    reach = window or new + behind
    assert pairs(new, behind, window) == sum(min(behind + i + 1, reach) for i in range(new))


def test_prefill_adds_up() -> None:
    cost = PrefillCost(fixed_s=1.0, token_s=0.5, pair_s=0.25, floor_s=4.0, behind_s=0.125)
    assert cost.seconds(0, 100) == 0.0
    assert cost.seconds(2, 8) == 1.0 + 8 * 0.125 + max(4.0, 1.0 + 0.25 * (16 + 3))
    assert cost.seconds(1, 0) == 1.0 + 4.0
    assert cost.step_s([(2, 8), (1, 2)]) == 1.0 + 10 * 0.125 + max(4.0, 1.5 + 0.25 * (16 + 3 + 3))
    assert cost.step_s([]) == 0.0 and cost.added_s(1, 8) == 0.5 + 8 * 0.125 + 0.25 * 9
    two = PrefillCost(0.0, 0.0, 1.0, windows=(None, 2))
    assert two.seconds(4) == (10 + 7) / 2
    assert cost.scattered_s(4, 10) == 1.0 + max(4.0, 4 * 0.5 + 0.25 * 4 * 5)
