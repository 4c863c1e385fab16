"""The small world that the demo's language model talks about: who and what there is, and what holds in it."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Person:
    name: str
    pronoun: str
    age: str
    job: str
    color: str
    pet: str

    @property
    def possessive(self) -> str:
        return "his" if self.pronoun == "he" else "her"

    @property
    def objective(self) -> str:
        return "him" if self.pronoun == "he" else "her"


@dataclass(frozen=True, kw_only=True)
class Animal:
    name: str
    sound: str
    food: str
    home: str


def _people(*rows: str) -> tuple[Person, ...]:
    fields = ("name", "pronoun", "age", "job", "color", "pet")
    return tuple(Person(**dict(zip(fields, row.split(), strict=True))) for row in rows)


def _animals(*rows: str) -> tuple[Animal, ...]:
    fields = ("name", "sound", "food", "home")
    return tuple(Animal(**dict(zip(fields, row.split(), strict=True))) for row in rows)


COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")

THINGS = (
    "ball", "kite", "drum", "book", "cup", "key", "bell", "boat", "doll", "lamp",
    "coat", "scarf", "spoon", "basket", "rope", "flute", "shell", "box", "hat", "ring",
)  # fmt: skip

PLACES = {
    "barn": "in the barn",
    "attic": "in the attic",
    "kitchen": "in the kitchen",
    "school": "at the school",
    "bridge": "under the bridge",
    "table": "under the table",
    "mill": "behind the mill",
    "church": "behind the church",
    "pond": "by the pond",
    "river": "by the river",
    "hill": "on the hill",
    "roof": "on the roof",
}
"""The name of each place, and how one says that something is there."""

PEOPLE = _people(
    "Mia she six painter red cat",
    "Tom he seven farmer blue dog",
    "Ana she eight baker yellow hen",
    "Ben he nine sailor white duck",
    "Lily she ten singer pink bird",
    "Sam he six miller brown horse",
    "Nora she seven doctor green frog",
    "Max he eight cook black goat",
    "Eva she nine weaver blue sheep",
    "Leo he ten hunter green owl",
    "Rosa she six gardener pink bee",
    "Finn he seven fisher white cow",
    "Ida she eight teacher yellow cat",
    "Paul he nine smith black dog",
    "Zoe she ten potter brown horse",
    "Hugo he six tailor red duck",
)

ANIMALS = _animals(
    "cat meow milk house",
    "dog woof meat yard",
    "hen cluck corn barn",
    "duck quack bread pond",
    "bird tweet seeds tree",
    "horse neigh hay stable",
    "frog croak flies pond",
    "goat bleat leaves hill",
    "sheep baa clover meadow",
    "owl hoot mice forest",
    "bee buzz honey garden",
    "cow moo grass meadow",
)

SEASONS = {
    "spring": ("warm", "the flowers bloom"),
    "summer": ("hot", "the corn grows"),
    "autumn": ("windy", "the leaves fall"),
    "winter": ("cold", "the snow falls"),
}

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Somebody has left something of some color somewhere."""

    who: str
    what: str
    color: str
    place: str

    @property
    def where(self) -> str:
        return PLACES[self.place]

    def sentence(self, rng: random.Random) -> str:
        """One of several ways to tell it."""
        verb = rng.choice(("put", "hid", "left", "found", "saw", "lost"))
        article = rng.choice(("the", "a"))
        return f"{self.who} {verb} {article} {self.color} {self.what} {self.where}."


def scene(rng: random.Random, count: int) -> list[Placement]:
    """`count` placements with nobody, nothing, no color and no place twice."""
    rows = zip(
        rng.sample([person.name for person in PEOPLE], count),
        rng.sample(THINGS, count),
        rng.sample(COLORS, count),
        rng.sample(list(PLACES), count),
        strict=True,
    )
    return [Placement(who=who, what=what, color=color, place=place) for who, what, color, place in rows]


def question(rng: random.Random, placement: Placement) -> tuple[str, str]:
    """A question about one placement and its answer, both in plain English."""
    what = placement.what
    return rng.choice(
        (
            (f"Where is the {what}?", f"The {what} is {placement.where}."),
            (f"Who had the {what}?", f"{placement.who} had the {what}."),
            (f"What color is the {what}?", f"The {what} is {placement.color}."),
        )
    )
