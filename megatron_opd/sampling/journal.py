"""Responses drawn so far: a line for each finished prompt, so that a command can be killed at any moment.

    {"journal": 2, "model": "models/4b", "identity": {"model": "sha256 ...", "difficulty.samples": 8, ...}}
    {"id": "gsm8k-17", "outcomes": [1, 0, -1], "lengths": [91, 80, 7], "cut": [0, 1, 0], "weights": -1,
     "unknown": ["timed ..."], "texts": []}

``outcomes`` has one of records.Outcome for each response, ``lengths`` its tokens, ``cut`` is 1 where it was cut at the
token limit; ``weights`` is the version of the weights that drew them, -1 where a server has those it was started with.
A line that a kill left without its end is discarded, and its prompt is sampled again: no response is lost or counted
twice.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

from megatron_opd.errors import ConfigError, DataError, EngineError
from megatron_opd.records import Outcome

FORMAT = 2
KINDS = {int(outcome) for outcome in Outcome}


@dataclass(frozen=True)
class Sampled:
    """A finished prompt: one line of the journal."""

    id: str
    outcomes: list[int]  # [N]
    lengths: list[int]  # [N] tokens
    cut: list[int]  # [N] 1 where the response reached the token limit
    weights: int  # version that drew them all
    unknown: list[str] = field(default_factory=list)  # why outcomes are unknown
    texts: list[str] = field(default_factory=list)  # [N], or empty where they are not kept

    @property
    def graded(self) -> int:
        return len(self.outcomes) - self.outcomes.count(Outcome.UNKNOWN)

    @property
    def passes(self) -> int:
        return self.outcomes.count(Outcome.CORRECT)


class Journal:
    """``path`` is locked from ``open`` to ``close``; ``done`` holds its lines by prompt id."""

    def __init__(self, path: Path, file: BinaryIO, model: str, samples: Mapping[str, int], option: str) -> None:
        self.path, self.model, self.done = path, model, dict[str, Sampled]()
        self._file, self._samples, self._fix = file, samples, _fix(option)

    @classmethod
    def open(
        cls, path: Path, model: str, identity: dict[str, object], samples: Mapping[str, int], option: str
    ) -> Journal:
        """Begin a journal, or go on with one that has the same ``identity``.

        samples: N of each prompt, by id; option: the key that chooses the folder, for errors. Raises ConfigError when
        the identity differs or another process holds the journal, DataError when a line cannot be used.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _check_folder(path, option)
            file = path.open("a+b")
        except OSError as error:
            raise ConfigError(
                "The folder cannot be written to",
                where=path.parent.absolute(),
                got=error,
                fix=f"choose another folder with {option}=...",
            ) from error
        try:
            _lock(path, file, option)
            journal = cls(path, file, model, samples, option)
            lines = _complete_lines(file)
            if lines:
                _check_identity(path, _parse(path, 1, lines[0], _fix(option)), identity, _fix(option))
                journal._take(lines)
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

    def _take(self, lines: list[bytes]) -> None:
        numbers: dict[str, int] = {}
        for number, line in enumerate(lines[1:], start=2):
            sampled = self._sampled(number, line)
            if sampled.id in numbers:
                got = f"{sampled.id}, as in line {numbers[sampled.id]}"
                raise self._unusable(number, got, "each prompt once")
            numbers[sampled.id] = number
            self.done[sampled.id] = sampled

    def _sampled(self, number: int, line: bytes) -> Sampled:
        row = _parse(self.path, number, line, self._fix)
        try:
            sampled = Sampled(**row)
        except TypeError as error:
            raise self._unusable(number, error, "a finished prompt") from error
        wanted = self._samples.get(sampled.id)
        if wanted is None:
            raise self._unusable(number, sampled.id, "one of the prompts that are asked")
        sizes = {len(sampled.outcomes), len(sampled.lengths), len(sampled.cut), len(sampled.texts) or wanted}
        if sizes != {wanted} or not set(sampled.outcomes) <= KINDS:
            got, expected = line[:80].decode(errors="replace"), f"{wanted} responses, each with an outcome 1, 0 or -1"
            raise self._unusable(number, got, expected)
        return sampled

    def _unusable(self, number: int, got: object, expected: str) -> DataError:
        return _unusable(self.path, number, got, expected, self._fix)


def _fix(option: str) -> str:
    return f"remove the folder to sample anew, or choose another with {option}=..."


def _check_folder(path: Path, option: str) -> None:
    others = [] if path.exists() else sorted(item.name for item in path.parent.iterdir())
    if others:
        raise ConfigError(
            "The folder holds something else",
            where=path.parent.absolute(),
            got=", ".join(others[:6]),
            expected=f"no folder, an empty one, or one with {path.name}",
            fix=f"choose another folder with {option}=...",
        )


def _lock(path: Path, file: BinaryIO, option: str) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            "Another process is at work in this folder",
            where=path.parent.absolute(),
            fix=f"wait for it, or choose another folder with {option}=...",
        ) from error


def _complete_lines(file: BinaryIO) -> list[bytes]:
    """All lines with an end; what follows the last one is cut off the file."""
    file.seek(0)
    content = file.read()
    kept = content.rfind(b"\n") + 1
    if kept < len(content):
        os.ftruncate(file.fileno(), kept)
    return content[:kept].splitlines()


def _check_identity(path: Path, header: dict, identity: dict[str, object], fix: str) -> None:
    if header.get("journal") != FORMAT or not isinstance(header.get("identity"), dict):
        what, expected = "The file is not a journal of this version", f"a first line with journal {FORMAT}"
        raise ConfigError(what, where=path, got=sorted(header), expected=expected, fix=fix)
    was, now = header["identity"], json.loads(json.dumps(identity))
    different = [key for key in now | was if was.get(key) != now.get(key)]
    if different:
        raise ConfigError(
            f"The responses in this folder were drawn with another {', '.join(different)}",
            where=path.absolute(),
            got=_show(different, now),
            expected=f"{_show(different, was)}, as the folder began",
            fix=f"put it back, {fix}",
        )


def _show(keys: list[str], values: dict[str, object]) -> str:
    return ", ".join(f"{key} = {json.dumps(values.get(key))}" for key in keys)


def _parse(path: Path, number: int, line: bytes, fix: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise _unusable(path, number, line[:80].decode(errors="replace"), "one JSON object", fix)
    return row


def _unusable(path: Path, number: int, got: object, expected: str, fix: str) -> DataError:
    return DataError(
        "A line of the journal cannot be used", where=f"{path}:{number}", got=got, expected=expected, fix=fix
    )
