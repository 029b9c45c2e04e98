"""Generated worlds: what is held out stays held out, and every answer can be derived from the text."""

import random
import re

import pytest

from kvloom.bench.reference.worlds import ANSWER, STATEMENT, WorldSampler
from kvloom.evaluation.passages import load_heldout, load_questions, sentences
from kvloom.evaluation.statements import PLAIN_NAMES, draw_names, is_held_out
from kvloom.evaluation.tasks import Task, TaskSampler

FILLER = [f"Sentence {word} says nothing at all about anyone." for word in ("one", "two", "three", "four", "five")]
KINDS = TaskSampler.KINDS
NAME = r"[A-Z]\w+(?: [A-Z]\w+)?"


def count_tokens(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def tasks() -> dict[str, list[Task]]:
    sampler, rng = TaskSampler(FILLER, count_tokens), random.Random(3)
    return {kind: [sampler.sample(rng, kind, context_tokens=400) for _ in range(40)] for kind in KINDS}


def asked(task: Task) -> tuple[str, str]:
    match = re.fullmatch(rf"\nQ: What is the (\w+) of ({NAME})\?\nA:", task.question)
    assert match is not None
    return match[1], match[2]


def statements(task: Task, pattern: str) -> list[tuple[int, re.Match[str]]]:
    """(document, match) in reading order."""
    return [(i, match) for i, text in enumerate(task.documents) for match in re.finditer(pattern, text)]


def test_no_training_sequence_holds_a_held_out_name() -> None:
    sampler, rng = WorldSampler(FILLER, count_tokens), random.Random(0)
    names: set[str] = set()
    for _ in range(200):
        text = "".join(part for part, _ in sampler.sample(rng, 200))
        names |= set(re.findall(rf"(?<=of ){NAME}|(?<=consider ){NAME}|{NAME}(?= is the alias)", text))
    assert len(names) > 300
    assert len(names.intersection(PLAIN_NAMES)) > 30
    assert not any(map(is_held_out, names))
    assert names.isdisjoint(draw_names(random.Random(1), 1000, held_out=True))


def test_every_training_answer_is_stated_before() -> None:
    sampler, rng = WorldSampler(FILLER, count_tokens), random.Random(5)
    answers = 0
    for _ in range(60):
        said = ""
        for text, kind in sampler.sample(rng, 250):
            if kind in ANSWER.values():
                assert text in said
                answers += 1
            said += text
    assert answers > 300


def test_training_is_decided_by_the_seed() -> None:
    sampler = WorldSampler(FILLER, count_tokens)
    one, again, other = (sampler.sample(random.Random(seed), 200) for seed in (1, 1, 2))
    assert one == again != other
    kinds = {kind for _, kind in one}
    assert STATEMENT in kinds
    assert not kinds.isdisjoint(ANSWER.values())


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_use_held_out_names_and_keep_to_their_budget(tasks: dict[str, list[Task]], kind: str) -> None:
    for task in tasks[kind]:
        names = {m[1] for _, m in statements(task, rf"(?:of|consider) ({NAME})")}
        assert asked(task)[1] in names
        assert all(is_held_out(name) for name in names)
        assert len(task.documents) == 8
        assert 240 < sum(count_tokens(text) for text in task.documents) <= 400


@pytest.mark.parametrize(("kind", "facts"), [("needle", 1), ("needle8", 8)])
def test_needles_state_the_answer_once(tasks: dict[str, list[Task]], kind: str, facts: int) -> None:
    for task in tasks[kind]:
        attribute, name = asked(task)
        found = {m[1]: m[2] for _, m in statements(task, rf"The {attribute} of ({NAME}) is (\d+)\.")}
        assert len(found) == facts
        assert found[name] == task.answer


def test_records_name_the_entity_one_document_before_its_attribute(tasks: dict[str, list[Task]]) -> None:
    places = set()
    for task in tasks["record"]:
        attribute, name = asked(task)
        current, values = None, {}
        for document, match in statements(task, rf"Now consider ({NAME})\.|Its {attribute} is (\d+)\."):
            if match[1]:
                current = (match[1], document)
            elif current is not None:
                values[current[0]] = (match[2], document - current[1])
        answer, distance = values[name]
        assert answer == task.answer
        assert distance == 1
        assert len(values) == 7
        places.add(next(i for i, text in enumerate(task.documents) if f"consider {name}" in text))
    assert len(places) > 3


def test_aliases_take_two_documents(tasks: dict[str, list[Task]]) -> None:
    for task in tasks["alias"]:
        attribute, name = asked(task)
        assert not statements(task, rf"The {attribute} of {name} is")
        ((first, hop),) = statements(task, rf"({NAME}) is the alias of {name}\.")
        ((second, fact),) = statements(task, rf"The {attribute} of {hop[1]} is (\d+)\.")
        assert first < 4 <= second
        assert fact[1] == task.answer


def test_tasks_are_decided_by_the_seed_and_refuse_bad_arguments() -> None:
    sampler = TaskSampler(FILLER, count_tokens)
    one, again, other = (sampler.sample(random.Random(s), "record", context_tokens=300) for s in (1, 1, 2))
    assert one == again != other
    with pytest.raises(ValueError, match="kind is 'needles'"):
        sampler.sample(random.Random(0), "needles", context_tokens=300)
    with pytest.raises(ValueError, match="num_documents is 1"):
        sampler.sample(random.Random(0), "record", context_tokens=300, num_documents=1)
    with pytest.raises(ValueError, match="5000 names are wanted"):
        draw_names(random.Random(0), 5000, held_out=True)
    with pytest.raises(ValueError, match="sentences is empty"):
        TaskSampler([], count_tokens)


def test_packaged_passages_are_the_published_ones() -> None:
    questions = load_questions()
    assert len(questions) == 100
    assert all(len(q.passages) == 10 and q.answers for q in questions)
    assert questions[0].question == "Where was the author of Hannibal and Scipio educated at?"
    assert questions[0].answers == ("Exeter College",)
    assert 190_000 < sum(map(len, load_heldout())) < 200_000


def test_sentences_are_whole_and_plain() -> None:
    cut = "ends here at last. the quick brown fox of dr. smith jumped ( twice ) over 1, 500 fences. short one. he said"
    assert sentences([cut, cut]) == ["the quick brown fox of dr. smith jumped (twice) over 1,500 fences."]
    natural = sentences(passage for question in load_questions() for passage in question.passages)
    assert len(natural) == len(set(natural)) > 2000
    assert all(s.isascii() and 40 <= len(s) <= 240 and s[-1] in ".!?" for s in natural)
    assert not any("is the alias of" in s or "now consider" in s.lower() for s in natural)
