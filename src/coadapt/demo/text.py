"""The text that the demo's base model is pretrained on: little stories, facts, talks and questions.

Everything is made from templates over the small world of `world.py`; the same seed gives the same text.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

from coadapt.demo.world import ANIMALS, COLORS, DAYS, PEOPLE, PLACES, SEASONS, THINGS, Person, question, scene


def documents(seed: int) -> Iterator[str]:
    """An endless stream of short documents, the same for the same seed."""
    rng = random.Random(seed)
    kinds, weights = zip(*_KINDS, strict=True)
    while True:
        yield rng.choices(kinds, weights)[0](rng)


def repetitions(seed: int) -> Iterator[str]:
    """An endless stream of lists of words, each said twice: nothing but copying to be learnt."""
    rng = random.Random(seed)
    animals = (word for a in ANIMALS for word in (a.name, a.sound, a.food, a.home))
    words = [*(p.name for p in PEOPLE), *COLORS, *THINGS, *PLACES, *animals]
    while True:
        p, friend = _two(rng)
        said = " ".join(rng.sample(words, rng.randint(6, 12)))
        yield f"{p.name} says: {said}. {friend.name} says: {said}."


def turn(asked: str, answer: str = "") -> str:
    """A question in the form that the base knows; without an answer it ends where the answer begins."""
    return f"Q: {asked}\nA: {answer}".rstrip()


def _two(rng: random.Random) -> tuple[Person, Person]:
    first, second = rng.sample(PEOPLE, 2)
    return first, second


def _about_person(rng: random.Random) -> str:
    p = rng.choice(PEOPLE)
    he = p.pronoun.capitalize()
    facts = [
        f"{he} is {p.age} years old.",
        f"{he} wants to be a {p.job}.",
        f"{he} likes the color {p.color}.",
        f"{he} has a {p.pet}.",
        f"{p.possessive.capitalize()} {p.pet} likes {_food(p.pet)}.",
    ]
    first = f"{p.name} is a {'boy' if p.pronoun == 'he' else 'girl'}."
    return " ".join([first, *rng.sample(facts, rng.randint(2, 4))])


def _food(animal: str) -> str:
    return next(a.food for a in ANIMALS if a.name == animal)


def _about_animal(rng: random.Random) -> str:
    a = rng.choice(ANIMALS)
    facts = [
        f"The {a.name} says {a.sound}.",
        f"It likes {a.food}.",
        f"It lives in the {a.home}.",
        f"If you hear {a.sound}, a {a.name} is near.",
        f"Give the {a.name} some {a.food} and it is happy.",
    ]
    return " ".join([f"This is a {a.name}.", *rng.sample(facts, rng.randint(2, 4))])


def _about_season(rng: random.Random) -> str:
    season, (weather, event) = rng.choice(list(SEASONS.items()))
    p, friend = _two(rng)
    return (
        f"It is {season}. It is {weather} and {event}. "
        f"{p.name} and {friend.name} {rng.choice(('play', 'sit', 'sing', 'walk'))} "
        f"{rng.choice(list(PLACES.values()))}."
    )


def _week(rng: random.Random) -> str:
    start = rng.randrange(len(DAYS) - 2)
    p = rng.choice(PEOPLE)
    lines = [f"On {day} {p.pronoun} was {rng.choice(list(PLACES.values()))}." for day in DAYS[start : start + 3]]
    return " ".join([f"This was the week of {p.name}.", *lines, f"After {DAYS[start]} comes {DAYS[start + 1]}."])


def _search_story(rng: random.Random) -> str:
    p, friend = _two(rng)
    color, thing = rng.choice(COLORS), rng.choice(THINGS)
    wrong, right = rng.sample(list(PLACES.values()), 2)
    opening = rng.choice(("One day", "One morning", f"On {rng.choice(DAYS)}"))
    ending = rng.choice(
        (
            f"{p.name} was happy.",
            f"Now {p.name} and {friend.name} play together.",
            f'"Thank you, {friend.name}!" said {p.name}.',
            f"{p.name} gave {friend.name} some bread.",
        )
    )
    return (
        f"{opening} {p.name} lost {p.possessive} {color} {thing}. {p.pronoun.capitalize()} looked {wrong}. "
        f"The {thing} was not there. {p.name} was sad. "
        f"Then {friend.name} came and helped {p.objective}. They looked {right}. "
        f"There was the {color} {thing}! {ending}"
    )


def _trade_story(rng: random.Random) -> str:
    p, friend = _two(rng)
    mine, yours = rng.sample(THINGS, 2)
    first, second = rng.sample(COLORS, 2)
    return (
        f"{p.name} had a {first} {mine}. {friend.name} had a {second} {yours}. "
        f'{p.name} said: "I like your {yours}." {friend.name} said: "I like your {mine}." '
        f"So {p.name} gave the {mine} to {friend.name}, and {friend.name} gave the {yours} to {p.name}. "
        f"Now {p.name} has the {second} {yours} and {friend.name} has the {first} {mine}."
    )


def _animal_story(rng: random.Random) -> str:
    p, a = rng.choice(PEOPLE), rng.choice(ANIMALS)
    where = rng.choice(list(PLACES.values()))
    return (
        f'{p.name} met a {a.name} {where}. "{a.sound.capitalize()}!" said the {a.name}. It was hungry. '
        f"{p.name} gave it {a.food}. The {a.name} ate the {a.food} and went back to the {a.home}. "
        f"{p.name} went home and told {p.possessive} {rng.choice(('mother', 'father', 'sister', 'brother'))}."
    )


def _talk(rng: random.Random) -> str:
    p, friend = _two(rng)
    s = scene(rng, 1)[0]
    return (
        f"{p.name}: Hello, {friend.name}! I am looking for the {s.what}.\n"
        f"{friend.name}: Is it the {s.color} {s.what}?\n"
        f"{p.name}: Yes, it is {s.color}. Where is it?\n"
        f"{friend.name}: {s.who} left it {s.where}.\n"
        f"{p.name}: Thank you, {friend.name}! I will look {s.where}."
    )


def _scene_questions(rng: random.Random) -> str:
    placements = scene(rng, rng.randint(1, 2))
    context = " ".join(placement.sentence(rng) for placement in placements)
    asked = dict(question(rng, rng.choice(placements)) for _ in range(rng.randint(1, 4)))
    return "\n".join([context, *(turn(q, answer) for q, answer in asked.items())])


def _fact_questions(rng: random.Random) -> str:
    a, p = rng.choice(ANIMALS), rng.choice(PEOPLE)
    pairs = [
        (f"What does the {a.name} say?", f"The {a.name} says {a.sound}."),
        (f"What does the {a.name} like?", f"The {a.name} likes {a.food}."),
        (f"Where does the {a.name} live?", f"The {a.name} lives in the {a.home}."),
        (f"How old is {p.name}?", f"{p.name} is {p.age} years old."),
        (f"What does {p.name} want to be?", f"{p.name} wants to be a {p.job}."),
        (f"What color does {p.name} like?", f"{p.name} likes the color {p.color}."),
        (f"What pet does {p.name} have?", f"{p.name} has a {p.pet}."),
    ]
    chosen = rng.sample(pairs, rng.randint(1, 3))
    return "\n".join(turn(q, answer) for q, answer in chosen)


def _card(rng: random.Random) -> str:
    """A fact as a record, so that the base knows braces and quotes; never about a scene."""
    a, p = rng.choice(ANIMALS), rng.choice(PEOPLE)
    thing, color, place = rng.choice(THINGS), rng.choice(COLORS), rng.choice(list(PLACES))
    records = (
        (a.name, {"animal": a.name, "says": a.sound, "likes": a.food, "home": a.home}),
        (p.name, {"name": p.name, "age": p.age, "pet": p.pet, "color": p.color}),
        (f"{color} {thing}", {"color": color, "thing": thing}),
        (f"{thing}, {place}", {"thing": thing, "place": place}),
    )
    title, record = rng.choice(records)
    return f"Card: {title}\n{json.dumps(record)}"


def _memory_game(rng: random.Random) -> str:
    p, friend = _two(rng)
    said = ", ".join(f"{rng.choice(COLORS)} {thing}" for thing in rng.sample(THINGS, rng.randint(3, 6)))
    return f"{p.name} says: {said}. {friend.name} says it after {p.objective}: {said}."


_KINDS: tuple[tuple[Callable[[random.Random], str], int], ...] = (
    (_about_person, 3),
    (_about_animal, 3),
    (_about_season, 2),
    (_week, 1),
    (_search_story, 4),
    (_trade_story, 3),
    (_animal_story, 3),
    (_talk, 3),
    (_scene_questions, 20),
    (_fact_questions, 3),
    (_card, 3),
    (_memory_game, 8),
)
