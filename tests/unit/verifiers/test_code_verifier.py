import json
import subprocess
import sys
import textwrap
import time

import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome
from megatron_opd.verifiers import sandbox
from megatron_opd.verifiers.base import OWN_SHARE, Verdict
from megatron_opd.verifiers.code import CodeVerifier, last_block

EVENS = json.dumps({"fn_name": "f", "inputs": [[[1, 2, 4]], [[3]], [[-2]]], "outputs": [6, 0, -2]})
RIGHT = "def f(xs):\n    return sum(x for x in xs if x % 2 == 0)\n"


def cases(*pairs: tuple[list, object]) -> str:
    return json.dumps({"fn_name": "f", "inputs": [a for a, _ in pairs], "outputs": [b for _, b in pairs]})


def verifier(limit: float = 5.0) -> CodeVerifier:
    return CodeVerifier(VerifierConfig(timeout_s=limit / OWN_SHARE))


def check(source: str, reference: str = EVENS, limit: float = 5.0) -> Verdict:
    return verifier(limit).verify("", f"Here:\n```python\n{textwrap.dedent(source)}\n```\n", reference)


def test_a_right_function():
    assert check(RIGHT) == Verdict(Outcome.CORRECT, "3 tests passed")


def test_a_function_that_ignores_the_condition():
    verdict = check("def f(xs):\n    return sum(xs)")
    assert verdict == Verdict(Outcome.INCORRECT, "2 of 3 tests failed; test 1: got 7, expected 6")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("return 1 / 0", "test 1: ZeroDivisionError: division by zero"),
        ("import sys; sys.exit(0)", "test 1: SystemExit: 0"),
        ("import os; os._exit(0)", "test 1: exited with code 0 before it answered"),
        ("print(6)", "test 1: got None, expected 6"),
        ("import os; os.write(1, b'[\"value\", 6]\\n'); os._exit(0)", "test 1: exited with code 0 before it answered"),
        ("import ctypes", "test 1: ModuleNotFoundError: import of ctypes halted; None in sys.modules"),
        ("import os; os.fork()", "test 1: PermissionError: os.fork is not allowed"),
        ("import os; os.system('true')", "test 1: PermissionError: os.system is not allowed"),
        ("import os; os.kill(-1, 9)", "test 1: PermissionError: os.kill is not allowed"),
        ("import subprocess; subprocess.run(['true'])", "test 1: PermissionError: subprocess.Popen is not allowed"),
        ("import socket; socket.socket()", "test 1: PermissionError: socket.__new__ is not allowed"),
        ("return [0] * 10**9", "test 1: MemoryError:"),
        ("while True: print('x' * 1000)", "test 1: OSError: [Errno 27] File too large"),
        ("return 'x' * 10**7", f"test 1: an answer of more than {sandbox.FILE_BYTES} bytes"),
        ("return f(xs)", "test 1: RecursionError: maximum recursion depth exceeded"),
        ("return input()", "test 1: EOFError: EOF when reading a line"),
        ("return {1, 2}", "test 1: got {1, 2}, expected 6"),
    ],
)
def test_failures_inside_the_function(body, reason):
    verdict = check(f"def f(xs):\n    {body}")
    assert verdict == Verdict(Outcome.INCORRECT, f"3 of 3 tests failed; {reason}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("def f(xs) return", "the code does not load: SyntaxError: expected ':' (response.py, line 1)"),
        ("raise SystemExit(0)", "the code does not load: SystemExit: 0"),
        ("def g(xs): return 6", "the code does not load: AttributeError: module 'response' has no attribute 'f'"),
        ("import nowhere", "the code does not load: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_code_that_does_not_load(source, reason):
    assert check(source) == Verdict(Outcome.INCORRECT, reason)


@pytest.mark.parametrize("loop", ["while True: pass", "import time; time.sleep(60)"])
def test_endless_loops(loop):
    started = time.monotonic()
    verdict = check(f"def f(xs):\n    {loop}", limit=0.5)
    assert verdict == Verdict(Outcome.INCORRECT, "3 of 3 tests failed; test 1: timed out after 0.5 s")
    assert time.monotonic() - started < 3


def test_the_tests_before_a_loop_count():
    verdict = check("def f(xs):\n    while len(xs) == 1: pass\n    return 6", limit=0.5)
    assert verdict == Verdict(Outcome.INCORRECT, "2 of 3 tests failed; test 2: timed out after 0.5 s")


def test_objects_that_claim_to_be_equal():
    tricks = """
        class Same(int):
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __hash__ = int.__hash__
            def __repr__(self): return "6"
            __str__ = __repr__
        def f(xs):
            return Same(41)
    """
    assert check(tricks) == Verdict(Outcome.INCORRECT, "3 of 3 tests failed; test 1: got 41, expected 6")
    verdict = check("class Same:\n    def __eq__(self, other): return True\ndef f(xs): return Same()")
    assert verdict.reason.endswith("TypeError: Same is not a plain value")


def test_the_channel_holds_no_answers():
    """Code that finds the channel and its runner's frames can write rows, but knows no outputs to write."""
    verdict = check(
        """
        import os, sys
        def f(xs):
            request = sys._getframe(1).f_locals["request"]
            for row in [b'["value", 6]', b'["value", true]', b'["value", 0]']:
                for descriptor in range(3, 8):
                    try: os.write(descriptor, row + bytes([10]))
                    except OSError: pass
            return request.get("outputs", -1)
        """
    )
    assert verdict.outcome is Outcome.INCORRECT


def test_rows_that_are_no_rows():
    verdict = check("import os\ndef f(xs):\n    [os.write(d, b'{[\\n') for d in (3, 4)]\n    return 6")
    assert verdict.outcome is Outcome.INCORRECT


@pytest.mark.parametrize(
    ("returned", "expected", "equal"),
    [
        ("True", 1, False),
        ("1", True, False),
        ("1.0", 1, True),
        ("1", 1.0, True),
        ("0.0", False, False),
        ("'1'", 1, False),
        ("(1, [2])", [1, [2]], True),
        ("[1, True]", [1, 1], False),
        ("{'a': 1, 'b': None}", {"b": None, "a": 1}, True),
        ("{'a': True}", {"a": 1}, False),
        ("0.1 + 0.2", 0.30000000000000004, True),
        ("{7: 2, None: 3}", {"7": 2, "null": 3}, True),
        ("{1}", [1], False),
        ("10**5000", "x", False),
        ("__import__('numpy').arange(3)", [0, 1, 2], True),
        ("__import__('numpy').int64(3)", 3, True),
        ("'\\u00e9\\ud800'", "\u00e9\ud800", True),
        ("None", None, True),
    ],
)
def test_values_are_compared_by_kind_too(returned, expected, equal):
    verdict = check(f"def f(): return {returned}", cases(([], expected)))
    assert verdict.outcome is (Outcome.CORRECT if equal else Outcome.INCORRECT)


def test_outputs_wrapped_in_lists_of_one():
    wrapped = cases(([1], [2]), ([2], [3]))
    assert check("def f(x): return x + 1", wrapped).outcome is Outcome.CORRECT
    assert check("def f(x): return [x + 1]", wrapped).outcome is Outcome.CORRECT
    mixed = check("def f(x): return [2] if x == 1 else 3", wrapped)
    assert mixed == Verdict(Outcome.INCORRECT, "1 of 2 tests failed; test 2: got 3, expected [3]")
    assert check("def f(x): return x + 1", cases(([1], [2]), ([2], [3, 3]))).outcome is Outcome.INCORRECT


def test_methods_imports_and_dataclasses():
    source = """
        from __future__ import annotations
        from dataclasses import dataclass
        from collections import Counter
        @dataclass
        class Point:
            x: int
        class Solution:
            def f(self, x: int) -> int:
                return Point(x).x + Counter("aab")["a"]
        if __name__ == "__main__":
            raise ValueError
    """
    assert check(source, cases(([3], 5))).outcome is Outcome.CORRECT


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("18", "got int, expected an object"),
        ("{", "Expecting property name"),
        ('{"fn_name": "f"}', "no tests: expected inputs and outputs, tests, test, test_list or assert_case"),
        ('{"fn_name": "f", "inputs": 1}', "fn_name must be a string, inputs and outputs must be lists"),
        ('{"inputs": [1], "outputs": ["1"]}', "without fn_name, inputs and outputs are texts, or lists of lines"),
        ('{"test": "assert f("}', "the test is not Python"),
        ('{"test": "assert f()", "prompt": "def"}', "prompt is not Python"),
        ('{"test": ["assert f()", 1]}', "test must be code or a list of lines of code"),
        ('{"test": "assert f()", "entry_point": "f(); x"}', "entry_point the name of a function"),
        ('[{"input": "1"}]', "tests must be a list of objects with input and output"),
        ('[{"input": "1", "output": "1", "testtype": "functional"}]', "functional tests need fn_name"),
        ('{"fn_name": "f", "inputs": [], "outputs": []}', "0 inputs for 0 outputs"),
        ('{"fn_name": "f", "inputs": [[1]], "outputs": [1, 2]}', "1 inputs for 2 outputs"),
        ('{"fn_name": "f", "inputs": [1], "outputs": [1]}', "each input of a function is a list of arguments"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_an_unusable_reference_is_unknown(reference, reason):
    verdict = check(RIGHT, reference)
    assert verdict.outcome is Outcome.UNKNOWN
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\nand\n```\nb\nc\n```", "b\nc\n"),
        ("```python\na\n```\nand\n```python\nb", "a\n"),
        ("  ```py\na\n  ```", "a\n"),
        ("```python\n```", ""),
        ("def f(): pass", None),
        ("```python\na", None),
        ("", None),
    ],
)
def test_last_block(text, block):
    assert last_block(text) == block


def test_no_block():
    assert verifier().verify("", RIGHT, EVENS) == Verdict(Outcome.INCORRECT, "no fenced block found")


def test_importing_the_package_is_cheap():
    code = "import sys, megatron_opd.verifiers; sys.exit(', '.join({'sympy', 'math_verify'} & set(sys.modules)) or 0)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
