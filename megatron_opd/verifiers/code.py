"""Python functions: the last fenced block of the response, run on the inputs of the reference.

    response   "Here it is:\\n```python\\ndef f(xs):\\n    return sum(xs)\\n```"
    reference  '{"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [3, 3]}'   -> CORRECT, "2 tests passed"

This is the function-call form of APPS, PRIME and Eurus: each input is the list of arguments of one call. Those sets
may wrap every output in a list of one; if all outputs are such lists, either reading is accepted, but only one for
all tests. The block may also define ``class Solution`` with the function as a method.

Values are compared in this process, by value and type: True is not 1, 1 is not 1.0, a tuple is a list. What may go
wrong in the other process is described in ``sandbox``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.errors import ProcessError
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown
from megatron_opd.verifiers.sandbox import Run, run_function

FENCE = "```"


@dataclass(frozen=True, slots=True)
class Tests:
    """The parsed reference."""

    fn_name: str
    inputs: list[list]  # the arguments of each call
    outputs: list  # what each call must return


class CodeVerifier:
    """Runs untrusted Python; see ``sandbox`` for what that is protected against."""

    def __init__(self, time_limit_s: float = 4.0) -> None:
        """``time_limit_s``: wall time of all tests of one response together."""
        self._time_limit_s = time_limit_s

    def verify(self, response: str, reference: str) -> Verdict:
        """CORRECT if every test passes; UNKNOWN if the reference or the sandbox is unusable."""
        try:
            tests = parse_tests(reference)
        except ValueError as error:
            return unknown(f"the reference is not a JSON of tests: {clip(error)}")
        source = last_block(response)
        if source is None:
            return incorrect("no fenced block found")
        try:
            run = run_function(source, tests.fn_name, tests.inputs, self._time_limit_s)
        except ProcessError as error:
            return unknown(clip(f"{error.what}: {error.got}"))
        return judge(run, tests.outputs)


def judge(run: Run, outputs: list) -> Verdict:
    """Compare what the function returned with what it should have returned."""
    if run.load_error:
        return incorrect(f"the code does not load: {clip(run.load_error)}")
    readings = [outputs]
    if all(isinstance(output, list) and len(output) == 1 for output in outputs):
        readings.append([output[0] for output in outputs])
    failures = min((_failures(run, reading) for reading in readings), key=len)
    if not failures:
        return correct(f"{len(outputs)} test{'s' if len(outputs) > 1 else ''} passed")
    return incorrect(f"{len(failures)} of {len(outputs)} tests failed; {failures[0]}")


def _failures(run: Run, outputs: Sequence[object]) -> list[str]:
    """One clause for each test that did not pass."""
    clauses = []
    for number, output in enumerate(outputs, start=1):
        if number > len(run.answers):
            clauses.append(f"test {number}: {run.end}")
            continue
        answer = run.answers[number - 1]
        if answer.error is not None:
            clauses.append(f"test {number}: {clip(answer.error)}")
        elif not same(answer.value, output):
            clauses.append(f"test {number}: got {clip(repr(answer.value), 60)}, expected {clip(repr(output), 60)}")
    return clauses


def same(value: object, expected: object) -> bool:
    """Equal in value and type, all the way down. Both come from JSON, so no ``__eq__`` but the built-in ones runs."""
    if type(value) is not type(expected):
        return False
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(same(value[key], expected[key]) for key in value)
    return value == expected


def last_block(text: str) -> str | None:
    """The last closed block between two lines of three backticks, or None. The opening line may name a language."""
    block, lines = None, None
    for line in text.splitlines(keepends=True):
        stripped = line.strip()
        if lines is None:
            if stripped.startswith(FENCE):
                lines = []
        elif stripped == FENCE:
            block, lines = "".join(lines), None
        else:
            lines.append(line)
    return block


def parse_tests(reference: str) -> Tests:
    """Read the reference. Raises ValueError that says what is wrong with it."""
    try:
        plain = json.loads(reference)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(plain, dict):
        raise ValueError(f"got {type(plain).__name__}, expected an object")
    fn_name, inputs, outputs = (plain.get(key) for key in ("fn_name", "inputs", "outputs"))
    if not isinstance(fn_name, str) or not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("fn_name must be a string, inputs and outputs must be lists")
    if not inputs or len(inputs) != len(outputs) or not all(isinstance(arguments, list) for arguments in inputs):
        raise ValueError(f"{len(inputs)} inputs for {len(outputs)} outputs; each input is a list of arguments")
    return Tests(fn_name, inputs, outputs)
