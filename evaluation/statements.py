"""Building blocks of the reference model's tasks: names, attributes, values, and the sentences that state them.

Three kinds of statement, each with a question whose answer is known:

- fact     ` The code of Amber Falcon is 4821.`
- record   ` Now consider Alice.` ... ` Its code is 4821.`: the second sentence is worthless without the first;
           when they stand in two documents, the KV of the second depends on the first, which is what separates
           the ways of fusing independently cached chunks.
- alias    ` Amber Falcon is the alias of Alice.` and ` The code of Amber Falcon is 4821.`, asked about Alice: two hops.
"""

import hashlib
import random


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PLAIN_NAMES = _words(
    "Alice Bruno Clara David Elena Felix Grace Henry Irene Jonas Karen Louis Maria Nadia Oscar Paula Quinn Robert "
    "Sarah Thomas Ursula Victor Wendy Xavier Yvonne Zoltan Anton Bella Cyrus Diana Edgar Fiona Gustav Helen Igor "
    "Julia Kevin Laura Martin Nora Oliver Peter Rita Simon Tanya Ulrich Vera Walter"
)
# One token each in the tokenizer, so that a name of two words is bound over two positions.
_FIRST_WORDS = _words(
    "Amber Azure Bold Brave Bright Bronze Calm Clear Coral Crimson Crystal Dark Dawn Deep Desert Early Ebony Emerald "
    "Fair Fast Final First Gentle Giant Golden Grand Great Green Happy High Hidden Icy Iron Ivory Jade Keen Lone Lost "
    "Lucky Magic Mighty Misty Modern New Noble North Old Pale Proud Quick Quiet Rapid Red Royal Secret Silent Silver "
    "South Swift True Velvet Warm White Wild"
)
_LAST_WORDS = _words(
    "Anchor Apollo Arrow Atlas Badger Bamboo Beacon Bear Beaver Bison Bridge Castle Cedar Circle Cloud Cobra Comet "
    "Condor Copper Coyote Crane Crown Delta Diamond Dolphin Dragon Drum Eagle Echo Elk Ember Engine Falcon Feather "
    "Field Finch Fire Flame Flint Flower Forest Fox Frost Galaxy Garden Gate Ghost Glacier Hammer Harbor Hawk Heron "
    "Hill Horizon Horse Hunter Island Jaguar Jupiter Kestrel Key King Knight Koala Lake Lantern Leaf Lemon Leopard "
    "Light Lion Lotus Lynx Mango Maple Marble Meadow Mercury Mirror Moon Moose Mountain Nebula Neptune Nova Oak Ocean "
    "Olive Omega Orbit Orchid Orion Otter Owl Palm Panda Panther Pearl Pepper Phoenix Pilot Pine Planet Prairie Puma "
    "Quartz Queen Rabbit Rain Raven Reef Rider River Robin Rocket Rose Sailor Salmon Saturn Shadow Shark Sky Snow "
    "Sparrow Spider Spring Star Stone Storm Stream Summit Sun Thunder Tiger Titan Torch Tower Tree Tulip Turtle "
    "Valley Viper Walrus Wave Willow Wind Wing Winter Wolf Zebra"
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
    }.items()
}
ATTRIBUTES = (*NUMERIC_ATTRIBUTES, *WORD_ATTRIBUTES)
FOUR_DIGITS = tuple(a for a, digits in NUMERIC_ATTRIBUTES.items() if digits == 4)


def is_held_out(name: str) -> bool:
    """One name of two words in eight is kept for tests: no training sequence contains it."""
    return " " in name and hashlib.blake2b(name.encode(), digest_size=2).digest()[0] % 8 == 0


_TWO_WORDS = [f"{first} {last}" for first in _FIRST_WORDS for last in _LAST_WORDS]
_HELD_OUT, _TRAINING = ([n for n in _TWO_WORDS if is_held_out(n) == held_out] for held_out in (True, False))
_SPLIT_NAMES = {
    split: [n for n in _HELD_OUT if hashlib.blake2b(n.encode(), digest_size=2).digest()[1] % 2 == odd]
    for odd, split in enumerate(("tune", "check"))
}


def draw_names(rng: random.Random, count: int, *, held_out: bool, split: str | None = None) -> list[str]:
    """`count` different names: two words, and in training a tenth of one word.

    Parameters
    ----------
    split : only held-out names of this split, `tune` or `check`; None for all of them.

    Raises
    ------
    ValueError : there are not so many names.
    """
    held = _HELD_OUT if split is None else _SPLIT_NAMES[split]
    known = len(held) if held_out else len(_TRAINING) + len(PLAIN_NAMES)
    if count > known:
        raise ValueError(f"{count} names are wanted, only {known} can be made")
    names: dict[str, None] = {}
    while len(names) < count:
        plain = not held_out and rng.random() < 0.1
        names[rng.choice(PLAIN_NAMES if plain else held if held_out else _TRAINING)] = None
    return list(names)


def draw_value(rng: random.Random, attribute: str) -> str:
    digits = NUMERIC_ATTRIBUTES.get(attribute)
    if digits is None:
        return rng.choice(WORD_ATTRIBUTES[attribute])
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def draw_number(rng: random.Random) -> str:
    """A value of four digits."""
    return str(rng.randrange(1000, 10_000))


def name_ends() -> tuple[str, ...]:
    """The words in which names end."""
    return (*PLAIN_NAMES, *_LAST_WORDS)


def value_beginnings() -> tuple[str, ...]:
    """First parts of values: two digits, or a word."""
    return (*map(str, range(10, 100)), *(word for words in WORD_ATTRIBUTES.values() for word in words))


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
