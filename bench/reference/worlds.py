"""Small worlds of stated facts, hidden in real text: what the reference model learns, and what it is tested on.

Three kinds of statement, each with a question whose answer is known:

- fact     ` The code of Falcon is 4821.`
- record   ` Now consider Alice.` ... ` Its code is 4821.`: the second sentence is worthless without the first;
           when they stand in two documents, the KV of the second depends on the first, which is what separates
           the ways of fusing independently cached chunks.
- alias    ` Falcon is the alias of Alice.` and ` The code of Falcon is 4821.`, asked about Alice: two hops.

`WorldSampler` makes training sequences (many statements, many questions); `TaskSampler` makes test tasks: documents
of natural text with statements in them, one question, one answer, over names never seen in training.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ONSETS = _words("b d f g k l m n p r s t v z")
_VOWELS = _words("a e i o u")
_CODAS = ("", "", "n", "r", "l")
_PLAIN_NAMES = _words(
    "Alice Bruno Clara David Elena Felix Grace Henry Irene Jonas Karen Louis Maria Nadia Oscar Paula Quinn Robert "
    "Sarah Thomas Ursula Victor Wendy Xavier Yvonne Zoltan Anton Bella Cyrus Diana Edgar Fiona Gustav Helen Igor "
    "Julia Kevin Laura Martin Nora Oliver Peter Rita Simon Tanya Ulrich Vera Walter Falcon Tiger Raven Otter Panda "
    "Cobra Eagle Lynx Bison Heron Viper Koala Badger Comet Nova Orion Vega Titan Atlas Delta Sigma Omega Quartz "
    "Amber Cedar Maple Willow Storm Frost Ember Flint Shadow Mercury Saturn Neptune Apollo Hermes Juno Pluto"
)

NUMERIC_ATTRIBUTES: dict[str, int] = {"code": 4, "number": 4, "badge": 4, "year": 4, "key": 4, "room": 3, "age": 2}
WORD_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    name: _words(values)
    for name, values in {
        "city": "Paris London Berlin Madrid Rome Vienna Oslo Dublin Athens Cairo Tokyo Delhi Lima Boston Chicago "
        "Prague",
        "color": "red blue green yellow black white brown orange purple pink gray silver gold violet",
        "animal": "cat dog horse sheep goat bear wolf fox lion mouse rabbit snake whale shark duck swan",
        "job": "doctor lawyer farmer baker painter singer writer pilot sailor teacher nurse judge miner tailor",
        "drink": "water tea coffee milk juice wine beer cider cocoa soda rum lemonade",
        "metal": "iron copper zinc lead nickel steel bronze brass tin cobalt chrome platinum",
        "fruit": "apple pear plum cherry lemon grape peach mango melon banana fig olive",
        "sport": "tennis football hockey golf boxing chess rugby rowing skating cycling fencing archery",
        "language": "French German Spanish Italian Greek Latin Arabic Polish Dutch Danish Finnish Turkish",
        "tool": "hammer saw drill knife axe file wrench chisel spade brush needle ladder",
    }.items()
}
ATTRIBUTES = (*NUMERIC_ATTRIBUTES, *WORD_ATTRIBUTES)


def is_held_out(name: str) -> bool:
    """One invented name in eight is kept for tests: no training sequence contains it."""
    return hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 8 == 0


def invent_name(rng: random.Random, *, held_out: bool) -> str:
    while True:
        syllables = 2 if rng.random() < 0.9 else 3
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        name = name.capitalize()
        if name not in _PLAIN_NAMES and is_held_out(name) == held_out:
            return name


def draw_names(rng: random.Random, count: int, *, held_out: bool) -> list[str]:
    """`count` different names: invented ones, and in training a third of plain ones."""
    names: dict[str, None] = {}
    while len(names) < count:
        plain = not held_out and rng.random() < 0.33
        names[rng.choice(_PLAIN_NAMES) if plain else invent_name(rng, held_out=held_out)] = None
    return list(names)


def draw_value(rng: random.Random, attribute: str) -> str:
    digits = NUMERIC_ATTRIBUTES.get(attribute)
    if digits is None:
        return rng.choice(WORD_ATTRIBUTES[attribute])
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def fact(attribute: str, name: str, value: str) -> str:
    return f" The {attribute} of {name} is {value}."


def consider(name: str) -> str:
    return f" Now consider {name}."


def its(attribute: str, value: str) -> str:
    return f" Its {attribute} is {value}."


def alias(new_name: str, name: str) -> str:
    return f" {new_name} is the alias of {name}."


def question(attribute: str, name: str) -> str:
    return f"\nQ: What is the {attribute} of {name}?\nA:"


def reverse_question(attribute: str, value: str) -> str:
    """Asks for the name: in training only, since it makes the tokens of a value carry whose it is."""
    return f"\nQ: Whose {attribute} is {value}?\nA:"


# ------------------------------------------------------------------------------------------------- training

FILLER, STATEMENT, ANSWER = 0, 1, 2  # what a segment of a training sequence is; the loss weighs them differently


@dataclass(frozen=True, slots=True)
class Mixture:
    """Shares of one training sequence."""

    fact: float
    record: float
    alias: float
    filler_ratio: float
    question_ratio: float


@dataclass(slots=True)
class _World:
    """What has been said so far, and therefore may be asked."""

    rng: random.Random
    mixture: Mixture
    attributes: list[str]
    names: list[str]
    answers: dict[tuple[str, str], tuple[str, str]] = field(default_factory=dict)  # (attribute, name) -> value, kind
    alias_of: dict[str, str] = field(default_factory=dict)  # new name -> name
    pending: list[str] = field(default_factory=list)  # sentences of an unfinished alias pair
    current: str | None = None

    def _free_pair(self) -> tuple[str, str] | None:
        for _ in range(8):
            pair = (self.rng.choice(self.attributes), self.rng.choice(self.names))
            if pair not in self.answers and pair[1] not in self.alias_of:
                return pair
        return None

    def next_statement(self) -> str | None:
        rng = self.rng
        if self.pending and rng.random() < 0.45:
            return self.pending.pop(0)
        mixture = self.mixture
        kind = rng.choices(("fact", "record", "alias"), (mixture.fact, mixture.record, mixture.alias))[0]
        if kind == "record":
            said = [a for a in self.attributes if (a, self.current) in self.answers]
            if self.current is None or len(said) == len(self.attributes) or rng.random() < 0.3:
                fresh = [n for n in self.names if n != self.current and n not in self.alias_of]
                self.current = rng.choice(fresh)
                return consider(self.current)
            attribute = rng.choice(self.attributes)
            if (attribute, self.current) in self.answers:
                return None
            value = draw_value(rng, attribute)
            self.answers[attribute, self.current] = (value, "record")
            return its(attribute, value)
        pair = self._free_pair()
        if pair is None:
            return None
        attribute, name = pair
        value = draw_value(rng, attribute)
        if kind == "fact":
            self.answers[attribute, name] = (value, "fact")
            return fact(attribute, name, value)
        new_name = draw_names(rng, 1, held_out=False)[0]
        if new_name in self.names or new_name in self.alias_of:
            return None
        self.alias_of[new_name] = name
        first, second = alias(new_name, name), fact(attribute, new_name, value)
        if rng.random() < 0.35:
            first, second = second, first
        self.pending.append(second)
        self.answers[attribute, name] = (value, f"alias:{second}")
        return first

    def askable(self) -> list[tuple[str, str, str]]:
        return [
            (attribute, name, value)
            for (attribute, name), (value, kind) in self.answers.items()
            if not (kind.startswith("alias:") and kind[6:] in self.pending)
        ]


class WorldSampler:
    """Training sequences as (text, kind) segments, `kind` one of FILLER, STATEMENT, ANSWER.

    Parameters
    ----------
    sentences : natural sentences, each without leading space; drawn at random as filler.
    count_tokens : tokens in a text; a sequence stops growing when its budget is reached.
    """

    def __init__(self, sentences: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        self._sentences = sentences
        self._count_tokens = count_tokens

    def _mixture(self, rng: random.Random, tokens: int, alias_share: float) -> Mixture:
        filler = rng.choice((0.0, 0.15, 0.3, 0.5) if tokens <= 256 else (0.0, 0.3, 0.6, 0.8, 0.9))
        questions = rng.choice((0.2, 0.3, 0.4))
        focus = rng.random()
        if focus < 0.10:
            return Mixture(1.0, 0.0, 0.0, filler, questions)
        if focus < 0.60:
            return Mixture(0.1, 0.9, 0.0, filler, questions)
        if focus < 0.60 + alias_share:
            return Mixture(0.15, 0.05, 0.8, filler, questions)
        return Mixture(0.4, 0.35, 0.25, filler, questions)

    def sample(self, rng: random.Random, tokens: int, alias_share: float = 0.35) -> list[tuple[str, int]]:
        """One sequence of at least `tokens` tokens (the caller cuts)."""
        mixture = self._mixture(rng, tokens, alias_share)
        attributes = rng.sample(ATTRIBUTES, rng.choice((1, 1, 2, 3, 5)))
        names = draw_names(rng, rng.randint(3, 6 + tokens // 100), held_out=False)
        world = _World(rng, mixture, attributes, names)
        segments: list[tuple[str, int]] = []
        used = 0
        copy_source: str | None = None

        def say(text: str, kind: int) -> None:
            nonlocal used
            segments.append((text, kind))
            used += self._count_tokens(text)

        def ask(attribute: str, name: str, value: str) -> None:
            direct = world.answers[attribute, name][1] in ("fact", "record")
            if direct and value.isdigit() and rng.random() < 0.25:
                say(reverse_question(attribute, value), STATEMENT)
                say(f" {name}.", ANSWER)
            else:
                say(question(attribute, name), STATEMENT)
                say(f" {value}.", ANSWER)
            if rng.random() < 0.5:
                say("\n", FILLER)

        final_questions = rng.randint(2, 4 + tokens // 128)
        body_tokens = tokens - 22 * final_questions
        while used < body_tokens:
            draw = rng.random()
            if draw < mixture.filler_ratio:
                if rng.random() < 0.25:
                    say("\n", FILLER)
                else:
                    say(" " + rng.choice(self._sentences), FILLER)
            elif draw < mixture.filler_ratio + 0.03:
                if copy_source is None:
                    copy_source = " " + " ".join(draw_names(rng, rng.randint(4, 8), held_out=False)) + ";"
                    say(copy_source, FILLER)
                else:
                    say(copy_source, ANSWER)
                    copy_source = None
            elif rng.random() < mixture.question_ratio and (askable := world.askable()):
                ask(*rng.choice(askable))
            elif (statement := world.next_statement()) is not None:
                say(statement, STATEMENT)
                if statement.startswith((" Now consider", " Its ")) and rng.random() < 0.6:
                    # Without these gaps the model learns that an entity is named in the sentence just before.
                    for _ in range(rng.choice((1, 1, 2, 3, 5))):
                        say(" " + rng.choice(self._sentences), FILLER)
                if statement.startswith(" Its ") and rng.random() < 0.25:
                    say(" This is about", STATEMENT)
                    say(f" {world.current}.", ANSWER)
            else:
                names.extend(draw_names(rng, 2, held_out=False))
                world.names = [n for n in dict.fromkeys(names) if n not in world.alias_of]
        for statement in world.pending:
            say(statement, STATEMENT)
        world.pending.clear()
        askable = world.askable()
        for attribute, name, value in rng.sample(askable, min(len(askable), final_questions)):
            ask(attribute, name, value)
        while used < tokens:
            say(" " + rng.choice(self._sentences), FILLER)
        return segments


# ---------------------------------------------------------------------------------------------------- tests


@dataclass(frozen=True, slots=True)
class Task:
    """One question over documents. `answer` is the exact text that must follow `question`, without its full stop."""

    kind: str
    documents: tuple[str, ...]
    question: str
    answer: str


class TaskSampler:
    """Test tasks over held-out names and natural text.

    Parameters
    ----------
    sentences : natural sentences to hide the statements in, taken in order from a random start.
    count_tokens : tokens in a text.
    """

    KINDS = ("needle", "needle8", "record", "alias")

    def __init__(self, sentences: Sequence[str], count_tokens: Callable[[str], int]) -> None:
        if not sentences:
            raise ValueError("sentences is empty: tasks need natural text to hide their statements in")
        self._sentences = sentences
        self._count_tokens = count_tokens

    def _document(self, rng: random.Random, statements: Sequence[str], tokens: int) -> str:
        """Natural sentences filling `tokens` tokens, the statements spread among them in their order."""
        budget = tokens - sum(self._count_tokens(s) for s in statements) - 1
        start = rng.randrange(len(self._sentences))
        body: list[str] = []
        while budget > 0:
            sentence = " " + self._sentences[(start + len(body)) % len(self._sentences)]
            budget -= self._count_tokens(sentence)
            if budget < 0 and body:
                break
            body.append(sentence)
        places = sorted(rng.randrange(len(body) + 1) for _ in statements)
        for shift, (place, statement) in enumerate(zip(places, statements, strict=True)):
            body.insert(place + shift, statement)
        return "".join(body) + "\n"

    def sample(self, rng: random.Random, kind: str, *, context_tokens: int, num_documents: int = 8) -> Task:
        """One task whose documents hold about `context_tokens` tokens together.

        `needle` and `needle8` state 1 and 8 facts. `record` names an entity in every document but the last and
        states its attribute in the next one, so that every answer needs two documents. `alias` states the aliases in
        the first half of the documents and the facts in the second half.
        """
        if kind not in self.KINDS:
            raise ValueError(f"kind is {kind!r}; expected one of {', '.join(self.KINDS)}")
        if num_documents < 2:
            raise ValueError(f"num_documents is {num_documents}; expected at least 2")
        attribute = rng.choice([a for a, digits in NUMERIC_ATTRIBUTES.items() if digits == 4])
        statements: list[list[str]] = [[] for _ in range(num_documents)]
        asked: list[tuple[str, str]] = []
        if kind in ("needle", "needle8"):
            for name in draw_names(rng, 1 if kind == "needle" else 8, held_out=True):
                value = draw_value(rng, attribute)
                statements[rng.randrange(num_documents)].append(fact(attribute, name, value))
                asked.append((name, value))
        elif kind == "record":
            names = draw_names(rng, num_documents - 1, held_out=True)
            for i, name in enumerate(names):
                value = draw_value(rng, attribute)
                statements[i].append(consider(name))
                statements[i + 1].append(its(attribute, value))
                asked.append((name, value))
        else:
            half = num_documents // 2
            names = draw_names(rng, 2 * half, held_out=True)
            for i, (name, new_name) in enumerate(zip(names[:half], names[half:], strict=True)):
                value = draw_value(rng, attribute)
                statements[i].append(alias(new_name, name))
                statements[half + i].append(fact(attribute, new_name, value))
                asked.append((name, value))
        name, value = rng.choice(asked)
        documents = tuple(self._document(rng, s, context_tokens // num_documents) for s in statements)
        return Task(kind, documents, question(attribute, name), value)
