"""The samples of a difficulty run so far: a line for each finished prompt, so that a run can be killed at any moment.

    {"journal": 1, "model": "models/4b", "identity": {"student.model": "sha256 ...", "difficulty.samples": 8, ...}}
    {"id": "gsm8k-17", "outcomes": [1, 0, 0, -1, ...], "tokens": 812, "cut": 1, "weights": -1, "unknown": ["timed ..."]}

``outcomes`` has one of records.Outcome for each sample; ``tokens`` were generated for all of them; ``cut`` of them were
cut at the token limit; ``weights`` is the version of the weights that drew them, -1 where a server has those it was
started with. A line that a kill left without its end is discarded, and its prompt is sampled again: no sample is lost
or counted twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_opd.errors import ConfigError, DataError, EngineError
from megatron_opd.records import Outcome

FORMAT = 1
KINDS = {int(outcome) for outcome in Outcome}
REMOVE = "remove the folder to sample anew, or choose another with difficulty.output=..."


@dataclass(frozen=True)
class Sampled:
    """A finished prompt: one line of the journal."""

    id: str
    outcomes: list[int]  # [N]
    tokens: int  # of all N responses
    cut: int  # responses that reached the token limit
    weights: int  # version that drew them all
    unknown: list[str] = field(default_factory=list)  # why outcomes are unknown

    @property
    def graded(self) -> int:
        return len(self.outcomes) - self.outcomes.count(Outcome.UNKNOWN)

    @property
    def passes(self) -> int:
        return self.outcomes.count(Outcome.CORRECT)


class Journal:
    """``path`` is locked from ``open`` to ``close``; ``done`` holds its lines by prompt id."""

    def __init__(self, path: Path, file: BinaryIO, model: str, samples: int) -> None:
        self.path, self.model, self.done = path, model, dict[str, Sampled]()
        self._file, self._samples = file, samples

    @classmethod
    def open(cls, path: Path, model: str, identity: dict[str, object], samples: int, ids: set[str]) -> Journal:
        """Begin a journal, or go on with one that has the same ``identity``.

        samples: N; ids: of all prompts. Raises ConfigError when the identity differs or another process holds the
        journal, DataError when a line cannot be used.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_folder(path)
        file = path.open("a+b")
        try:
            _lock(path, file)
            journal = cls(path, file, model, samples)
            lines = _complete_lines(file)
            if lines:
                _check_identity(path, _parse(path, 1, lines[0]), identity)
                journal._take(lines, ids)
            else:
                journal._append({"journal": FORMAT, "model": model, "identity": identity})
        except BaseException:
            file.close()
            raise
        return journal

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # which also gives up the lock

    def add(self, sampled: Sampled, url: str) -> None:
        """Append a finished prompt, drawn at ``url``; on return the line is with the operating system.

        Raises EngineError when it was drawn with other weights than the samples before.
        """
        if self.weights not in (None, sampled.weights):
            raise EngineError(
                "The server's weights are not those of the samples so far",
                where=f"{url}, prompt {sampled.id}",
                got=f"version {sampled.weights}",
                expected=f"version {self.weights} as in {self.path}",
                fix="start the server with the student's weights; samples of two models are not mixed",
            )
        self._append(asdict(sampled))
        self.done[sampled.id] = sampled

    @property
    def weights(self) -> int | None:
        """Version of the weights that drew all samples; None before the first."""
        return next((sampled.weights for sampled in self.done.values()), None)

    def _append(self, row: dict) -> None:
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()

    def _take(self, lines: list[bytes], ids: set[str]) -> None:
        numbers: dict[str, int] = {}
        for number, line in enumerate(lines[1:], start=2):
            sampled = _sampled(self.path, number, line, self._samples)
            if sampled.id in numbers or sampled.id not in ids:
                got = f"{sampled.id}, as in line {numbers[sampled.id]}" if sampled.id in numbers else sampled.id
                expected = "a prompt of data.train, each once"
                where = f"{self.path}:{number}"
                raise DataError(
                    "A line of the journal cannot be used", where=where, got=got, expected=expected, fix=REMOVE
                )
            numbers[sampled.id] = number
            self.done[sampled.id] = sampled


def _check_folder(path: Path) -> None:
    others = [] if path.exists() else sorted(item.name for item in path.parent.iterdir())
    if others:
        raise ConfigError(
            "The folder holds something else than a difficulty run",
            where=path.parent.absolute(),
            got=", ".join(others[:6]),
            expected=f"no folder, an empty one, or one with {path.name}",
            fix="choose another folder with difficulty.output=...",
        )


def _lock(path: Path, file: BinaryIO) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            "Another process is at work in this folder",
            where=path.parent.absolute(),
            fix="wait for it, or choose another folder with difficulty.output=...",
        ) from error


def _complete_lines(file: BinaryIO) -> list[bytes]:
    """All lines with an end; what follows the last one is cut off the file."""
    file.seek(0)
    content = file.read()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        os.ftruncate(file.fileno(), kept)
    return content[:kept].splitlines()


def _check_identity(path: Path, header: dict, identity: dict[str, object]) -> None:
    if header.get("journal") != FORMAT or not isinstance(header.get("identity"), dict):
        what, expected = "The file is not a journal of this version", f"a first line with journal {FORMAT}"
        raise ConfigError(what, where=path, got=sorted(header), expected=expected, fix=REMOVE)
    was, now = header["identity"], json.loads(json.dumps(identity))
    different = [key for key in now | was if was.get(key) != now.get(key)]
    if different:
        raise ConfigError(
            f"The samples in this folder were drawn with another {', '.join(different)}",
            where=path.absolute(),
            got=_show(different, now),
            expected=f"{_show(different, was)}, as the folder began",
            fix=f"put it back, {REMOVE}",
        )


def _show(keys: list[str], values: dict[str, object]) -> str:
    return ", ".join(f"{key} = {json.dumps(values.get(key))}" for key in keys)


def _sampled(path: Path, number: int, line: bytes, samples: int) -> Sampled:
    row = _parse(path, number, line)
    try:
        sampled = Sampled(**row)
        good = len(sampled.outcomes) == samples and set(sampled.outcomes) <= KINDS
    except TypeError:
        good = False
    if not good:
        expected = f"a finished prompt with {samples} outcomes, each 1, 0 or -1"
        where, got = f"{path}:{number}", line[:80].decode(errors="replace")
        raise DataError("A line of the journal cannot be used", where=where, got=got, expected=expected, fix=REMOVE)
    return sampled


def _parse(path: Path, number: int, line: bytes) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        where, got = f"{path}:{number}", line[:80].decode(errors="replace")
        raise DataError(
            "A line of the journal cannot be used", where=where, got=got, expected="one JSON object", fix=REMOVE
        )
    return row
