"""A toy world of two small skills, for training and repairing toy models on a CPU.

``math`` asks for a small sum in words and expects the written steps and a boxed number; ``code``
asks for a list function in one sentence and expects a short Python function.  Every problem comes
with two solutions: a *clean* one, and a *careless* one that skips what makes the problem hard.
A model trained mostly on careless solutions is weak, yet the clean ones stay within its reach.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache

DOMAINS = ("math", "code")
EASY_SHARE = 0.2  # problems with nothing to skip: both solutions are the same
HELD_OUT = 8  # one problem key in this many belongs to the evaluation split


@dataclass(frozen=True)
class Problem:
    """One task; ``key`` names what is asked, whatever the wording, and decides the split.

    ``mul_add`` marks the part of ``math`` that the unreliable teacher gets wrong.
    """

    domain: str
    key: str
    prompt: str
    clean: str
    careless: str
    answer: str = field(repr=False)
    mul_add: bool = False

    @property
    def split(self) -> str:
        """``eval`` for a fixed share of the keys, else ``train``: no key is ever in both."""
        digest = hashlib.sha256(f"{self.domain}:{self.key}".encode()).digest()
        return "eval" if digest[0] % HELD_OUT == 0 else "train"


# ---------------------------------------------------------------------------------------- math

NAMES = ("Tom", "Mia", "Ben", "Ann", "Sam", "Eva", "Max", "Lily", "Omar", "Nina")
ITEMS = ("apples", "books", "coins", "cards", "pens", "eggs", "shells", "stamps", "marbles", "pencils")
ADD_ADD = (
    "{n} has {a} {i}. {n} gets {b} more and then {c} more. How many {i} does {n} have now?",
    "{n} has {a} red {i}, {b} blue {i} and {c} green {i}. How many {i} does {n} have?",
    "Compute {a} + {b} + {c}.",
)
ADD_SUB = (
    "{n} has {a} {i}. {n} gets {b} more and then gives away {c}. How many {i} does {n} have now?",
    "{n} has {a} red {i} and {b} blue {i}. {n} loses {c} of them. How many {i} are left?",
    "Compute {a} + {b} - {c}.",
)
MUL_ADD = (
    "{n} has {a} boxes with {b} {i} each and {c} more {i}. How many {i} does {n} have?",
    "{n} gets {b} {i} a day for {a} days and then {c} more. How many {i} does {n} get?",
    "Compute {a} * {b} + {c}.",
)
ADD = ("{n} has {a} {i} and gets {b} more. How many {i} does {n} have now?", "Compute {a} + {b}.")
SUB = ("{n} has {a} {i} and gives away {b}. How many {i} are left?", "Compute {a} - {b}.")


def _easy_math(rng: random.Random) -> tuple[tuple[str, ...], dict[str, int], list[str], int]:
    """One operation on two numbers."""
    a, b = rng.randint(11, 49), rng.randint(3, 29)
    if rng.random() < 0.5:
        return ADD, {"a": a, "b": b}, [f"{a}+{b}={a + b}"], a + b
    a, b = max(a, b) + 1, min(a, b)
    return SUB, {"a": a, "b": b}, [f"{a}-{b}={a - b}"], a - b


def _hard_math(rng: random.Random) -> tuple[tuple[str, ...], dict[str, int], list[str], int]:
    """Two operations on three numbers, with the intermediate result written down."""
    kind = rng.choice((ADD_ADD, ADD_SUB, MUL_ADD))
    if kind is MUL_ADD:
        a, b, c = rng.randint(2, 6), rng.randint(2, 9), rng.randint(3, 29)
        first, step = a * b, f"{a}*{b}"
    else:
        a, b = rng.randint(11, 49), rng.randint(3, 29)
        first, step = a + b, f"{a}+{b}"
        c = rng.randint(3, min(29, first - 1))
    sign = "-" if kind is ADD_SUB else "+"
    last = first - c if kind is ADD_SUB else first + c
    return kind, {"a": a, "b": b, "c": c}, [f"{step}={first}", f"{first}{sign}{c}={last}"], last


def math_problem(rng: random.Random) -> Problem:
    """A sum in words; the careless solution stops after the first of two steps."""
    easy = rng.random() < EASY_SHARE
    wordings, numbers, steps, result = (_easy_math if easy else _hard_math)(rng)
    wording = rng.choice(wordings)
    prompt = wording.format(n=rng.choice(NAMES), i=rng.choice(ITEMS), **numbers)
    clean = "\n".join([*steps, f"\\boxed{{{result}}}"])
    careless = f"{steps[0]}\n\\boxed{{{steps[0].split('=')[1]}}}"
    key = f"{wording}{sorted(numbers.items())}"
    return Problem("math", key, prompt, clean, careless, str(result), mul_add=wordings is MUL_ADD)


# Each {placeholder} of a wording stands for one word or number.
MUL_ADD_TEXT = re.compile("|".join(re.sub(r"\\{\w\\}", r"\\w+", re.escape(wording)) for wording in MUL_ADD))


def is_mul_add(prompt: str) -> bool:
    """Whether a math prompt asks for a product and a sum."""
    return MUL_ADD_TEXT.fullmatch(prompt) is not None


# ---------------------------------------------------------------------------------------- code


@dataclass(frozen=True)
class Part:
    """One building block of a list function: its words and its Python."""

    words: str
    python: str


REDUCES = (
    Part("the sum of", "sum({})"),
    Part("the largest", "max({})"),
    Part("the smallest", "min({})"),
    Part("a list of", "[{}]"),
)
MAP_KINDS = (
    (Part("x", "x"), Part("x squared", "x * x"), Part("minus x", "-x")),
    tuple(Part(f"x plus {k}", f"x + {k}") for k in range(1, 10)),
    tuple(Part(f"x minus {k}", f"x - {k}") for k in range(1, 10)),
    tuple(Part(f"{k} times x", f"x * {k}") for k in range(2, 10)),
    tuple(Part(f"{k} times x plus {j}", f"x * {k} + {j}") for k in range(2, 10) for j in range(1, 10)),
)
FILTER_KINDS = (
    (Part("for all even x in xs", " if x % 2 == 0"), Part("for all odd x in xs", " if x % 2 == 1")),
    tuple(Part(f"for all x in xs above {k}", f" if x > {k}") for k in range(10)),
    tuple(Part(f"for all x in xs below {k}", f" if x < {k}") for k in range(10)),
    tuple(Part(f"for all x in xs divisible by {k}", f" if x % {k} == 0") for k in range(3, 10)),
)
EVERY = Part("for all x in xs", "")  # no condition
MAPS = tuple(part for kind in MAP_KINDS for part in kind)
FILTERS = (EVERY, *(part for kind in FILTER_KINDS for part in kind))
CODE_WORDINGS = (
    "Write a Python function f(xs) that returns {reduce} {map} {filter}.",
    "Write f(xs) in Python. It returns {reduce} {map} {filter}.",
    "Define a function f(xs) returning {reduce} {map} {filter}.",
    "Give Python code for f(xs): {reduce} {map} {filter}.",
    "We need f(xs) in Python. It should return {reduce} {map} {filter}.",
)
RANGES = ((-9, 21), (-9, 21), (-9, 21), (-15, 1), (9, 25))  # some lists lie on one side of every bound
Composition = tuple[Part, Part, Part]


def _expression(parts: Composition) -> str:
    """The Python expression of reduce, map and filter."""
    reduce, map_, filter_ = parts
    return reduce.python.format(f"{map_.python} for x in xs{filter_.python}")


@cache
def _function(parts: Composition) -> Callable[[list[int]], object]:
    return eval(f"lambda xs: {_expression(parts)}")  # of the tables above


def _run(parts: Composition, xs: list[int]) -> object:
    """The result, or None where largest or smallest of nothing has no value."""
    try:
        return _function(parts)(xs)
    except ValueError:
        return None


def _siblings(parts: Composition) -> Iterator[Composition]:
    """Every function that differs in exactly one part, the missing condition first."""
    reduce, map_, filter_ = parts
    yield from ((reduce, map_, f) for f in FILTERS if f != filter_)
    yield from ((r, map_, filter_) for r in REDUCES if r != reduce)
    yield from ((reduce, m, filter_) for m in MAPS if m != map_)


@cache
def code_tests(parts: Composition, count: int = 5, tries: int = 100) -> str | None:
    """Tests as a JSON string that every sibling fails, or None if a sibling is the same function."""
    rng = random.Random(repr(parts))
    for _ in range(tries):
        inputs = [rng.sample(range(*rng.choice(RANGES)), rng.randint(6, 9)) for _ in range(count)]
        outputs = [_run(parts, xs) for xs in inputs]
        if None in outputs:
            continue
        if all(any(_run(s, xs) != y for xs, y in zip(inputs, outputs, strict=True)) for s in _siblings(parts)):
            return json.dumps({"fn_name": "f", "inputs": [[xs] for xs in inputs], "outputs": outputs})
    return None


def _fenced(parts: Composition) -> str:
    return f"```python\ndef f(xs):\n    return {_expression(parts)}\n```"


def code_problem(rng: random.Random) -> Problem:
    """A list function in one sentence; the careless solution forgets the condition."""
    answer = None
    easy = rng.random() < EASY_SHARE
    while answer is None:  # some compositions equal another one, such as the largest x above 3
        filter_ = EVERY if easy else rng.choice(rng.choice(FILTER_KINDS))
        reduce, map_ = rng.choice(REDUCES), rng.choice(rng.choice(MAP_KINDS))
        answer = code_tests((reduce, map_, filter_))
    words = {"reduce": reduce.words, "map": map_.words, "filter": filter_.words}
    prompt = rng.choice(CODE_WORDINGS).format(**words)
    clean, careless = _fenced((reduce, map_, filter_)), _fenced((reduce, map_, EVERY))
    return Problem("code", f"{words}", prompt, clean, careless, answer)


# -------------------------------------------------------------------------------------- streams

MAKERS: dict[str, Callable[[random.Random], Problem]] = {"math": math_problem, "code": code_problem}


def stream(domain: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one domain and split, the same for the same seed."""
    rng = random.Random(f"{domain}-{split}-{seed}")
    while True:
        problem = MAKERS[domain](rng)
        if problem.split == split:
            yield problem


def problems(domain: str, split: str, count: int, seed: int) -> list[Problem]:
    """The first ``count`` problems of a stream that have distinct prompts."""
    found: dict[str, Problem] = {}
    for problem in stream(domain, split, seed):
        found.setdefault(problem.prompt, problem)
        if len(found) == count:
            break
    return list(found.values())
