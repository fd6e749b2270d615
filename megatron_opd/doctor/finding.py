"""What a check finds, and what a check is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from megatron_opd.errors import OpdError

State = Literal["ok", "warning", "failed", "skipped"]
STATES: tuple[State, ...] = ("ok", "warning", "failed", "skipped")


@dataclass(frozen=True)
class Finding:
    """One line of the table. Of a check that was skipped, ``found`` is the reason."""

    check: str
    state: State
    found: str
    needed: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """``work`` runs in a process of its own and is ended after ``limit_s`` seconds. It may raise OpdError."""

    name: str
    limit_s: float
    work: Callable[[], Iterable[Finding]]


def ok(check: str, found: str, needed: str = "") -> Finding:
    """As it should be."""
    return Finding(check, "ok", found, needed)


def warning(check: str, found: str, needed: str = "", fix: str = "") -> Finding:
    """A run can start, but the user may not want it so."""
    return Finding(check, "warning", found, needed, fix)


def failed(check: str, found: str, needed: str = "", fix: str = "") -> Finding:
    """A run would not start, or would end early."""
    return Finding(check, "failed", found, needed, fix)


def skipped(check: str, reason: str, needed: str = "") -> Finding:
    """Not looked at, and why."""
    return Finding(check, "skipped", reason, needed)


def by_error(check: str, error: OpdError) -> Finding:
    """A failure out of an error of ours, which says all that the table needs."""
    place = "" if error.where is None else f" ({error.where})"
    got = "" if error.got is None else f": {error.got}"
    needed = "" if error.expected is None else str(error.expected)
    return failed(check, f"{error.what}{place}{got}", needed, error.fix or "")


def by_errors(check: str, errors: Iterable[OpdError], good: Finding) -> list[Finding]:
    """A failure for each error, or ``good`` when there is none."""
    return [by_error(check, error) for error in errors] or [good]
