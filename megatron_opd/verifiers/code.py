"""Python code: the last fenced block of the response, run on the tests of the reference.

    response   "Here it is:\\n```python\\ndef f(xs):\\n    return sum(xs)\\n```"
    reference  '{"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [3, 3]}'   -> CORRECT, "2 tests passed"

``code_tests`` lists the forms of references; ``sandbox`` tells what happens to the code, and what cannot happen.
Sets of calls may wrap every output in a list of one; if all outputs are such lists, either reading is accepted, but
only one for all tests. The block may also define ``class Solution`` with the function as a method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ProcessError
from megatron_opd.verifiers import sandbox
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, own_limit_s, unknown
from megatron_opd.verifiers.code_compare import same_text, same_value
from megatron_opd.verifiers.code_tests import Tests, parse_tests

FENCE = "```"


class CodeVerifier:
    """Runs untrusted Python."""

    def __init__(self, config: VerifierConfig) -> None:
        """Find the level of the sandbox. Raises ProcessError if the wanted one does not work here."""
        self._sandbox = sandbox.Sandbox(sandbox.choose(config.sandbox))
        self._time_limit_s = own_limit_s(config)  # wall time of all tests of one response together

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """CORRECT if every test passes; UNKNOWN if the reference or the sandbox is unusable."""
        try:
            tests = parse_tests(reference)
        except ValueError as error:
            return unknown(f"the reference is not a JSON of tests: {clip(error)}")
        source = last_block(response)
        if source is None:
            return incorrect("no fenced block found")
        try:
            run = self._sandbox.run(tests.of(source), self._time_limit_s)
        except ProcessError as error:
            return unknown(clip(f"{error.what}: {error.got}"))
        return judge(run, tests)


def judge(run: sandbox.Run, tests: Tests) -> Verdict:
    """The verdict on what came out of the sandbox."""
    if run.rows and run.rows[0][0] == "load":
        return incorrect(f"the code does not load: {clip(run.rows[0][1])}")
    mode, outputs = tests.request["mode"], tests.outputs
    if mode == "assertions":
        kind, clause = run.rows[0] if run.rows else ("failed", run.end)
        return correct("the tests passed") if kind == "passed" else incorrect(f"a test failed; {clip(clause, 200)}")
    readings = [outputs]
    if mode == "calls" and all(isinstance(output, list) and len(output) == 1 for output in outputs):
        readings.append([output[0] for output in outputs])
    check = _check_value if mode == "calls" else _check_program
    failures = min((_failures(run, reading, check) for reading in readings), key=len)
    if not failures:
        return correct(f"{len(outputs)} test{'s' if len(outputs) > 1 else ''} passed")
    return incorrect(f"{len(failures)} of {len(outputs)} tests failed; {failures[0]}")


def _failures(run: sandbox.Run, outputs: Sequence, check: Callable[[list, object], str]) -> list[str]:
    """One clause for each test that did not pass."""
    clauses, end = [], run.end
    for number, output in enumerate(outputs, start=1):
        row = run.rows[number - 1] if number <= len(run.rows) else ["ended", end]
        if row[0] == "ended":  # there are no rows after it
            end = row[1]
        clause = end if row[0] == "ended" else check(row, output)
        if clause:
            clauses.append(f"test {number}: {clause}")
    return clauses


def _check_value(row: list, output: object) -> str:
    kind, content = row
    if kind == "error":
        return clip(content)
    try:
        value, equal = same_value(content, output)
    except (ValueError, TypeError, RecursionError):  # only code that found the channel sends what is not a value
        return "unreadable answer"
    return "" if equal else f"got {_show(value)}, expected {_show(output)}"


def _show(value: object) -> str:
    try:
        return clip(repr(value), 60)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return "a value that is too large to show"


def _check_program(row: list, output: str) -> str:
    _, printed, error = row
    if error:
        return clip(error)
    return "" if same_text(printed, output) else f"printed {clip(repr(printed), 60)}, expected {clip(repr(output), 60)}"


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
