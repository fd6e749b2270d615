"""The tables of docs/verifiers.md: real data, and the long run of hostile code in small."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import psutil
import pytest
from verifier_tables import FORMS, Case, against_itself, against_neighbour, humaneval, measure, soak_cases

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome

RUNS = 120  # none of which runs into a time limit; the tool does 10,000


def test_a_pool_survives_hostile_code_and_says_what_is_expected() -> None:
    cases = soak_cases(RUNS)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    measured = asyncio.run(measure(VerifierConfig(workers=2, timeout_s=60), cases))
    assert measured.mistakes == []
    assert measured.outcomes == Counter(case.expected for case in cases)
    assert measured.outcomes[Outcome.CORRECT] > 0 and measured.outcomes[Outcome.INCORRECT] > RUNS / 2
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not [child for child in left if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


def assert_as_expected(cases: list[Case], problems: int) -> None:
    measured = asyncio.run(measure(VerifierConfig(workers=2, timeout_s=60), cases))
    assert len(cases) == problems and measured.mistakes == []


@pytest.mark.parametrize(
    ("body", "expected"),
    [(None, Outcome.CORRECT), ("    pass\n", Outcome.INCORRECT), ("    return 'other'\n", Outcome.INCORRECT)],
    ids=["canonical", "pass", "wrong"],
)
def test_all_of_humaneval(request: pytest.FixtureRequest, body: str | None, expected: Outcome) -> None:
    path = request.getfixturevalue("humaneval")
    assert_as_expected(humaneval(path, lambda row: body or row["canonical_solution"], expected), 164)


@pytest.mark.parametrize("form", FORMS)
def test_gsm8k(gsm8k: Path, form: str) -> None:
    """Every tenth reference; the tool takes all."""
    assert_as_expected(against_itself(gsm8k, FORMS[form])[::10], 132)
    assert_as_expected(against_neighbour(gsm8k, FORMS[form])[::10], 132)


@pytest.mark.parametrize("form", FORMS)
def test_all_of_aime24(aime24: Path, form: str) -> None:
    assert_as_expected(against_itself(aime24, FORMS[form]), 30)
    assert_as_expected(against_neighbour(aime24, FORMS[form]), 30)
