"""Prompts that ask for something said before, at a chosen depth of a text of chosen length.

A length is in bytes, all of them ASCII, so that every tokenizer gets the same prompts.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

CONSONANTS, VOWELS = "bdfghklmnprstvz", "aeiou"
NAMES = (len(CONSONANTS) * len(VOWELS)) ** 3
SUBJECTS = ("A farmer", "The old clock", "My neighbour", "Some rain", "Her boat", "The baker")
VERBS = ("waited", "slept", "arrived", "turned", "stayed", "changed")
PLACES = ("by the river", "in the yard", "near a window", "after lunch", "all day", "at noon")
HEX = "0123456789abcdef"


class Sample(NamedTuple):
    """A prompt, what has to follow it, and what it was made of."""

    task: str
    length: int
    """Bytes of the prompt."""
    depth: float
    """Where the first needle was asked to be: 0 is the text's start and 1 its end."""
    number: int
    prompt: str
    answer: str


class Pieces(NamedTuple):
    """Of a prompt: texts before and after, needles and distractors, and endless other text."""

    head: str
    needles: list[str]
    distractors: list[str]
    filler: Iterator[str]
    question: str
    answer: str


def passkey(chance: random.Random, needles: int, distractors: int) -> Pieces:
    """Keys of five digits among sentences of nothing; distractors are other names' keys."""
    names = _distinct(chance, _name, needles + distractors)
    keys = [f"{chance.randrange(10**4, 10**5)}" for _ in names]
    said = [f"The key of {name} is {key}. " for name, key in zip(names, keys, strict=True)]
    head = "Remember every key in the text below.\n"
    asked = " and ".join(names[:needles])
    question = f"\nThe keys of {asked} are" if needles > 1 else f"\nThe key of {asked} is"
    answer = f" {' and '.join(keys[:needles])}."
    return Pieces(head, said[:needles], said[needles:], _sentences(chance), question, answer)


def key_value(chance: random.Random, needles: int, distractors: int) -> Pieces:
    """Pairs of 8 hexadecimal digits, one a line; distractors' keys differ in the last digit."""
    asked = _distinct(chance, _digits, needles)
    taken = set(asked)
    possible = sorted({key[:-1] + digit for key in asked for digit in HEX} - taken)
    if distractors > len(possible):
        raise ValueError(
            f"--distractors is {distractors}, but {needles} keys of key-value have "
            f"{len(possible)} others like them; give at most {len(possible)}."
        )
    near = chance.sample(possible, distractors)
    taken |= set(near)
    values = [_digits(chance) for _ in asked]
    pairs = [_line(key, value) for key, value in zip(asked, values, strict=True)]
    others = [_line(key, _digits(chance)) for key in near]
    head = "Remember the value of every key.\n"
    question, answer = f"\n{' '.join(asked)}:", f" {' '.join(values)}\n"
    return Pieces(head, pairs, others, _pairs(chance, taken), question, answer)


TASKS = {"passkey": passkey, "key-value": key_value}


def make_sample(
    task: str, length: int, depth: float, number: int, seed: int, needles: int, distractors: int
) -> Sample:
    """One sample, the same for the same arguments wherever it is made.

    Args:
        task: a name of TASKS.
        length: bytes of the prompt, exactly.
        depth: of the first needle, from 0 to 1; others and distractors are anywhere.
        number: of samples that are alike but for chance.
        seed: of chance.
        needles: how many keys are asked for.
        distractors: how many keys like them are not.

    Raises:
        ValueError: the length has no room for what is to be in it.
    """
    # Each takes more than 20 bytes, and there are not endlessly many names to draw.
    if 20 * (needles + distractors) > length:
        raise ValueError(
            f"--lengths has {length}, in which {needles} needles and {distractors} distractors "
            "have no room; take fewer, or longer prompts."
        )
    if needles + distractors > NAMES // 2:
        raise ValueError(
            f"--needles and --distractors are {needles + distractors}; take at most {NAMES // 2}."
        )
    chance = random.Random(f"{seed} {task} {length} {depth} {number} {needles} {distractors}")
    head, wanted, others, filler, question, answer = TASKS[task](chance, needles, distractors)
    fixed = sum(map(len, (head, question, *wanted, *others)))
    room = length - fixed
    if room < 0:
        raise ValueError(
            f"--lengths has {length}, and a prompt of {task} with {needles} needles and "
            f"{distractors} distractors takes at least {fixed} bytes."
        )
    units = list(_cut(filler, room))[::-1]
    # Between units, the needle's place is the one nearest to its depth.
    starts = list(itertools.accumulate(map(len, units), initial=0))
    nearest = min(range(len(starts)), key=lambda place: abs(starts[place] - depth * room))
    placed: dict[int, list[str]] = {nearest: [wanted[0]]}
    rest = wanted[1:] + others
    chance.shuffle(rest)
    for text in rest:
        own = placed.setdefault(chance.randrange(len(starts)), [])
        own.insert(chance.randrange(len(own) + 1), text)
    body = "".join("".join(placed.get(place, [])) + unit for place, unit in enumerate([*units, ""]))
    return Sample(task, length, depth, number, head + body + question, answer)


def _cut(filler: Iterator[str], room: int) -> Iterator[str]:
    """Whole units and at last the end of one, together `room` bytes."""
    while room > 0:
        unit = next(filler)[-room:]
        room -= len(unit)
        yield unit


def _sentences(chance: random.Random) -> Iterator[str]:
    while True:
        yield f"{chance.choice(SUBJECTS)} {chance.choice(VERBS)} {chance.choice(PLACES)}. "


def _pairs(chance: random.Random, taken: set[str]) -> Iterator[str]:
    while True:
        key = _digits(chance)
        if key not in taken:
            taken.add(key)
            yield _line(key, _digits(chance))


def _line(key: str, value: str) -> str:
    return f"{key}: {value}\n"


def _digits(chance: random.Random) -> str:
    return f"{chance.getrandbits(32):08x}"


def _name(chance: random.Random) -> str:
    return "".join(chance.choice(CONSONANTS) + chance.choice(VOWELS) for _ in range(3)).title()


def _distinct(chance: random.Random, make: Callable[[random.Random], str], count: int) -> list[str]:
    """So many different strings."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[make(chance)] = None
    return list(found)
