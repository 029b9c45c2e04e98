"""RULER's tasks: as many keys, values, hops and repetitions as its definitions say, and answers that the text gives."""

import random
import re
from collections import Counter

import pytest

from kvloom.bench.retrieval.ruler import (
    AGGREGATION,
    COMMON_TIMES,
    COMMON_WORDS,
    CONTINUED_WORDS,
    FILLER,
    HOPS,
    KEYS,
    KINDS,
    OTHER_TIMES,
    RULER_NAMES,
    RulerSampler,
    Task,
)
from kvloom.evaluation.statements import FOUR_DIGITS, is_held_out

SENTENCES = [f"Sentence {word} says nothing at all about anyone." for word in ("one", "two", "three", "four", "five")]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in "bdfgklmnpr"]
NAME = r"[A-Z]\w+ [A-Z]\w+"
FACT = rf" The (\w+) of ({NAME}) is (\w+)\."
TOKENS = 900


def count_tokens(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    sampler, rng = RulerSampler(SENTENCES, WORDS, count_tokens), random.Random(5)
    return {kind: [sampler.sample(rng, kind, context_tokens=TOKENS) for _ in range(12)] for kind in KINDS}


def asked_of(question: str) -> tuple[str, str]:
    match = re.fullmatch(rf"\nQ: What is the (\w+) of ({NAME})\?\nA:", question)
    assert match is not None
    return match[1], match[2]


@pytest.mark.parametrize("kind", KINDS)
def test_contexts_are_full_and_no_longer_than_asked(tasks: dict[str, list[Task]], kind: str) -> None:
    for task in tasks[kind]:
        assert task.kind == kind
        assert 0.95 * TOKENS <= count_tokens(task.context) <= TOKENS
    assert len({task.context for task in tasks[kind]}) == 12
    assert kind in RULER_NAMES


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in AGGREGATION])
def test_names_were_held_out_and_answers_have_the_models_form(tasks: dict[str, list[Task]], kind: str) -> None:
    for task in tasks[kind]:
        assert task.asked and not task.continuation
        for question, answer in task.asked:
            assert is_held_out(asked_of(question)[1])
            assert re.fullmatch(r" \w+\.", answer)


@pytest.mark.parametrize(
    ("kind", "stated", "asked"),
    [("single_filler", 1, 1), ("single_text", 1, 1), ("multi_key", KEYS, 1), ("multi_query", KEYS, KEYS)],
)
def test_needles(tasks: dict[str, list[Task]], kind: str, stated: int, asked: int) -> None:
    for task in tasks[kind]:
        facts = {(a, name): value for a, name, value in re.findall(FACT, task.context)}
        assert len(facts) == stated and len({a for a, _ in facts}) == 1
        assert len(task.asked) == len({question for question, _ in task.asked}) == asked
        for question, answer in task.asked:
            assert answer == f" {facts[asked_of(question)]}."
        body = re.sub(FACT, "", task.context)
        text = FILLER if kind == "single_filler" else SENTENCES
        assert set(re.findall(r"[^ ][^.]*\.", body)) <= set(text)


def test_needles_lie_anywhere(tasks: dict[str, list[Task]]) -> None:
    depths = [task.context.index(" The ") / len(task.context) for task in tasks["single_text"]]
    assert min(depths) < 0.4 < 0.6 < max(depths)


def test_nothing_but_needles(tasks: dict[str, list[Task]]) -> None:
    for task in tasks["only_needles"]:
        facts = re.findall(FACT, task.context)
        assert len(facts) > 90 and re.sub(FACT, "", task.context) == "\n"
        ((question, answer),) = task.asked
        assert [value for *of, value in facts if tuple(of) == asked_of(question)] == [answer[1:-1]]


def test_values_of_one_key_are_attributes_of_several_sorts(tasks: dict[str, list[Task]]) -> None:
    for task in tasks["multi_value"]:
        facts = re.findall(FACT, task.context)
        assert len({name for _, name, _ in facts}) == 1
        assert len({a for a, *_ in facts}) == 4 and len({a for a, *_ in facts} & set(FOUR_DIGITS)) == 1
        assert {(*asked_of(q), answer[1:-1]) for q, answer in task.asked} == set(facts)


