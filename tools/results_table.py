"""Print a Markdown table of runs from their summary.json files.

python tools/results_table.py runs/toy-0 runs/toy-1
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

HEADER = "| run | seed | domain | before | after | teacher | mean gain, points | wall, s |"


def cell(evaluations: dict, when: str, domain: str) -> str:
    """Accuracy and its standard error in percent; empty where nothing was graded."""
    value = evaluations.get(when, {}).get(domain)
    if value is None:
        return ""
    return f"{100 * value:.1f} ({100 * evaluations['standard_error'][when][domain]:.1f})"


def rows(folder: Path) -> list[str]:
    """One line for each domain of a run."""
    summary = json.loads((folder / "summary.json").read_text())
    evaluations = summary["eval"]
    domains = sorted(evaluations["before"])
    gain = 100 * mean(evaluations["after"][domain] - evaluations["before"][domain] for domain in domains)
    lines = []
    for number, domain in enumerate(domains):
        cells = [cell(evaluations, when, domain) for when in ("before", "after", "teacher")]
        whole = [f"{gain:+.1f}", f"{summary['wall_s']:.0f}"] if number == 0 else ["", ""]
        name = [summary["name"], str(summary["seed"])] if number == 0 else ["", ""]
        lines.append(f"| {' | '.join([*name, domain, *cells, *whole])} |")
    return lines


def main() -> None:
    """Print the table of the runs that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a summary.json")
    print(HEADER)
    print("|" + "---|" * HEADER.count(" | ") + "---|")
    for folder in parser.parse_args().runs:
        print("\n".join(rows(folder)))


if __name__ == "__main__":
    main()
