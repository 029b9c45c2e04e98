"""Traffic of several kinds: what is published of it holds for what is drawn; and replays of it are those of a store."""

import itertools
import random
from collections import Counter

import pytest

from kvloom.bench.eviction.families import CHOSEN_ON, FAMILIES, HELD_OUT, Cost, Trace, _Draw, make_trace
from kvloom.bench.eviction.policies import SIMULATED_POLICIES
from kvloom.bench.eviction.replay import belady_hits, matched_by, replay


def timed(family: str, seed: int) -> list[tuple[float, tuple]]:
    made = FAMILIES[family](_Draw(random.Random(f"{family} {seed}")))
    return sorted((at_s, tuple(labels)) for at_s, labels in made if at_s >= 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_are_chains_with_costs_and_follow_their_seeds(family: str) -> None:
    trace, same, other = (make_trace(family, seed, most_references=4000) for seed in (0, 0, 1))
    assert trace == same and trace.chains != other.chains
    assert 3000 < trace.references <= 4000 and trace.references == sum(len(chain) for chain in trace.chains)
    before: dict[bytes, bytes | None] = {}
    for chain in trace.chains:
        assert chain and len(set(chain)) == len(chain)
        for after, key in zip([None, *chain], chain, strict=False):
            assert before.setdefault(key, after) == after  # a key stands for all that is before it
    assert before.keys() == trace.costs.keys()
    assert trace.footprint_bytes == sum(cost.nbytes for cost in trace.costs.values())
    sizes = sorted(cost.nbytes for cost in trace.costs.values())
    assert 0.9 * (32 << 20) < sizes[0] < sizes[len(sizes) // 2] < sizes[-1] < 1.1 * (32 << 20)


def test_later_chunks_cost_more() -> None:
    trace = make_trace("agents", 0, most_references=20_000)
    by_place: dict[int, list[float]] = {}
    for chain in trace.chains:
        for place, key in enumerate(chain):
            by_place.setdefault(place // 32, []).append(trace.costs[key].recompute_s)
    means = [sum(found) / len(found) for found in by_place.values()]
    assert means == sorted(means) and means[2] > 1.3 * means[0] > 1.3 * 0.032


def test_families_are_told_apart() -> None:
    assert not CHOSEN_ON.keys() & HELD_OUT.keys() and [*CHOSEN_ON, *HELD_OUT] == [*FAMILIES]
    with pytest.raises(ValueError, match="family is 'chats'; expected one of chat, rag, agents"):
        make_trace("chats", 0)


def gaps_s(requests: list[tuple[float, tuple]]) -> list[float]:
    """Between two requests for the same conversation, document or task."""
    last: dict[object, float] = {}
    found = []
    for at_s, labels in requests:
        for label in {label[:2] for label in labels}:
            if label[0] in {"chat", "document", "task"}:
                if label in last:
                    found.append(at_s - last[label])
                last[label] = at_s
    return found


def test_chat_returns_as_published() -> None:
    """80 % of the returns come within ten minutes; those that are long enough to fill a chunk go on more often."""
    within, turns = [], Counter()
    for seed in range(4):
        requests = timed("chat", seed)
        within += [gap_s < 610 for gap_s in gaps_s(requests)]
        turns += Counter((seed, label[1]) for _, labels in requests for label in labels[-1:] if label[0] == "chat")
    assert 0.75 < sum(within) / len(within) < 0.92
    assert 0.73 < sum(n > 1 for n in turns.values()) / len(turns) < 0.95


def test_few_documents_serve_most_of_the_questions() -> None:
    """3 % serve 60 %, for an exponent of 1."""
    for seed in range(4):
        asked = Counter(
            label[1] for _, labels in timed("rag", seed) for label in labels if label[0] == "document" and label[2] == 0
        )
        top = sum(n for _, n in asked.most_common(150)) / asked.total()  # of 3,000 to 8,000
        assert 0.15 < top < 0.8, seed


def test_agents_call_tools_again_and_again() -> None:
    steps = Counter(label[1] for _, labels in timed("agents", 0) for label in labels if label[::2] == ("task", 0))
    lengths = [len(labels) for _, labels in timed("agents", 0)]
    assert sum(lengths) / len(lengths) > 20 and 5 < steps.total() / len(steps) < 21
    waits_s = sorted(gaps_s(timed("agents", 0)))
    assert 4 < waits_s[len(waits_s) // 2] < 15 and waits_s[-1] > 60


def test_documents_get_several_questions() -> None:
    asked = Counter((seed, labels[0][1]) for seed in range(3) for _, labels in timed("questions", seed))
    assert 3 < asked.total() / len(asked) < 14


def test_inputs_of_templates_never_return() -> None:
    requests = timed("templates", 0)
    inputs = Counter(label for _, labels in requests for label in labels if label[0] == "input")
    shared = Counter(label for _, labels in requests for label in labels if label[0] != "input")
    assert set(inputs.values()) == {1} and shared.total() > 4 * len(shared)


def test_scans_pass_once_beside_tasks_that_return() -> None:
    requests = timed("scans", 0)
    documents = Counter(labels[0][1] for _, labels in requests if labels[0][0] == "document")
    tasks = Counter(labels[0][1] for _, labels in requests if labels[0][0] == "task")
    assert sum(n == 1 for n in documents.values()) > len(documents) / 4
    assert tasks.most_common(1)[0][1] > 20


@pytest.mark.parametrize("policy", SIMULATED_POLICIES)
@pytest.mark.parametrize("family", ["chat", "rag"])
def test_a_policy_alone_finds_what_a_store_with_it_finds(policy: str, family: str) -> None:
    drawn = make_trace(family, 0, most_references=2500)
    trace = Trace(drawn.chains, dict.fromkeys(drawn.costs, Cost(1000, None)))  # the store is not told of costs here
    for capacity in (20, 150):
        capacity_bytes = 1000 * capacity + 500
        found = matched_by(SIMULATED_POLICIES[policy](), trace, capacity_bytes)
        assert (
            0 < sum(found) == replay(trace.chains, capacity_bytes, 1000, policy) <= belady_hits(trace.chains, capacity)
        )


def test_chunks_too_large_for_the_tier_end_a_chain() -> None:
    drawn = make_trace("rag", 0, most_references=300)
    sizes = itertools.cycle((10, 10, 1000))
    trace = Trace(drawn.chains, {key: Cost(next(sizes), 1.0) for key in drawn.costs})
    found = matched_by(SIMULATED_POLICIES["lru"](), trace, 500)
    assert sum(found) and not any(
        trace.costs[key].nbytes == 1000 for n, keys in zip(found, trace.chains, strict=True) for key in keys[:n]
    )