def test_records_bind_over_text(tasks: dict[str, list[Task]]) -> None:
    for task in tasks["records"]:
        current, known = "", {}
        for name, attribute, value in re.findall(rf" Now consider ({NAME})\.| Its (\w+) is (\w+)\.", task.context):
            current = name or current
            if attribute:
                known[attribute, current] = value
        assert len(known) == len(task.asked) == 4
        assert all(answer == f" {known[asked_of(question)]}." for question, answer in task.asked)


@pytest.mark.parametrize(("kind", "chains", "hops"), [("aliases", 4, 1), ("alias_chain", 1, HOPS)])
def test_aliases_lead_to_the_answer(tasks: dict[str, list[Task]], kind: str, chains: int, hops: int) -> None:
    for task in tasks[kind]:
        new_of = {old: new for new, old in re.findall(rf" ({NAME}) is the alias of ({NAME})\.", task.context)}
        facts = {(a, name): value for a, name, value in re.findall(FACT, task.context)}
        assert len(new_of) == chains * hops and len(facts) == chains
        found = []
        for question, answer in task.asked:
            attribute, name = asked_of(question)
            steps = 0
            while name in new_of:
                name, steps = new_of[name], steps + 1
            assert answer == f" {facts[attribute, name]}."
            found.append(steps)
        assert sorted(found) == (list(range(HOPS + 1)) if kind == "alias_chain" else [1] * 4)


def test_common_words_come_ten_times_as_often(tasks: dict[str, list[Task]]) -> None:
    for task in tasks["common_words"]:
        counts = Counter((task.context + task.continuation).split()).most_common()
        common = [n for _, n in counts[:COMMON_WORDS]]
        assert sum(common) == COMMON_TIMES * COMMON_WORDS and common[0] == COMMON_TIMES
        assert 2 < sum(n for _, n in counts[COMMON_WORDS:]) / len(counts[COMMON_WORDS:]) <= OTHER_TIMES
        assert len(task.continuation.split()) == CONTINUED_WORDS and not task.asked


def test_frequent_words_follow_zipf(tasks: dict[str, list[Task]]) -> None:
    shares = []
    for task in tasks["frequent_words"]:
        counts = Counter(task.context.split()).most_common()
        shares.append([n / TOKENS for _, n in counts[:3]])
        assert len(task.continuation.split()) == CONTINUED_WORDS
    first, second, third = (sum(column) / len(column) for column in zip(*shares, strict=True))
    assert 0.56 < first < 0.66 and 3 < first / second < 5 and 6 < first / third < 12


def test_a_short_list_is_half_common_words() -> None:
    sampler = RulerSampler(SENTENCES, WORDS, count_tokens)
    task = sampler.sample(random.Random(0), "common_words", context_tokens=192)
    counts = Counter((task.context + task.continuation).split())
    assert [n for _, n in counts.most_common(COMMON_WORDS)] == [10] * COMMON_WORDS


def test_equal_seeds_give_equal_tasks() -> None:
    sampler = RulerSampler(SENTENCES, WORDS, count_tokens)
    for kind in KINDS:
        twins = [sampler.sample(random.Random(kind), kind, context_tokens=300) for _ in range(2)]
        assert twins[0] == twins[1]


def test_what_cannot_be_made_is_refused() -> None:
    sampler = RulerSampler(SENTENCES, WORDS, count_tokens)
    with pytest.raises(ValueError, match="kind is 'haystack'"):
        sampler.sample(random.Random(0), "haystack", context_tokens=100)
    for kind in ("multi_query", "only_needles"):
        with pytest.raises(ValueError, match="into 4 tokens"):
            sampler.sample(random.Random(0), kind, context_tokens=4)
    with pytest.raises(ValueError, match="0 sentences"):
        RulerSampler([], WORDS, count_tokens)
