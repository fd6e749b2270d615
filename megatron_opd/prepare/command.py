"""``megatron-opd prepare``: published files to one file of canonical records, and a report.

OUT.jsonl               the records, in the order of the files
OUT.jsonl.report.json   what was kept and what was dropped, by reason, with examples

Both appear when they are complete. Nothing is overwritten, and an error leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from megatron_opd.config import PrepareConfig
from megatron_opd.data.rows import MOST_FLAWS_TOLD, Flaw, Row, flaws_error
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.prepare.base import Format
from megatron_opd.prepare.console import PrepareConsole
from megatron_opd.prepare.contamination import Benchmarks
from megatron_opd.prepare.drafts import Skip
from megatron_opd.prepare.filters import LengthFilter, Seen, read_benchmarks
from megatron_opd.prepare.formats import new_format
from megatron_opd.prepare.report import Report
from megatron_opd.prepare.sources import source_rows
from megatron_opd.runtime.supervision import signals_raise

BAD = "bad record"


def prepare(name: str, files: list[Path], out: Path, options: PrepareConfig, console: PrepareConsole) -> Report:
    """Convert ``files`` of the format ``name``. Raises OpdError or StoppedBySignal; then there is no OUT."""
    converter = new_format(name, options)
    report_path = out.with_name(f"{out.name}.report.json")
    _check_places(out, report_path)
    if (options.tokenizer is None) != (options.max_tokens is None):
        got = "only one of the two"
        raise ConfigError("--tokenizer and --max-tokens need each other", got=got, fix="give both, or none")
    length = None if options.tokenizer is None else LengthFilter(options.tokenizer, options.max_tokens)
    benchmarks = read_benchmarks(options.benchmarks, options.ngram, PrepareConfig(images=options.images))
    with signals_raise(), _complete_or_nothing(out) as file:
        run = _Run(name, converter, options, length, benchmarks, file)
        for number, path in enumerate(files, start=1):
            console.reading(path, number, len(files))
            for row in source_rows(path, converter.columns):
                run.take(path, row)
                console.counted(run.report.read)
        run.finish(out, files)
        _write_report(report_path, name, files, run.report)
    console.told(run.report, out, report_path)
    return run.report


def parse_benchmarks(given: list[str]) -> tuple[tuple[str, Path], ...]:
    """FORMAT=FILE items as pairs. Raises ConfigError."""
    pairs = [(item.partition("=")[0], item.partition("=")[2]) for item in given]
    for item, (name, path) in zip(given, pairs, strict=True):
        if not name or not path:
            expected = "FORMAT=FILE, for example gsm8k=test.jsonl"
            raise ConfigError("A benchmark is a format and a file", where="--benchmark", got=item, expected=expected)
    return tuple((name, Path(path)) for name, path in pairs)


class _Run:
    """One pass over all records."""

    def __init__(
        self,
        name: str,
        converter: Format,
        options: PrepareConfig,
        length: LengthFilter | None,
        benchmarks: Benchmarks,
        file: BinaryIO,
    ) -> None:
        self._name, self._converter, self._options = name, converter, options
        self._length, self._benchmarks, self._file = length, benchmarks, file
        self._seen, self._ids, self._flaws = Seen(), set[int](), list[tuple[Path, int, Flaw]]()
        self.report = Report()

    def take(self, path: Path, row: Row) -> None:
        """Write one record, or count why not. Raises DataError when there are too many bad ones."""
        self.report.read += 1
        where = f"{path}:{row.number}"
        try:
            self._convert(path, row, where)
        except Skip as skip:
            self.report.drop(str(skip), where, "not in the wanted part")
        except Flaw as flaw:
            self.report.drop(BAD, where, str(flaw))
            self._flaws.append((path, row.number, flaw))
            if len(self._flaws) >= self._options.max_bad + MOST_FLAWS_TOLD:  # enough to see what is wrong
                raise self._too_bad(path) from flaw

    def finish(self, out: Path, files: list[Path]) -> None:
        """Raise DataError unless the file may be kept."""
        if len(self._flaws) > self._options.max_bad:
            raise self._too_bad(self._flaws[0][0])
        if not self.report.kept:
            got = ", ".join(f"{count} x {reason}" for reason, count in self.report.dropped.items())
            got = got or f"no records in {', '.join(map(str, files))}"
            raise DataError("No record is left", where=out, got=got, expected="at least one")

    def _convert(self, path: Path, row: Row, where: str) -> None:
        draft = self._converter.draft(row.record(), path.parent)
        record = draft.record(self._name, templated=self._options.template)
        if reason := self._seen.repeated(draft):
            self.report.drop(reason, where, "an earlier record asks the same", draft.question)
            return
        if match := self._benchmarks.match(draft.question):
            self.report.drop("in a benchmark", where, f"shares with {match.benchmark}: {match.words}", draft.question)
            self.report.benchmarks[match.benchmark.rpartition(":")[0]] += 1
            return
        if self._length is not None and (excess := self._length.excess(record["prompt"])):
            self.report.drop("too long", where, excess, draft.question)
            return
        self._check_id(record["id"])
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.report.keep(draft.domain)

    def _check_id(self, name: str) -> None:
        count = len(self._ids)
        self._ids.add(hash(name))
        if len(self._ids) == count:
            raise Flaw("id", repr(name), "an id that no earlier record has", "rename or remove one of the two")

    def _too_bad(self, path: Path) -> DataError:
        error = flaws_error(self._flaws, path, self.report.read)
        error.fix = f"{error.fix}; or leave such records out with --max-bad"
        return error


def _check_places(out: Path, report: Path) -> None:
    if not out.name.endswith(".jsonl"):
        raise ConfigError("The output is a file of JSON lines", where="OUT", got=out.name, expected="a name in .jsonl")
    if not out.parent.is_dir():
        raise ConfigError("No such folder", where="OUT", got=out.parent.absolute(), fix="make it first")
    for path in (out, report):
        if path.exists():
            raise ConfigError(
                "The file exists already", where="OUT", got=path.absolute(), fix="remove it, or rename OUT"
            )


@contextmanager
def _complete_or_nothing(out: Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``out`` that takes its name at the end of the block, or is removed by an error.

    Raises DataError when it cannot be written.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix=f".{out.name}.", delete=False) as file:
            temporary = Path(file.name)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.rename(out)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DataError("The file cannot be written", where=out.absolute(), got=error) from error
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_report(path: Path, name: str, files: list[Path], report: Report) -> None:
    plain = {"format": name, "files": [str(file) for file in files]} | report.plain()
    with _complete_or_nothing(path) as file:
        file.write((json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode())
