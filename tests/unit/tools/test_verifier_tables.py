"""The long run of docs/verifiers.md in small: right, wrong and hostile code mixed, through one pool."""

from __future__ import annotations

import asyncio
from collections import Counter

import psutil
from verifier_tables import measure, soak_cases

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
