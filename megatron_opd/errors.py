"""The exception tree. Every error tells what, where, got, expected and how to fix it.

    OpdError
      ConfigError    a wrong config key, value, override or combination      (also ValueError)
      DataError      a prompt file or record that cannot be used             (also ValueError)
      ModelError     a model or tokenizer folder that cannot be used         (also ValueError)
      EngineError    a server answered wrongly, or does not answer           (also RuntimeError)
      ProcessError   a process of the run died or could not start            (also RuntimeError)
      RefreshError   engine and trainer disagree after a weight refresh      (also RuntimeError)
      CheckpointError  a checkpoint that cannot be read                      (also RuntimeError)

To add one: derive from ``OpdError`` and from the standard exception that a caller would have caught before.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


class OpdError(Exception):
    """Base of all errors that a user can meet.

    what: one sentence; where: file, key or URL; got and expected: the two values that disagree; fix: what to do.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        got: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.fix = what, where, got, expected, fix
        super().__init__(what)

    def __str__(self) -> str:
        rows = [("where", self.where), ("got", self.got), ("expected", self.expected), ("fix", self.fix)]
        return "\n".join([self.what] + [f"  {name + ':':10}{value}" for name, value in rows if value is not None])


class ConfigError(OpdError, ValueError):
    """A wrong config key, value, override or combination."""


class DataError(OpdError, ValueError):
    """A prompt file or record that cannot be used."""


class ModelError(OpdError, ValueError):
    """A model or tokenizer folder that cannot be used."""


class EngineError(OpdError, RuntimeError):
    """A server answered wrongly, or does not answer. ``kind`` names the failure in one word, for counting."""

    def __init__(self, what: str, *, kind: str = "refused", **told: object) -> None:
        self.kind = kind
        super().__init__(what, **told)


class ProcessError(OpdError, RuntimeError):
    """A process of the run died or could not start."""


class RefreshError(OpdError, RuntimeError):
    """Engine and trainer disagree after a weight refresh."""


class CheckpointError(OpdError, RuntimeError):
    """A checkpoint that cannot be read."""


def system_error(error: OSError) -> OpdError:
    """What the system says of a file or folder, as an error of ours."""
    where = " and ".join(os.path.abspath(name) for name in (error.filename, error.filename2) if isinstance(name, str))
    fix = "give a path that can be read, or written where it is an output"
    return OpdError("A file or folder cannot be used", where=where or None, got=error.strerror, fix=fix)


def raise_together(found: Sequence[OpdError]) -> None:
    """Raise the one mistake, or one error that lists all; return when there is none."""
    if len(found) == 1:
        raise found[0]
    if found:
        listing = "\n".join(f"{number}. {error}" for number, error in enumerate(found, 1))
        raise ConfigError(f"{len(found)} things must be put right before the run can start\n{listing}")
