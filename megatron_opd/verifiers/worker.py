"""A process that verifies one response after another: ``python -m megatron_opd.verifiers.worker PARENT CONFIG``.

CONFIG is the JSON of a VerifierConfig. Reads rows of JSON ``[kind, prompt, response, reference]`` from descriptor 0 and
answers each with ``[outcome, reason]`` on descriptor 1, after one row ``"ready"``. Ends at the end of its input, and
with its parent.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import IO

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.verifiers import VERIFIERS, Verdict, Verifier
from megatron_opd.verifiers.base import clip, unknown

MEMORY_BYTES = 8 << 30  # address space: 9^{9^{9}} must not take the machine down with it
REASON_LENGTH = 500


def main(arguments: list[str]) -> None:
    """Serve until the input ends."""
    parent, config = int(arguments[0]), VerifierConfig.model_validate_json(arguments[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what ends
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        sys.exit(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    requests, replies = take_descriptors()
    verifiers = {kind: VERIFIERS[kind](config) for kind in sorted(set(config.kinds.values()))}
    reply(replies, "ready")
    for line in requests:
        kind, *case = json.loads(line)
        verdict = judge(verifiers[kind], *case)
        reply(replies, [int(verdict.outcome), clip(verdict.reason, REASON_LENGTH)])


def judge(verifier: Verifier, prompt: str, response: str, reference: str) -> Verdict:
    """The verifier's verdict, UNKNOWN if it raises."""
    try:
        return verifier.verify(prompt, response, reference)
    except Exception as error:  # noqa: BLE001 - a defect of one verifier must not decide about a response
        return unknown(f"the verifier failed: {type(error).__name__}: {error}")


def verdict_of(line: bytes) -> Verdict:
    """The pool's side of ``reply``."""
    outcome, reason = json.loads(line)
    return Verdict(Outcome(outcome), reason)


def reply(replies: IO[str], content: object) -> None:
    """Write one row."""
    replies.write(json.dumps(content) + "\n")
    replies.flush()


def take_descriptors() -> tuple[IO[bytes], IO[str]]:
    """Private copies of descriptors 0 and 1, so that a library that reads or prints cannot break the protocol."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return requests, replies


if __name__ == "__main__":
    main(sys.argv[1:])
