"""What a person sees of a conversion of data."""

from __future__ import annotations

import time
from pathlib import Path

from rich.table import Table

from megatron_opd.observe.console import ProgressConsole
from megatron_opd.prepare.report import Report

EVERY_S = 10.0


class PrepareConsole(ProgressConsole):
    """Prints one conversion."""

    _file, _began, _last = "", 0.0, 0.0

    def reading(self, path: Path, number: int, files: int) -> None:
        self._file = f"{path.name} ({number} of {files})"
        self._began = self._began or time.monotonic()
        self._last = time.monotonic()
        if self._task is None:
            self._task = self._progress.add_task(self._file, total=None)
        self._describe(self._file)

    def counted(self, records: int) -> None:
        """Called for each record."""
        now = time.monotonic()
        if now - self._last < EVERY_S:
            return
        self._last = now
        self._say(f"{records} records read, {records / (now - self._began):.0f}/s, in {self._file}")

    def told(self, report: Report, out: Path, report_path: Path) -> None:
        """The table of reasons, and where everything is."""
        table = Table(title=f"{report.read} records read", title_justify="left")
        table.add_column("what became of them")
        table.add_column("records", justify="right")
        table.add_column("first example")
        for domain, count in sorted(report.domains.items()):
            table.add_row(f"kept, {domain}", str(count), "")
        for reason, count in report.dropped.most_common():
            example = report.examples[reason][0]
            table.add_row(reason, str(count), f"{example['where']}: {example['detail']}"[:100])
        self._console.print(table)
        self._say(f"records  {out.absolute()}")
        self._say(f"report   {report_path.absolute()}")
