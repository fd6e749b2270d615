"""Questions about bar charts, each with a clean and a careless solution, as ``toy/world.py`` has them for text.

``chart`` asks for a height, or for a sum or difference of two; the second bar may be one of a second chart.  The clean
solution reads both bars and computes; the careless one stops after the first.  The words are those of the text world:
the tokenizer knows them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from toy.world import EASY_SHARE, Problem
from toy.world import stream as text_stream
from toy_multimodal.charts import COLOURS, Chart, draw_chart

MARK = "<image>"  # in a prompt: here comes the next image
READ = ("{i}How many {a}?", "{i}Compute {a}.", "How many {a}?{i}")
ADD = ("{i}How many {a} and {b}?", "{i}Compute {a} + {b}.", "Compute {a} + {b}.{i}")
SUB = ("{i}How many {a} minus {b}?", "{i}Compute {a} - {b}.", "Compute {a} - {b}.{i}")
TWO_SHARE = 0.3  # of the questions with two bars: the second is of a second chart


@dataclass(frozen=True)
class ChartProblem(Problem):
    """A problem whose prompt marks where its charts go."""

    charts: tuple[Chart, ...] = ()


def chart_problem(rng: random.Random) -> ChartProblem:
    """One question; a fifth of them have nothing to skip."""
    if rng.random() < EASY_SHARE:
        chart, name = draw_chart(rng), rng.choice(list(COLOURS))
        value = chart.value(name)
        solution = f"{value}\n\\boxed{{{value}}}"
        return _problem(rng.choice(READ).format(i=MARK, a=name), (chart,), solution, solution, value)
    charts = tuple(draw_chart(rng) for _ in range(1 + (rng.random() < TWO_SHARE)))
    names = rng.choices(list(COLOURS), k=2) if len(charts) == 2 else rng.sample(list(COLOURS), 2)
    first, second = charts[0].value(names[0]), charts[-1].value(names[1])
    kind = rng.choice((ADD, SUB)) if first >= second else ADD
    sign, result = ("+", first + second) if kind is ADD else ("-", first - second)
    clean, careless = f"{first}{sign}{second}={result}\n\\boxed{{{result}}}", f"{first}\n\\boxed{{{first}}}"
    prompt = rng.choice(kind).format(i=MARK * len(charts), a=names[0], b=names[1])
    return _problem(prompt, charts, clean, careless, result)


def _problem(prompt: str, charts: tuple[Chart, ...], clean: str, careless: str, answer: int) -> ChartProblem:
    return ChartProblem("chart", f"{prompt}{charts}", prompt, clean, careless, str(answer), charts=charts)


def stream(domain: str, split: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one domain, ``chart`` or one of text, and split; the same for the same seed."""
    if domain != "chart":
        yield from text_stream(domain, split, seed)
    rng = random.Random(f"{domain}-{split}-{seed}")
    while True:
        problem = chart_problem(rng)
        if problem.split == split:
            yield problem
