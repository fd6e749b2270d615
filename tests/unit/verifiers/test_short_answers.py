"""choice, exact, numeric, chartqa and anls."""

import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome
from megatron_opd.verifiers import VERIFIERS
from megatron_opd.verifiers.anls import edits, similarity
from megatron_opd.verifiers.final_answer import final_answer, references


def outcome(kind: str, response: str, reference: str, **options: object) -> Outcome:
    verifier = VERIFIERS[kind](VerifierConfig(**options))
    return verifier.verify("", response, reference).outcome


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"no \boxed{1} but \boxed{18}.", "18"),
        ("<answer>7</answer> no <ANSWER>\n 8 </answer>", "8"),
        (r"<answer>so \boxed{9}</answer>", "9"),
        (r"\boxed{1} <answer>2</answer>", "2"),
        (r"<answer>2</answer> \boxed{1}", "1"),
        ("The answer is 7 cm.\nBye.", "7 cm"),
        ("**Answer:** Paris", "Paris"),
        ("Final answer: `x`\nAnswer:\n42", "42"),
        ("9 + 9 = 18\n#### 18", "18"),
        ("Because of that,\n42.\n", "42"),
        (r"\boxed{\text{Yes}}", "Yes"),
        (r"the answer is 3 \boxed{", ""),
        ("", ""),
    ],
)
def test_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("reference", "accepted"),
    [
        ("Paris", ["Paris"]),
        ('["a", "b"]', ["a", "b"]),
        ("[1, 2]", ["[1, 2]"]),
        ("[", ["["]),
        ("[]", ["[]"]),
    ],
)
def test_references(reference, accepted):
    assert references(reference) == accepted


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        (r"\boxed{B}", "B", 1),
        (r"\boxed{\text{(B)}}", "B", 1),
        ("The answer is B: the fox.", "(B)", 1),
        ("<answer>b</answer>", "B.", 1),
        ("The correct answer is (B) the fox", "B) the fox", 1),
        ("Answer: option B", "B", 1),
        ("The answer is **C**.", "B", 0),
        ("Is it A, B or C?", "B", 0),
        (r"\boxed{A and B}", "A", 0),
        (r"\boxed{AB}", "A", 0),
        ("A fox", "A", 0),
        ("", "B", 0),
        (r"\boxed{B}", "the fox", -1),
    ],
)
def test_choice(response, reference, expected):
    assert outcome("choice", response, reference) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("The answer is Paris.", "paris", 1),
        ("Lyon", '["Paris", "Lyon"]', 1),
        ("I think it is\n'New  York'", "new york", 1),
        ("Paris, France", "Paris", 0),
        ("", "Paris", 0),
        ("", '[""]', 1),
    ],
)
def test_exact(response, reference, expected):
    assert outcome("exact", response, reference) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("It costs $1,250.50 in total.", "1250.5", 1),
        ("The answer is 3/4.", "0.75", 1),
        (r"\boxed{-5}", "-5", 1),
        (r"\boxed{5}", "-5", 0),
        ("Answer: -$5", "-5.0", 1),
        ("1.5e3 m", "1500", 1),
        ("The answer is 50%", "0.5", 1),
        ("The answer is 50%", "50", 1),
        ("The answer is 50%", r"50\%", 1),
        ("The answer is 50%", "5", 0),
        ("10-20", "20", 1),
        ("x2", "2", 0),
        ("0.3333333", "1/3", 1),
        ("0.33", "1/3", 0),
        ("17", "18", 0),
        ("about 12 or 18", "18", 1),
        ("18.", "#### 18", 1),
        ("9" * 5000, "1", 0),
        ("1e999", "1", 0),
        ("none", "1", 0),
        ("1", "one", -1),
    ],
)
def test_numeric(response, reference, expected):
    assert outcome("numeric", response, reference) == expected


@pytest.mark.parametrize(
    ("response", "reference", "expected"),
    [
        ("The answer is 105", "100", 1),
        ("The answer is 95", "100", 1),
        ("The answer is 105.1", "100", 0),
        ("The answer is -100", "100", 0),
        ("1,234", "1234", 1),
        ("52%", "0.5", 1),
        ("52%", "50", 0),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("Brazil", "brazil", 1),
        ("Brasil", "Brazil", 0),
        ("2010", "2014", 1),
        ("nan", "nan", 1),
        ("", "1", 0),
        (r"\boxed{7}", '["5", "7"]', 1),
    ],
)
def test_chartqa(response, reference, expected):
    assert outcome("chartqa", response, reference) == expected


@pytest.mark.parametrize(
    ("response", "reference", "options", "expected"),
    [
        ("The answer is Jon Smith", '["John Smith"]', {}, 1),
        ("The answer is Jon Smith", '["John Smith"]', {"anls_threshold": 0.95}, 0),
        ("18", "19", {}, 0),  # exactly half of it is right: the metric gives 0
        ("2018", "2019", {}, 1),  # and here 0.75
        ("wrong", '["aaaa", "WRONG"]', {"anls_threshold": 0.99}, 1),
        ("x" * 3000, "x", {}, 0),
        ("", "x", {}, 0),
    ],
)
def test_anls(response, reference, options, expected):
    assert outcome("anls", response, reference, **options) == expected


def test_edits():
    assert edits("kitten", "sitting") == edits("sitting", "kitten") == 3
    assert edits("", "abc") == 3
    assert similarity("", "") == 1.0
    assert similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
