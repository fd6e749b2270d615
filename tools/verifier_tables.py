"""Print the tables of docs/verifiers.md: verifiers against real benchmark files, and a long run of the pool.

python tools/verifier_tables.py ../shared/data --runs 10000
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome, Prompt
from megatron_opd.verifiers.math import reference_answer
from megatron_opd.verifiers.pool import VerifierPool
from megatron_opd.verifiers.sandbox import probes

WAITING = 64  # verifications that are asked for at the same time
# One integer in six forms; {n} is it, {thousands} the same with commas, {double} twice as much.
FORMS = {
    "plain": r"\boxed{{{n}}}",
    "thousands": r"\boxed{{{thousands}}}",
    "decimal": r"\boxed{{{n}.00}}",
    "fraction": r"\boxed{{\frac{{{double}}}{{2}}}}",
    "equation and unit": r"\boxed{{x = {n}\text{{ units}}}}",
    "dollars": r"$$\boxed{{\${n}}}$$",
}
SUM = {"fn_name": "f", "inputs": [[[1, 2]], [[3]]], "outputs": [3, 3]}
ASSERTED = {"test": "assert f([1, 2]) == 3"}
PRINTED = {"inputs": ["1 2"], "outputs": ["3"]}
RIGHT, WRONG = "def f(xs): return sum(xs)", "def f(xs): return 41"
# Code, reference and expected outcome of the long run. The last ones end at the time limit, so they are rare.
OFTEN = [
    (RIGHT, SUM, 1),
    (RIGHT, ASSERTED, 1),
    ("print(sum(map(int, input().split())))", PRINTED, 1),
    (WRONG, SUM, 0),
    (WRONG, ASSERTED, 0),
    ("import os\nos._exit(0)", ASSERTED, 0),
    ("import os\nos.abort()", PRINTED, 0),
    ("def f(xs): raise StopIteration", ASSERTED, 0),
    ("class Same:\n    def __eq__(self, other): return True\ndef f(xs): return Same()", ASSERTED, 0),
    ("import os\nfor d in range(64):\n    try: os.write(d, b'[1, 2')\n    except OSError: pass", SUM, 0),
    ("def f(xs): return [0] * 10**9", SUM, 0),
    ("while True: print('x' * 10**6)", PRINTED, 0),
    ("import os\nfor _ in range(100): os.fork() or os.abort()", SUM, 0),
]
RARE = [
    ("def f(xs):\n    while True: pass", ASSERTED, 0),
    ("import threading, time\nfor _ in range(1000): threading.Thread(target=time.sleep, args=(9,)).start()", SUM, 0),
    ("import time\ntime.sleep(99)", PRINTED, 0),
]
HANG = r"\boxed{9^{9^{9^{9}}}}"  # of Math-Verify: only a kill of the worker ends it


@dataclass(frozen=True)
class Case:
    """One response, and what its verdict should be."""

    domain: str
    response: str
    reference: str
    expected: Outcome


@dataclass(frozen=True)
class Measured:
    """What came of many cases."""

    outcomes: Counter
    mistakes: list[tuple[Case, str]]
    wall_s: float  # without the first cases, one for each worker: they start it
    cpu_s: float  # of all processes of the pool


def cpu_seconds() -> float:
    """Of all living descendants and of the children that they waited for."""
    total = 0.0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a sandbox that has just ended; its forker counts it
            total += sum(child.cpu_times()[:4])
    return total


async def measure(config: VerifierConfig, cases: Sequence[Case]) -> Measured:
    """Verify all cases with one pool."""
    pool, places = VerifierPool(config), asyncio.Semaphore(WAITING)
    outcomes: Counter = Counter()
    mistakes = []

    async def verify(case: Case) -> None:
        async with places:
            verdict = await pool.verify(Prompt("p", case.domain, "", (), case.reference), case.response)
        outcomes[verdict.outcome] += 1
        if verdict.outcome != case.expected:
            mistakes.append((case, verdict.reason))

    await asyncio.gather(*(verify(case) for case in cases[: config.workers]))  # starts the workers
    began, used = time.monotonic(), cpu_seconds()
    await asyncio.gather(*(verify(case) for case in cases[config.workers :]))
    wall_s, cpu_s = time.monotonic() - began, cpu_seconds() - used
    await pool.close()
    return Measured(outcomes, mistakes, wall_s, cpu_s)


def humaneval(path: Path, body: Callable[[dict], str], expected: Outcome) -> list[Case]:
    """Every problem with one body for its function."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    cases = []
    for row in rows:
        reference = json.dumps({key: row[key] for key in ("prompt", "test", "entry_point")})
        cases.append(Case("code", f"```python\n{row['prompt']}{body(row)}\n```", reference, expected))
    return cases


def integers(path: Path) -> tuple[list[int], list[str]]:
    """The answers and the references of GSM8K or AIME."""
    references = [str(json.loads(line)["answer"]) for line in path.read_text().splitlines()]
    return [int(reference_answer(reference).replace(",", "")) for reference in references], references


def in_form(form: str, number: int) -> str:
    """A response whose box holds the number."""
    return form.format(n=number, thousands=f"{number:,}", double=2 * number)


