"""The tests in a reference, in the forms that data sets publish. All are JSON.

{"fn_name": "f", "inputs": [[1, 2]], "outputs": [3]}                     calls: APPS, PRIME, Eurus
{"inputs": ["1 2\\n"], "outputs": ["3\\n"]}                              programs: the same sets
[{"input": "1 2\\n", "output": "3\\n", "testtype": "stdin"}]             programs: LiveCodeBench
{"fn_name": "f", "tests": [{"input": "1\\n2", "output": "3"}]}           calls: LiveCodeBench, a line per argument
{"prompt": "...", "test": "def check(candidate): ...", "entry_point": "f"}   assertions: HumanEval, HumanEval+
{"test": "assert f(1, 2) == 3"}                                          assertions: MBPP+
{"test_list": ["assert f(1, 2) == 3"], "test_setup_code": "import math"}     assertions: MBPP
{"assert_case": ["assert f(1, 2) == 3"]}                                 assertions: AceCode, Eurus
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from megatron_opd.verifiers.sandbox import Request

EXPECTED_FORMS = "inputs and outputs, tests, test, test_list or assert_case"


@dataclass(frozen=True, slots=True)
class Tests:
    """The parsed reference."""

    request: dict  # fields of sandbox.Request, without the source
    outputs: list = field(default_factory=list)  # calls: what each returns; programs: what each prints

    def of(self, source: str) -> Request:
        """What to run for one response."""
        return Request(source=source, **self.request)


def parse_tests(reference: str) -> Tests:
    """Read the reference. Raises ValueError that says what is wrong with it."""
    try:
        plain = json.loads(reference)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if isinstance(plain, list):
        plain = {"tests": plain}
    if not isinstance(plain, dict):
        raise ValueError(f"got {type(plain).__name__}, expected an object")
    if "tests" in plain:
        plain = _from_livecodebench(plain)
    if "inputs" in plain or "outputs" in plain:
        return _pairs(plain)
    return _assertions(plain)


def _from_livecodebench(plain: dict) -> dict:
    """Its list of tests as inputs and outputs."""
    tests = plain["tests"]
    if not isinstance(tests, list) or not all(
        isinstance(test, dict) and {"input", "output"} <= set(test) for test in tests
    ):
        raise ValueError("tests must be a list of objects with input and output")
    if any(test.get("testtype") == "functional" for test in tests) and not plain.get("fn_name"):
        raise ValueError("functional tests need fn_name")
    pairs = {"inputs": [test["input"] for test in tests], "outputs": [test["output"] for test in tests]}
    return pairs | {"fn_name": plain.get("fn_name")}


def _pairs(plain: dict) -> Tests:
    fn_name, inputs, outputs = (plain.get(key) for key in ("fn_name", "inputs", "outputs"))
    if not isinstance(fn_name, str | None) or not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("fn_name must be a string, inputs and outputs must be lists")
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs")
    if not fn_name:
        texts = [_text(item) for item in inputs]
        return Tests({"mode": "programs", "inputs": texts}, [_text(item) for item in outputs])
    calls = [_lines_of_json(item) if isinstance(item, str) else item for item in inputs]
    if not all(isinstance(arguments, list) for arguments in calls):
        raise ValueError("each input of a function is a list of arguments, or text with one JSON value on each line")
    if all(isinstance(item, str) for item in inputs):  # then the outputs are JSON texts too
        outputs = [json.loads(item) if isinstance(item, str) else item for item in outputs]
    return Tests({"mode": "calls", "inputs": calls, "fn_name": fn_name}, outputs)


def _text(item: object) -> str:
    """What a program reads or prints; some sets give a list of lines."""
    lines = item if isinstance(item, list) else [item]
    if not all(isinstance(line, str) for line in lines):
        raise ValueError("without fn_name, inputs and outputs are texts, or lists of lines")
    return "\n".join(lines)


def _lines_of_json(text: str) -> list:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _assertions(plain: dict) -> Tests:
    parts: list[str] = []
    for key in ("test_imports", "test_setup_code", "test_list", "assert_case", "test"):
        value = plain.get(key) or []
        lines = [value] if isinstance(value, str) else value
        if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
            raise ValueError(f"{key} must be code or a list of lines of code")
        parts += lines
    prelude, entry = plain.get("prompt", ""), plain.get("entry_point", "")
    if not isinstance(prelude, str) or not isinstance(entry, str) or (entry and not entry.isidentifier()):
        raise ValueError("prompt must be code, entry_point the name of a function")
    if not any(part.strip() for part in parts):
        raise ValueError(f"no tests: expected {EXPECTED_FORMS}")
    code = "\n".join(parts) + (f"\n\ncheck({entry})\n" if entry else "\n")
    for name, text in (("prompt", prelude), ("the test", code)):
        try:
            compile(text, name, "exec")
        except SyntaxError as error:
            raise ValueError(f"{name} is not Python: {error}") from error
    return Tests({"mode": "assertions", "fn_name": entry, "prelude": prelude, "tests": code})
