"""Grading of responses: the last boxed number for ``math``, a run in a subprocess for ``code``."""

from __future__ import annotations

import json
import re
import subprocess
import sys

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
FENCE = re.compile(r"```python\n(.*?)```", re.DOTALL)
# One process grades a whole batch: a short alarm per response keeps endless loops out.
RUNNER = """
import json, signal, sys

def run(source, tests):
    scope = {}
    signal.alarm(2)
    try:
        exec(source, scope)
        call = scope[tests["fn_name"]]
        return all(call(*args) == want for args, want in zip(tests["inputs"], tests["outputs"]))
    except BaseException:
        return False
    finally:
        signal.alarm(0)

def stop(*_):
    raise TimeoutError

signal.signal(signal.SIGALRM, stop)
jobs = json.load(sys.stdin)
print(json.dumps([run(source, json.loads(tests)) for source, tests in jobs]), file=sys.__stdout__)
"""


def grade_math(responses: list[str], answers: list[str]) -> list[bool]:
    """Whether the last boxed text of each response is the wanted number."""
    found = [BOXED.findall(response) for response in responses]
    return [bool(boxed) and boxed[-1].strip() == answer for boxed, answer in zip(found, answers, strict=True)]


def grade_code(responses: list[str], answers: list[str]) -> list[bool]:
    """Whether the last fenced block of each response passes all tests of its answer."""
    blocks = [FENCE.findall(response) for response in responses]
    jobs = [(block[-1] if block else "", answer) for block, answer in zip(blocks, answers, strict=True)]
    command = [sys.executable, "-I", "-c", RUNNER]
    timeout = 60 + 2 * len(jobs)
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, timeout=timeout, check=True)
    return json.loads(done.stdout.splitlines()[-1])


GRADERS = {"math": grade_math, "code": grade_code}
