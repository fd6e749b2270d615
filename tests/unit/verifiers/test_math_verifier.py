import json

import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome
from megatron_opd.verifiers.math import MathVerifier, last_box, reference_answer


@pytest.fixture(scope="module")
def verifier() -> MathVerifier:
    return MathVerifier(VerifierConfig())


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("18", "18"),
        ("18", "so 9 * 2 = 18\n#### 18"),
        ("1,000", "#### 1000"),
        ("1000", "#### 1,000"),
        ("18.00", "18"),
        ("18.", "18"),
        (r"\$18", "18"),
        ("$18$", "18"),
        (r"18\text{ dollars}", "18"),
        ("x = 18", "18"),
        ("9 + 9", "18"),
        ("-3", "-3"),
        ("0.5", r"\frac{1}{2}"),
        (r"\dfrac12", "1/2"),
        (r"\frac{\sqrt{12}}{2}", r"$\sqrt{3}$"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("18", r"Therefore \boxed{18}."),
        ("18 dollars", "18"),
        ("1,800 square meters", "1800"),
        (r"18\,\mathrm{cm}^2", "18"),
        (r"108^\circ", r"108^{\circ}"),
        ("1.8e3", "1800"),
        (r"50\%", "0.5"),
        (r"50\%", "50"),
        ("0.5", r"50\%"),
        ("50%", r"50\%"),
        (r"12\text{ percent}", "12 percent"),
        (r"33\frac{1}{3}\%", r"\frac{1}{3}"),
        ("(0, 1]", "(0, 1.0]"),
        (r"x \in [1,2)", "[1,2)"),
        ("[-1,1]", r"-1 \le x \le 1"),
        (r"(-\infty,3)\cup(5,\infty)", r"(-\infty, 3) \cup (5, \infty)"),
        (r"3, -3", r"\pm 3"),
        ("1, 2", r"\{2,1\}"),
        (r"a^2 + 2ab + b^2", "(a+b)^2"),
        (r"\text{(B)}", "B"),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2.0\end{pmatrix}"),
    ],
)
def test_equal_values_in_other_forms(verifier, answer, reference):
    verdict = verifier.verify("", rf"So it is \boxed{{{answer}}}.", reference)
    assert (verdict.outcome, verdict.reason) == (Outcome.CORRECT, "equal")


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("17", "18"),
        ("-18", "18"),
        ("180", "18"),
        ("1.8", "18"),
        ("17, 18", "18"),
        (r"17 \text{ or } 18", "18"),
        (r"\{17, 18\}", "18"),
        (r"18 \neq 17", "18"),
        ("maybe 17 maybe 18", "18"),
        (r"\frac{1}{3}", "0.5"),
        (r"\infty", "18"),
        ("1.8e2", "18"),
        ("18 million", "18000"),
        (r"5\%", "0.5"),
        (r"50\%", r"5\%"),
        (r"50\%", "5000"),
        ("(0,1]", "[0,1]"),
        ("(1,2)", "(2,1)"),
        (r"\{1,2,3\}", r"\{1,2\}"),
    ],
)
def test_other_values(verifier, answer, reference):
    verdict = verifier.verify("", rf"So it is \boxed{{{answer}}}.", reference)
    assert verdict.outcome is Outcome.INCORRECT
    assert verdict.reason == f"got {answer}, expected {reference}"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("the answer is 18", r"no \boxed{} found"),
        ("", r"no \boxed{} found"),
        (r"\boxed{}", r"the last \boxed{} is empty or not closed"),
        (r"\boxed{18} or \boxed{18", r"the last \boxed{} is empty or not closed"),
        (rf"\boxed{{{'1' * 3000}}}", r"the last \boxed{} has 3000 characters, more than 2000"),
        (rf"\boxed{{{'{' * 100_000}", r"the last \boxed{} is empty or not closed"),
    ],
)
def test_no_usable_box(verifier, response, reason):
    verdict = verifier.verify("", response, "18")
    assert (verdict.outcome, verdict.reason) == (Outcome.INCORRECT, reason)


def test_the_last_box_counts(verifier):
    assert verifier.verify("", r"\boxed{17}, no: \boxed{18}", "18").outcome is Outcome.CORRECT
    assert verifier.verify("", r"\boxed{18}, no: \boxed{17}", "18").outcome is Outcome.INCORRECT


def test_a_crash_of_math_verify_is_unknown(verifier, monkeypatch):
    def crash(*_arguments, **_options):
        raise RecursionError("too deep")

    monkeypatch.setattr(verifier, "_compare", crash)
    verdict = verifier.verify("", r"\boxed{17}", "18")
    assert (verdict.outcome, verdict.reason) == (Outcome.UNKNOWN, "Math-Verify failed: RecursionError: too deep")


def test_a_reference_without_mathematics_is_unknown(verifier):
    verdict = verifier.verify("", r"\boxed{17}", "#### ")
    assert (verdict.outcome, verdict.reason) == (Outcome.UNKNOWN, "the reference is not mathematics: ")


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}} and }", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right"),
        (r"\boxed{1 \\}", r"1 \\"),
        (r"\boxed{ $5$. }", "5"),
        ("boxed{5}", None),
    ],
)
def test_last_box(text, content):
    assert last_box(text) == content


def test_reference_answer():
    assert reference_answer("a #### 1\nb\n#### 2\n") == "2"
    assert reference_answer(" 3 ") == "3"


def test_gsm8k(verifier, gsm8k):
    lines = gsm8k.read_text().splitlines()[:400:8]
    references = [json.loads(line)["answer"] for line in lines]
    answers = [reference_answer(reference) for reference in references]
    assert len(references) == 50
    refused = 0
    for number, (answer, reference) in enumerate(zip(answers, references, strict=True)):
        assert verifier.verify("", rf"\boxed{{{answer}}}", reference).outcome is Outcome.CORRECT
        assert verifier.verify("", rf"\boxed{{{answer}.0}}", reference).outcome is Outcome.CORRECT
        neighbour = answers[number - 1]
        if neighbour != answer:
            assert verifier.verify("", rf"\boxed{{{neighbour}}}", reference).outcome is Outcome.INCORRECT
            refused += 1
    assert refused > 40
