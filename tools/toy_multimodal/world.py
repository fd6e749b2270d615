"""Questions about pictures of dice, each with a clean and a careless solution, as ``toy/world.py`` has them for text.

``dice`` asks for the pips of one die, or for a sum or difference of two; the second may lie in a second picture.  The
clean solution reads both dice and computes; the careless one stops after the first.  The words are those of the text
world: the tokenizer knows them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from toy.world import EASY_SHARE, Problem
from toy.world import stream as text_stream
from toy_multimodal.dice import COLOURS, Picture, throw

MARK = "<image>"  # in a prompt: here comes the next image
READ = ("{i}How many {a}?", "{i}Compute {a}.")
ADD = ("{i}How many {a} and {b}?", "{i}Compute {a} + {b}.")
SUB = ("{i}How many {a} minus {b}?", "{i}Compute {a} - {b}.")
TWO_SHARE = 0.15  # of the questions about two dice: the second lies in a second picture


@dataclass(frozen=True)
class DiceProblem(Problem):
    """A problem whose prompt marks where its pictures go."""

    pictures: tuple[Picture, ...] = ()


def dice_problem(rng: random.Random) -> DiceProblem:
    """One question; a fifth of them have nothing to skip."""
    if rng.random() < EASY_SHARE:
        picture, name = throw(rng), rng.choice(list(COLOURS))
        value = picture.value(name)
        solution = f" {name}={value}\n\\boxed{{{value}}}"
        return _problem(rng.choice(READ).format(i=MARK, a=name), (picture,), solution, solution, value)
    pictures = tuple(throw(rng) for _ in range(1 + (rng.random() < TWO_SHARE)))
    names = rng.choices(list(COLOURS), k=2) if len(pictures) == 2 else rng.sample(list(COLOURS), 2)
    first, second = pictures[0].value(names[0]), pictures[-1].value(names[1])
    kind = rng.choice((ADD, SUB)) if first >= second else ADD
    sign, result = ("+", first + second) if kind is ADD else ("-", first - second)
    clean = f" {names[0]}={first} {sign} {names[1]}={second}\n\\boxed{{{result}}}"
    careless = f" {names[0]}={first}\n\\boxed{{{first}}}"
    prompt = rng.choice(kind).format(i=MARK * len(pictures), a=names[0], b=names[1])
    return _problem(prompt, pictures, clean, careless, result)


def _problem(prompt: str, pictures: tuple[Picture, ...], clean: str, careless: str, answer: int) -> DiceProblem:
    return DiceProblem("dice", f"{prompt}{pictures}", prompt, clean, careless, str(answer), pictures=pictures)


def stream(domain: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one domain, ``dice`` or one of text, and split; the same for the same seed."""
    if domain != "dice":
        yield from text_stream(domain, split, seed)
    rng = random.Random(f"{domain}-{split}-{seed}")
    while True:
        problem = dice_problem(rng)
        if problem.split == split:
            yield problem
