"""From outcomes to the numbers of a benchmark, the file of problems, and the comparison of two."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from megatron_opd.errors import DataError
from megatron_opd.evaluation.compare import compare, other_settings
from megatron_opd.evaluation.console import EvaluationConsole
from megatron_opd.evaluation.results import Evaluation, Problem, read_problems, score, write_problems


def problem(number: int, outcomes: list[int], text: str = "") -> Problem:
    size = len(outcomes)
    name = f"q{number}{text}"
    return Problem("a", f"a/{number}", name, outcomes, list(range(1, size + 1)), [False] * (size - 1) + [True], None)


KNOWN = [problem(1, [1, 1, 0, 0]), problem(2, [0, 0, 0, 0])]
UNKNOWN = [problem(3, [1, -1, -1, -1]), problem(4, [-1, -1, -1, -1])]


def test_unknown_outcomes_are_neither_right_nor_wrong() -> None:
    found = score([*KNOWN, *UNKNOWN], [1, 2, 4, 8], seed=0)
    assert (found.problems, found.samples, found.unknown) == (4, 4, 7 / 16)
    assert found.accuracy.value == pytest.approx((0.5 + 0 + 1) / 3) and found.accuracy.problems == 3
    assert list(found.pass_at) == [1, 2, 4]  # 8 is more than was drawn
    assert found.pass_at[1] == found.accuracy
    assert found.pass_at[2].value == pytest.approx((5 / 6 + 0) / 2) and found.pass_at[2].problems == 2
    assert (found.length, found.longest, found.cut) == (2.5, 4, 0.25)
    nothing = score([problem(4, [-1, -1])], [1], seed=0)
    assert nothing.accuracy is None and nothing.pass_at == {1: None} and nothing.unknown == 1.0


def save(folder: Path, name: str, problems: list[Problem], **settings: object) -> Path:
    path = folder / f"{name}.parquet"
    write_problems(path, Evaluation(problems, f"models/{name}", settings))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = Evaluation([*KNOWN, *UNKNOWN], "m", {"limit": None, "engine.dtype": "float32"})
    write_problems(tmp_path / "problems.parquet", written)
    assert read_problems(tmp_path) == written


def test_a_comparison_is_over_the_problems_that_both_could_be_graded_on(tmp_path: Path) -> None:
    a = save(tmp_path, "a", [*KNOWN, *UNKNOWN], temperature=1.0)
    better = [problem(4, [1, 1, 1, 1]), problem(3, [1, 1, 1, 1]), problem(2, [1, 0, 0, 0]), problem(1, [1, 1, 1, 0])]
    b = save(tmp_path, "b", better, temperature=0.7)  # in another order
    first, second, found = compare(a, b)
    assert other_settings(first, second) == ["temperature: 1.0 and 0.7"]
    row = found["a"]
    assert row.left_out == 1 and row.first == pytest.approx(0.5) and row.second == pytest.approx(2 / 3)
    assert row.difference.estimate.value == pytest.approx(1 / 6) and row.difference.p_value == 0.5
    assert (row.difference.better, row.difference.worse) == (2, 0)


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ([KNOWN[0]], "1 only in the first, such as a/2"),
        ([*KNOWN, UNKNOWN[0]], "1 only in the second, such as a/3"),
        ([KNOWN[0], problem(2, [1, 1, 1, 1], "changed")], "1 with another text or answer, such as a/2"),
    ],
)
def test_other_problems_are_not_compared(tmp_path: Path, other: list[Problem], told: str) -> None:
    with pytest.raises(DataError, match=told):
        compare(save(tmp_path, "a", KNOWN), save(tmp_path, "b", other))


def test_what_a_person_sees(tmp_path: Path) -> None:
    output = io.StringIO()
    console = EvaluationConsole(Console(file=output, width=80, soft_wrap=True))
    console.scores({"a": score([*KNOWN, *UNKNOWN], [1, 2], 0), "b": score([problem(4, [-1])], [1], 0)})
    rows = [line.split() for line in output.getvalue().splitlines()]
    assert ["a", "4", "x", "4", "50.0", "(28.9)", "0.0..100.0", "41.7", "@2", "2", "25.0", "43.8"] in rows
    assert any(row[:6] == ["b", "1", "x", "1", "-", "(-)"] for row in rows)
    first, second = save(tmp_path, "a", [*KNOWN, *UNKNOWN]), save(tmp_path, "b", [*KNOWN, *UNKNOWN])
    console.comparison(("models/a", "models/b"), compare(first, second)[2], ["limit: 3 and 4"])
    text = output.getvalue()
    assert "A = models/a\nB = models/b\nwarning: not done alike: limit: 3 and 4" in text
    assert "+0.0 (0.0)" in text and "1.0000" in text and "a: 1 problems are left out" in text
