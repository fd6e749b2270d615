"""The verifiers and the sandbox, at work."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

from megatron_opd.config import Config, VerifierConfig
from megatron_opd.doctor.finding import Finding, failed, ok, skipped, warning
from megatron_opd.errors import ProcessError
from megatron_opd.records import Outcome, Prompt
from megatron_opd.verifiers import Verdict
from megatron_opd.verifiers.pool import VerifierPool
from megatron_opd.verifiers.sandbox import probes

QUESTION = "What is 2 + 3?"
SQUARE = json.dumps({"fn_name": "f", "inputs": [[2], [3]], "outputs": [4, 9]})
NO_COMMA = json.dumps({"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]})

# Verifier to a reference, a right response and a wrong one.
CASES: dict[str, tuple[str, str, str]] = {
    "math": ("5", r"It is \boxed{5}.", r"It is \boxed{6}."),
    "code": (SQUARE, "```python\ndef f(x):\n    return x * x\n```", "```python\ndef f(x):\n    return x + x\n```"),
    "choice": ("B", "The answer is B.", "The answer is C."),
    "exact": ("five", "The answer is five.", "The answer is six."),
    "numeric": ("5", "The answer is 5.", "The answer is 6."),
    "chartqa": ("5", "The answer is 5.", "The answer is 6."),
    "anls": ("five", "The answer is five.", "The answer is a hundred."),
    "ifeval": (NO_COMMA, "It is five.", "Well, it is five."),
    "judge": ("5", "The answer is 5.", "The answer is 6."),
}


def check_sandbox(config: Config | None) -> Iterator[Finding]:
    """Which level fences code in, and why no stronger one."""
    if config and "code" not in _kinds(config):
        yield skipped("sandbox", "no domain has the verifier code")
        return
    wanted = config.verifiers.sandbox if config else "best"
    tried = probes()
    works = [probe.level for probe in tried if probe.works]
    reasons = "; ".join(f"{probe.level}: {probe.reason}" for probe in tried if not probe.works)
    needed = "" if wanted == "best" else f"verifiers.sandbox={wanted}"
    if wanted != "best" and wanted not in works:
        yield failed("sandbox", f"{wanted} does not work ({reasons})", needed, "set verifiers.sandbox=best")
    elif not works:
        yield failed("sandbox", f"no level works ({reasons})", needed, "see docs/verifiers.md")
    else:
        level = works[0] if wanted == "best" else wanted
        yield _in_force(level, reasons, needed)


def _in_force(level: str, reasons: str, needed: str) -> Finding:
    if level == "limits":
        found = f"limits in force: code is not fenced in by the kernel ({reasons})"
        return warning("sandbox", found, needed, "install bubblewrap, or allow user namespaces (docs/verifiers.md)")
    return ok("sandbox", f"{level} in force", needed)


def check_verifiers(config: Config) -> Iterator[Finding]:
    """A right and a wrong answer through each configured verifier, in the processes of a run."""
    kinds = _kinds(config)
    try:
        found = asyncio.run(_verdicts(config.verifiers, [kind for kind in kinds if kind in CASES]))
    except ProcessError as error:  # its place is the command, which says nothing here, and its advice the output
        raise ProcessError(error.what, got=error.got) from error
    for kind in kinds:
        if kind not in CASES:
            yield skipped("verifiers", f"{kind} judges nothing")
            continue
        right, wrong = found[kind]
        if right.outcome is Outcome.CORRECT and wrong.outcome is Outcome.INCORRECT:
            yield ok("verifiers", f"{kind} tells right from wrong")
        else:
            told = f"{kind}: a right answer is {_told(right)}, a wrong one {_told(wrong)}"
            fix = "raise verifiers.timeout_s" if "timed out" in told else "see docs/verifiers.md"
            yield failed("verifiers", told, "correct and incorrect", fix)


def _kinds(config: Config) -> list[str]:
    """Verifiers of the domains that have a teacher, each once."""
    return list(dict.fromkeys(config.verifiers.kinds[domain] for domain in config.teachers))


async def _verdicts(config: VerifierConfig, kinds: list[str]) -> dict[str, tuple[Verdict, Verdict]]:
    pool = VerifierPool(config.model_copy(update={"kinds": {kind: kind for kind in kinds}}))
    try:
        asked = [_judge(pool, kind, response) for kind in kinds for response in CASES[kind][1:]]
        verdicts = await asyncio.gather(*asked)
    finally:
        await pool.close()
    return dict(zip(kinds, zip(verdicts[::2], verdicts[1::2], strict=True), strict=True))


async def _judge(pool: VerifierPool, kind: str, response: str) -> Verdict:
    return await pool.verify(Prompt("doctor", kind, QUESTION, (1,), CASES[kind][0]), response)


def _told(verdict: Verdict) -> str:
    return f"{verdict.outcome.name.lower()} ({verdict.reason})"
