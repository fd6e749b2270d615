"""How well a sandbox is fenced in on this machine, strongest first.

    level       file system                       network     other processes  own processes  needs
    bubblewrap  libraries, read only; scratch     none        invisible        8              bwrap, not as root
    namespaces  the same, by inside/confine.py    none        invisible        8              Linux 5.12, leave to mount
    limits      whatever the user may use         audit hook  audit hook       none more      nothing

Leave to mount: root with CAP_SYS_ADMIN, or anybody where user namespaces are allowed. Scratch is 64 MB of memory.

An audit hook is a rule inside the interpreter: it stops code, not a determined attack on the interpreter itself.
Limits of CPU, wall time, memory, file size and output, the empty environment and the closed descriptors are the same
at every level. What no level protects against: a hole in the kernel, and using the CPU until the time limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import get_args

from megatron_opd.errors import ProcessError
from megatron_opd.verifiers.sandbox.process import Level, Request, Sandbox

LEVELS: tuple[Level, ...] = get_args(Level)
PROBE_LIMIT_S = 30.0  # a busy machine must not pass for a weak one


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether one level works here."""

    level: Level
    works: bool
    reason: str  # why not; "" if it works


@cache
def probe(level: Level) -> Probe:
    """Try one level by calling a function in it."""
    try:
        rows = Sandbox(level).run(Request("calls", "def f(x): return x + 1", [[1]], "f"), PROBE_LIMIT_S).rows
    except ProcessError as error:
        return Probe(level, False, " ".join(str(error.got).split()[-20:]))
    return Probe(level, rows == [["value", 2]], "" if rows == [["value", 2]] else f"it answered {rows}")


def probes() -> list[Probe]:
    """All levels, strongest first; the first one that works is in force when ``verifiers.sandbox`` is "best"."""
    return [probe(level) for level in LEVELS]


def choose(wanted: str) -> Level:
    """The level for a setting of ``verifiers.sandbox``. Raises ProcessError if it does not work here."""
    tried = [probe(level) for level in LEVELS if wanted in ("best", level)]
    for result in tried:
        if result.works:
            return result.level
    raise ProcessError(
        "The sandbox does not work on this machine",
        where="verifiers.sandbox",
        got="; ".join(f"{result.level}: {result.reason}" for result in tried),
        fix='set verifiers.sandbox to "best" to take the strongest level that works',
    )
