"""``megatron-opd audit``: every diagnostic of a run from its saved trajectories, without a model.

Cost: one pass over the trajectories, and a second one over the files of the worst groups. 100,000 rollouts of 1,000
tokens take about half a minute of one core and stay below 1 GB of memory (``read``).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opd import __version__
from megatron_opd.audit.cards import cards
from megatron_opd.audit.diagnose import Diagnosis, diagnose
from megatron_opd.audit.findings import Finding, findings
from megatron_opd.audit.heatmap import TokenTexts, colour_limit
from megatron_opd.audit.page import facts, render
from megatron_opd.audit.pictures import Pictures
from megatron_opd.audit.read import Rollouts, fetch, read_rollouts, trajectory_files
from megatron_opd.config import Config, load_config
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.runtime.rundir import RunDirectory

WORST = 12  # order violations that are shown


@dataclass(frozen=True, slots=True)
class Report:
    """Where the results are, and what they say."""

    page: Path
    numbers: Path
    findings: list[Finding]

    def lines(self) -> list[str]:
        """What a terminal shows."""
        return [
            *(f"{item.level:5} {item.domain or 'run'}: {item.text}" for item in self.findings),
            f"numbers   {self.numbers.absolute()}",
            f"page      {self.page.absolute()}",
        ]


def audit(folder: Path, out: Path | None = None) -> Report:
    """Write ``audit.json`` and ``audit.html`` about the run in ``folder`` to ``out``, or into the run's folder.

    Raises OpdError when there is no such run, when it kept no trajectories or no tokenizer, or for a broken file.
    """
    run = RunDirectory(folder)
    config = run_config(run)
    files = trajectory_files(run.trajectories)
    texts = TokenTexts.load(run.tokenizer)
    rollouts = read_rollouts(files)
    diagnosis = diagnose(rollouts, config.rollout.samples_per_prompt, WORST)
    found = findings(diagnosis, rollouts, config)
    rows = fetch(files, rollouts, [index for item in diagnosis.violations for index in (item.wrong, item.right)])
    limit = colour_limit(list(rows.values()))
    drawn = cards(diagnosis.violations, rollouts, rows, texts, Pictures(config.images_folder), limit)
    page = render(config, diagnosis, rollouts, found, drawn, limit)

    target = folder if out is None else out
    numbers = json.dumps(as_json(config, diagnosis, rollouts, rows, found), indent=1, allow_nan=False) + "\n"
    report = Report(target / "audit.html", target / "audit.json", found)
    try:
        target.mkdir(parents=True, exist_ok=True)
        report.numbers.write_text(numbers, encoding="utf-8")
        report.page.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "The results cannot be written", where=target.absolute(), got=error, fix="choose a folder with --out"
        ) from error
    return report


def as_json(
    config: Config, diagnosis: Diagnosis, rollouts: Rollouts, rows: dict[int, dict], found: list[Finding]
) -> dict:
    """Everything as plain values, for other programs; None where nothing can be said. docs/audit.md names the keys."""
    plain = asdict(diagnosis)
    plain["violations"] = [
        {
            "size": item.size,
            "step": int(rollouts.step[item.wrong]),
            "group": int(rollouts.group[item.wrong]),
            "domain": rollouts.domain[item.wrong],
            "prompt_id": rows[item.wrong]["prompt_id"],
            "wrong": _place(rollouts, item.wrong),
            "right": _place(rollouts, item.right),
        }
        for item in diagnosis.violations
    ]
    return {
        "version": __version__,
        "name": config.name,
        "facts": facts(config, diagnosis),
        "findings": [asdict(item) for item in found],
        **plain,
    }


def _place(rollouts: Rollouts, index: int) -> dict[str, float]:
    """How to find a rollout in its step's file, and its returns."""
    return {
        "row": int(rollouts.row[index]),
        "mean_gap": float(rollouts.mean_gap[index]),
        "offset": float(rollouts.offset[index]),
        "outcome_term": float(rollouts.outcome_term[index]),
    }


def run_config(run: RunDirectory) -> Config:
    file = run.path / "config.yaml"
    if not file.is_file():
        raise DataError(
            "No such run folder" if not run.path.is_dir() else "The folder is not that of a run",
            where=run.path.absolute(),
            got="no config.yaml in it" if run.path.is_dir() else None,
            expected="a folder that `megatron-opd train` made, for example runs/toy",
            fix="look into the folder runs, or give the path of the run",
        )
    return load_config(file, [])