def against_itself(path: Path, form: str) -> list[Case]:
    """Every reference with its own answer."""
    numbers, references = integers(path)
    pairs = zip(numbers, references, strict=True)
    return [Case("math", in_form(form, number), reference, Outcome.CORRECT) for number, reference in pairs]


def against_neighbour(path: Path, form: str) -> list[Case]:
    """Every reference with the answer of the nearest problem before it whose answer differs."""
    numbers, references = integers(path)
    cases = []
    for index, reference in enumerate(references):
        neighbour = next(n for n in (numbers[index - step] for step in range(1, len(numbers))) if n != numbers[index])
        cases.append(Case("math", in_form(form, neighbour), reference, Outcome.INCORRECT))
    return cases


def row(name: str, measured: Measured) -> str:
    """One line of a table."""
    counts = [str(measured.outcomes[kind]) for kind in (Outcome.CORRECT, Outcome.INCORRECT, Outcome.UNKNOWN)]
    total = measured.outcomes.total()
    speed = f"{total / measured.wall_s:.0f} | {1000 * measured.cpu_s / total:.1f}"
    return f"| {name} | {total} | {' | '.join(counts)} | {len(measured.mistakes)} | {speed} |"


async def tables(data: Path, config: VerifierConfig) -> None:
    """Print a row for each file and form."""
    columns = "| what | cases | correct | incorrect | unknown | not as expected | per second | CPU ms each |"
    print(columns + "\n|---|---|---|---|---|---|---|---|", flush=True)
    bodies = {
        "canonical": (lambda row: row["canonical_solution"], Outcome.CORRECT),
        "`pass`": (lambda _: "    pass\n", Outcome.INCORRECT),
        "wrong return": (lambda _: "    return 'something else'\n", Outcome.INCORRECT),
    }
    todo = []
    for name, (body, expected) in bodies.items():
        todo.append((f"HumanEval, {name}", humaneval(data / "humaneval/HumanEval.jsonl.gz", body, expected)))
    for title, path in (("GSM8K", data / "gsm8k/test.jsonl"), ("AIME 2024", data / "aime24/test.jsonl")):
        for name, form in FORMS.items():
            todo.append((f"{title}, {name}", against_itself(path, form)))
            todo.append((f"{title}, {name}, a neighbour's answer", against_neighbour(path, form)))
    for name, cases in todo:
        measured = await measure(config, cases)
        print(row(name, measured), flush=True)
        for case, reason in measured.mistakes[:5]:
            print(f"    {case.response[-80:]!r} against {case.reference[-60:]!r}: {reason}")


def soak_cases(runs: int) -> list[Case]:
    """A mixture of right, wrong and hostile code; one in 250 runs into its time limit, one in 1000 hangs a worker."""
    cases = []
    for number in range(runs):
        if number % 1000 == 999:
            cases.append(Case("math", HANG, "18", Outcome.UNKNOWN))
            continue
        source, reference, expected = RARE[number % 3] if number % 250 == 125 else OFTEN[number % len(OFTEN)]
        cases.append(Case("code", f"```\n{source}\n```", json.dumps(reference), Outcome(expected)))
    return cases


def soak(runs: int, config: VerifierConfig) -> None:
    """Print what a long run did and what it left behind."""
    folders = lambda: len(list(Path(tempfile.gettempdir()).glob("opd-code-*")))  # noqa: E731
    before = (len(os.listdir("/proc/self/fd")), folders())
    measured = asyncio.run(measure(config, soak_cases(runs)))
    processes = [child for child in psutil.Process().children(recursive=True) if child.is_running()]
    after = (len(os.listdir("/proc/self/fd")), folders())
    counts = [measured.outcomes[kind] for kind in (Outcome.CORRECT, Outcome.INCORRECT, Outcome.UNKNOWN)]
    print("| runs | correct | incorrect | unknown | not as expected | seconds |\n|---|---|---|---|---|---|")
    print(f"| {' | '.join(map(str, [runs, *counts, len(measured.mistakes), round(measured.wall_s)]))} |")
    print(f"\nLeft: {len(processes)} processes, {after[0] - before[0]} descriptors, {after[1] - before[1]} folders.")
    for case, reason in measured.mistakes[:20]:
        print(f"    {case.response[-120:]!r}: {reason}")


def main() -> None:
    """Print everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with humaneval, gsm8k and aime24")
    parser.add_argument("--runs", type=int, default=0, help="length of the long run; 0 leaves it out")
    parser.add_argument("--sandbox", default="best", help="level of the sandbox")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only-runs", action="store_true", help="leave the benchmark files out")
    options = parser.parse_args()
    config = VerifierConfig(workers=options.workers, timeout_s=30, sandbox=options.sandbox)
    for probe in probes():
        print(f"{probe.level}: {'works' if probe.works else 'does not work: ' + probe.reason}")
    print(f"load of the machine before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
    if not options.only_runs:
        asyncio.run(tables(options.data, config))
    if options.runs:
        print()
        soak(options.runs, config.model_copy(update={"timeout_s": 4.0}))


if __name__ == "__main__":
    main()
