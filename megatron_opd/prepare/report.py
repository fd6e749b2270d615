"""What became of every record: OUT.report.json."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MOST_EXAMPLES = 5


@dataclass
class Report:
    """Counts, and the first examples of everything that was left out."""

    read: int = 0
    kept: int = 0
    domains: Counter[str] = field(default_factory=Counter)  # of what was kept
    dropped: Counter[str] = field(default_factory=Counter)  # reason to records
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)  # reason to the first few
    benchmarks: Counter[str] = field(default_factory=Counter)  # file of a benchmark to records dropped for it

    def drop(self, reason: str, where: str, detail: str, question: str = "") -> None:
        """Count a record that is left out. ``where``: file and row."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MOST_EXAMPLES:
            examples.append({"where": where, "detail": detail, "question": question[:200]})

    def keep(self, domain: str) -> None:
        """Count a record that is written."""
        self.kept += 1
        self.domains[domain] += 1

    def plain(self) -> dict[str, object]:
        """The report as JSON holds it."""
        return {
            "read": self.read,
            "kept": self.kept,
            "domains": dict(sorted(self.domains.items())),
            "dropped": {
                reason: {"records": count, "examples": self.examples[reason]}
                for reason, count in self.dropped.most_common()
            },
            "benchmarks": dict(sorted(self.benchmarks.items())),
        }
