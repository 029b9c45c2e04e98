"""Small worlds of stated facts, hidden in real text: what the reference model learns to retrieve and to bind from."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...evaluation.statements import ATTRIBUTES, alias, consider, draw_names, draw_value, fact, its, question

FILLER, STATEMENT = 0, 1  # what a segment of a training sequence is; the loss weighs them differently
ANSWER = {"fact": 2, "record": 3, "alias": 4, "about": 5, "link": 6, "copy": 7}  # answers, by what must be understood
FOCUS_SHARES = {"fact": 0.15, "record": 0.45, "mixed": 0.2}  # of the worlds; the others are mostly aliases
STATEMENT_SHARES = {  # in a world of each focus
    "fact": {"fact": 0.9, "record": 0.0, "alias": 0.0},
    "record": {"fact": 0.1, "record": 0.9, "alias": 0.0},
    "mixed": {"fact": 0.3, "record": 0.4, "alias": 0.3},
    "alias": {"fact": 0.1, "record": 0.0, "alias": 0.9},
}


@dataclass(slots=True)
class _World:
    """What has been said so far, and therefore may be asked."""

    rng: random.Random
    shares: dict[str, float]  # of the kinds of statement
    attributes: list[str]
    names: list[str]
    finish: float  # chance that the next statement is the other half of an alias begun before
    values: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # (attribute, name) -> value, kind
    links: list[tuple[str, str]] = field(default_factory=list)  # (new name, name), stated
    pending: list[tuple[str, str, str, str, bool]] = field(default_factory=list)  # half-stated aliases
    current: str | None = None  # the entity of a record
    owner: str | None = None  # whose value has just been stated, where that takes understanding

    def next_statement(self) -> str | None:
        """None where nothing new could be found to say."""
        rng, self.owner = self.rng, None
        if self.pending and rng.random() < self.finish:
            return self.finish_alias()
        kind = rng.choices(list(self.shares), list(self.shares.values()))[0]
        return self._record() if kind == "record" else self._fact_or_alias(kind)

    def _record(self) -> str | None:
        rng = self.rng
        unsaid = [a for a in self.attributes if (a, self.current) not in self.values]
        if self.current is None or not unsaid or rng.random() < 0.45:
            self.current = rng.choice([n for n in self.names if n != self.current])
            return consider(self.current)
        attribute = rng.choice(unsaid)
        value = draw_value(rng, attribute)
        self.values[attribute, self.current] = (value, "record")
        self.owner = self.current
        return its(attribute, value)

    def _fact_or_alias(self, kind: str) -> str | None:
        rng = self.rng
        attribute, name = rng.choice(self.attributes), rng.choice(self.names)
        if (attribute, name) in self.values:
            return None
        value = draw_value(rng, attribute)
        if kind == "fact":
            self.values[attribute, name] = (value, "fact")
            return fact(attribute, name, value)
        new_name = draw_names(rng, 1, held_out=False)[0]
        if new_name in self.names or any(name in pair or new_name in pair for pair in self.links):
            return None
        if any(name in half or new_name in half for half in self.pending):
            return None
        alias_first = rng.random() < 0.75
        self.pending.append((new_name, name, attribute, value, alias_first))
        return self._link(new_name, name) if alias_first else self._value(new_name, attribute, value)

    def _link(self, new_name: str, name: str) -> str:
        self.links.append((new_name, name))
        return alias(new_name, name)

    def _value(self, new_name: str, attribute: str, value: str) -> str:
        self.values[attribute, new_name] = (value, "fact")
        return fact(attribute, new_name, value)

    def finish_alias(self) -> str:
        new_name, name, attribute, value, alias_first = self.pending.pop(self.rng.randrange(len(self.pending)))
        self.values[attribute, name] = (value, "alias")
        if alias_first:
            self.owner = name
            return self._value(new_name, attribute, value)
        return self._link(new_name, name)


class WorldSampler:
    """Training sequences as (text, class) segments, the class one of FILLER, STATEMENT and the values of ANSWER.

    Parameters
    ----------
    sentences : natural sentences, each without leading space; drawn at random as filler.
    count_tokens : tokens in a text; a sequence stops growing when its budget is reached.
    """

    def __init__(self, sentences: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        self._sentences = sentences
        self._short_sentences = [s for s in sentences if len(s) < 90] or sentences
        self._count_tokens = count_tokens

    def _world(self, rng: random.Random, tokens: int, alias_share: float) -> _World:
        others = sum(FOCUS_SHARES.values())
        focus_shares = [*(share / others * (1 - alias_share) for share in FOCUS_SHARES.values()), alias_share]
        focus = rng.choices((*FOCUS_SHARES, "alias"), focus_shares)[0]
        return _World(
            rng,
            STATEMENT_SHARES[focus],
            rng.sample(ATTRIBUTES, rng.choice((1, 1, 1, 2, 3))),
            draw_names(rng, rng.randint(3, 6 + tokens // 100), held_out=False),
            finish=rng.choice((0.15, 0.4, 0.8)),
        )

    def sample(self, rng: random.Random, tokens: int, alias_share: float = 0.2) -> list[tuple[str, int]]:
        """One sequence of at least `tokens` tokens (the caller cuts); `alias_share` of them are mostly aliases."""
        world = self._world(rng, tokens, alias_share)
        question_ratio = rng.choice((0.2, 0.3, 0.4))
        # Mean number of sentences between two statements. Without gaps a model learns that an entity is always named
        # in the sentence just before.
        gap = rng.choice((0.0, 0.3, 1.0, 2.0) if tokens <= 256 else (0.3, 1.0, 3.0, 8.0, 16.0))
        filler = self._short_sentences if tokens <= 256 else self._sentences
        segments: list[tuple[str, int]] = []
        used = 0
        copy_source: str | None = None
        asked: set[tuple[str, str]] = set()

        def say(text: str, kind: int) -> None:
            nonlocal used
            segments.append((text, kind))
            used += self._count_tokens(text)

        def answer(text: str, kind: str) -> None:
            say(f" {text}", ANSWER[kind])
            say(".\n" if rng.random() < 0.5 else ".", FILLER)

        def ask() -> None:
            """Once each: the second time the answer could be copied from the first."""
            if unasked := [pair for pair in world.values if pair not in asked]:
                attribute, name = rng.choice(unasked)
                asked.add((attribute, name))
                value, kind = world.values[attribute, name]
                say(question(attribute, name), STATEMENT)
                answer(value, kind)

        def ask_back() -> None:
            """Questions that make tokens carry what the others need of them: whose a value is, who an alias is."""
            if world.links and rng.random() < 0.7:
                new_name, name = rng.choice(world.links)
                if rng.random() < 0.5:
                    say(f"\nQ: Who is the alias of {name}?\nA:", STATEMENT)
                    answer(new_name, "link")
                else:
                    say(f"\nQ: Whose alias is {new_name}?\nA:", STATEMENT)
                    answer(name, "link")
            else:
                (attribute, name), (value, kind) = rng.choice(list(world.values.items()))
                if kind != "alias" and value.isdigit():
                    say(f"\nQ: Whose {attribute} is {value}?\nA:", STATEMENT)
                    answer(name, "link")

        final_questions = rng.randint(2, 4 + tokens // 128)
        body_tokens = tokens - 20 * final_questions
        while used < body_tokens:
            draw = rng.random()
            if draw < 0.02:
                if copy_source is None:
                    copy_source = " ".join(draw_names(rng, rng.randint(3, 6), held_out=False))
                    say(f" {copy_source};", FILLER)
                else:
                    answer(copy_source, "copy")
                    copy_source = None
                continue
            if world.values and draw < question_ratio:
                if rng.random() < 0.3:
                    ask_back()
                else:
                    ask()
                if rng.random() < 0.7:
                    continue
            statement = world.next_statement()
            if statement is None:
                world.names.extend(draw_names(rng, 2, held_out=False))
                continue
            say(statement, STATEMENT)
            if world.owner is not None and rng.random() < 0.4:
                say(" This is about", STATEMENT)
                answer(world.owner, "about")
            for _ in range(int(rng.expovariate(1.0) * gap + rng.random())):
                say(" " + rng.choice(filler), FILLER)
            if rng.random() < 0.1:
                say("\n", FILLER)
        while world.pending:
            say(world.finish_alias(), STATEMENT)
        for _ in range(final_questions):
            ask()
        while used < tokens:
            say(" " + rng.choice(filler), FILLER)
        return segments
