"""The published forms of references: calls, programs and assertions."""

import gzip
import json
import textwrap

import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome
from megatron_opd.verifiers.base import Verdict
from megatron_opd.verifiers.code import CodeVerifier
from megatron_opd.verifiers.code_compare import same_text

INCREMENT = "def f(x):\n    return x + 1"
HUMANEVAL = {
    "prompt": "import math\ndef helper(x):\n    return x * 2\n\ndef f(x: int) -> int:\n    '''Add one.'''\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(helper(2)) == 5\n",
    "entry_point": "f",
}


@pytest.fixture(scope="module")
def verifier() -> CodeVerifier:
    return CodeVerifier(VerifierConfig(timeout_s=10))


@pytest.fixture
def check(verifier):
    def judge(source: str, reference: object) -> Verdict:
        return verifier.verify("", f"```python\n{textwrap.dedent(source)}\n```", json.dumps(reference))

    return judge


@pytest.mark.parametrize(
    "reference",
    [
        {"fn_name": "f", "tests": [{"input": "1", "output": "2", "testtype": "functional"}]},
        {"fn_name": "f", "inputs": ["1", "5"], "outputs": ["2", "6"]},
        HUMANEVAL,
        {"test": "for x in range(9):\n    assert f(x) == x + 1, x"},
        {"test_list": ["assert f(1) == 2", "assert math.isclose(f(2), 3)"], "test_setup_code": "import math"},
        {"test_list": ["assert f(1) == 2"], "test_imports": ["import math"]},
        {"assert_case": ["assert f(x=1) == 2"]},
    ],
)
def test_functions(check, reference):
    assert check(INCREMENT, reference).outcome is Outcome.CORRECT
    assert check("def f(x):\n    return x + 2", reference).outcome is Outcome.INCORRECT
    assert check("def g(x):\n    return x + 1", reference).outcome is Outcome.INCORRECT


@pytest.mark.parametrize(
    "reference",
    [
        {"inputs": ["1\n2\n", "5 5"], "outputs": ["3\n", "10"]},
        {"inputs": [["1", "2"]], "outputs": [["3"]]},
        [{"input": "1 2", "output": "3", "testtype": "stdin"}, {"input": "0 0", "output": "0", "testtype": "stdin"}],
    ],
)
def test_programs(check, reference):
    right = """
        import sys
        if __name__ == "__main__":
            print(sum(map(int, sys.stdin.read().split())))
    """
    assert check(right, reference).outcome is Outcome.CORRECT
    wrong = check(right.replace("sum", "max"), reference)
    assert wrong.outcome is Outcome.INCORRECT
    assert "tests failed; test 1: printed" in wrong.reason


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nprint(input())\nsys.exit()",
        "import os\nprint(open(0).read())",
        "print(input(), flush=True)\nimport os\nos._exit(0)",
        "import threading\nt = threading.Thread(target=lambda: print(input()))\nt.start()",
        "import atexit\nx = input()\natexit.register(lambda: print(x))",
        "import sys\nsys.stdout.write(sys.stdin.buffer.readline().decode())",
    ],
)
def test_ways_to_end_a_program(check, program):
    assert check(program, {"inputs": ["a"], "outputs": ["a"]}) == Verdict(Outcome.CORRECT, "1 test passed")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("print('a')\n1 / 0", "ZeroDivisionError: division by zero"),
        ("print('a')\nraise SystemExit(3)", "SystemExit: 3"),
        ("print('a', flush=True)\nimport os\nos._exit(3)", "exited with code 3 before it answered"),
        ("print('a', flush=True)\nimport os\nos.abort()", "ended by SIGABRT"),
        ("print('a'\n", "SyntaxError: '(' was never closed (response.py, line 1)"),
        ("while True: print('a' * 9999)", "OSError: [Errno 27] File too large"),
        ("print('b')", "printed 'b\\n', expected 'a'"),
        ("", "printed '', expected 'a'"),
    ],
)
def test_programs_that_fail(check, program, reason):
    verdict = check(program, {"inputs": [""], "outputs": ["a"]})
    assert verdict == Verdict(Outcome.INCORRECT, f"1 of 1 tests failed; test 1: {reason}")


def test_every_program_starts_afresh(check):
    program = "import os\nprint(os.path.exists('mine') and 'old')\nimport math\nmath.pi = 3\nprint(math.tau > 6)"
    assert check(program, {"inputs": ["", ""], "outputs": ["False\nTrue"] * 2}).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("printed", "expected", "equal"),
    [
        ("1 2\n", "1 2", True),
        ("1  \n2\n\n", "1\n2", True),
        ("1\n2", "1 2", False),
        ("1 2", "1\n2", False),
        ("0.3333333", "0.33333333333", True),
        ("0.33", "0.3333", False),
        ("1.0", "1", False),
        ("1", "1.0", True),
        ("yes", "Yes", False),
        ("nan", "1.0", False),
        ("", "", True),
    ],
)
def test_printed_texts(printed, expected, equal):
    assert same_text(printed, expected) is equal


def test_values_of_assertions_keep_their_types(check):
    returned = "(1, [2.5], {3: {4}}, None, True, b'x', 1 + 2j, frozenset([5]), 10**30, float('inf'), 'a')"
    source = f"def f():\n    return {returned}"
    assert check(source, {"test": f"v = f()\nassert v == {returned} and type(v[4]) is bool"}).outcome is Outcome.CORRECT
    assert check("def f(): return [1]", {"test": "assert f() == (1,)"}).outcome is Outcome.INCORRECT


def test_exceptions_and_arguments_arrive(check):
    source = "def f(x, *, y=0):\n    if y: raise ValueError(y)\n    return x"
    tests = "try:\n    f(1, y=2)\n    assert 0\nexcept ValueError as error:\n    assert str(error) == 'ValueError: 2'"
    assert check(source, {"test": tests}).outcome is Outcome.CORRECT
    assert check("def f(x, *, y=0): return x", {"test": tests}).outcome is Outcome.INCORRECT


def test_a_failed_assertion_is_told(check):
    verdict = check("def f(x): return x", {"test": "import math\nassert f(1) == 2, 'no'\nassert f(2) == 3"})
    reason = "a test failed; AssertionError: no in: assert f(1) == 2, 'no'"
    assert verdict == Verdict(Outcome.INCORRECT, reason)


def test_the_prompt_lends_its_imports_to_the_response(check):
    assert check("def f(x):\n    return math.floor(x) + 1", HUMANEVAL).outcome is Outcome.CORRECT


def test_humaneval(verifier, humaneval):
    """Every tenth problem; tools/verifier_tables.py runs all."""
    with gzip.open(humaneval, "rt") as file:
        rows = [json.loads(line) for line in file][::10]
    assert len(rows) == 17
    for row in rows:
        reference = json.dumps({key: row[key] for key in ("prompt", "test", "entry_point")})
        for body, outcome in ((row["canonical_solution"], 1), ("    pass\n", 0), ("    return 'wrong'\n", 0)):
            verdict = verifier.verify("", f"```python\n{row['prompt']}{body}\n```", reference)
            assert verdict.outcome == outcome, (row["task_id"], body, verdict)
