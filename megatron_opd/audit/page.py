"""The page of an audit: one HTML file that needs nothing else, no network, no script.

Texts of models and data are untrusted: Jinja escapes all of them, and the page's policy forbids scripts and requests.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import jinja2

from megatron_opd import __version__
from megatron_opd.audit import formats, panels, tables
from megatron_opd.audit.cards import Card
from megatron_opd.audit.diagnose import Diagnosis
from megatron_opd.audit.findings import Finding
from megatron_opd.audit.heatmap import LEVELS, visible
from megatron_opd.audit.numbers import Numbers
from megatron_opd.audit.read import Rollouts
from megatron_opd.config import Config

FOLDER = Path(__file__).parent
DOMAIN_COLOURS = 8  # in style.css; further domains start anew
MOST_REASONS = 12
NORMALIZE = {"sequence": "mean over each sequence, then over sequences", "token": "mean over all tokens"}


def templates(*folders: Path) -> jinja2.Environment:
    """Reads templates from ``folders``: text is escaped, and a name that is not given is an error."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(
    config: Config,
    diagnosis: Diagnosis,
    rollouts: Rollouts,
    found: Sequence[Finding],
    cards: Sequence[Card],
    limit: float,
) -> str:
    """The HTML text; ``limit``: value of the strongest colour of the heat-maps."""
    environment = templates(FOLDER)
    environment.filters |= {
        "percent": formats.percent,
        "nats": formats.nats,
        "whole": formats.whole,
        "tick": formats.tick,
        "typeset": typeset,
        "visible": visible,
    }
    styles = {domain: f"d{number % DOMAIN_COLOURS}" for number, domain in enumerate(diagnosis.by_domain)}
    return environment.get_template("template.html.jinja").render(
        version=__version__,
        name=config.name,
        facts=facts(config, diagnosis),
        styles=styles,
        tables=tables.rows(_lines(diagnosis)),
        findings=found,
        curves=panels.curves(rollouts, diagnosis, styles),
        pooled=panels.steps_per_point(diagnosis),
        returns=panels.returns(rollouts, diagnosis),
        difficulty=panels.difficulty(diagnosis, styles),
        cards=cards,
        levels=LEVELS,
        limit=limit,
        overall=diagnosis.overall,
        drops=_top(diagnosis.drop_reasons),
        unknowns=_top(diagnosis.unknown_reasons),
        weights=config.objective.domain_weights,
    )


def facts(config: Config, diagnosis: Diagnosis) -> dict[str, str]:
    """What a reader must know of the run."""
    steps, rollout, loss = diagnosis.steps, config.rollout, config.loss
    return {
        "student": str(config.student.model),
        "teachers": ", ".join(f"{domain} = {teacher.model}" for domain, teacher in config.teachers.items()),
        "steps": f"{len(steps)} recorded of {config.steps}: {steps[0]} to {steps[-1]}",
        "rollouts": (
            f"{diagnosis.overall.rollouts:,} recorded; {rollout.prompts_per_step} prompts of "
            f"{rollout.samples_per_prompt} rollouts a step, up to {rollout.max_new_tokens:,} tokens"
        ),
        **recipe_facts(config),
        "loss": f"gaps of {loss.max_gap:g} nats and more are masked; {NORMALIZE[loss.normalize]}",
        "seed": str(config.seed),
    }


def recipe_facts(config: Config) -> dict[str, str]:
    """What of the recipe is switched on, and how."""
    objective = config.objective.model_dump(mode="json", exclude_defaults=True)
    return {
        "calibration": _settings(config.calibration and config.calibration.model_dump(mode="json")),
        "balancing": _settings(config.balance and config.balance.model_dump(mode="json")),
        "objective": _settings(objective) if objective else "plain distillation",
    }


def _settings(section: dict | None) -> str:
    return ", ".join(f"{key} {value}" for key, value in section.items() if value is not None) if section else "none"


def _lines(diagnosis: Diagnosis) -> dict[str, Numbers]:
    """The lines of the summary tables: domains, teachers where they are not the domains, and all together."""
    lines = dict(diagnosis.by_domain)
    if not set(diagnosis.by_teacher) <= set(diagnosis.by_domain):
        lines |= {f"teacher {teacher}": numbers for teacher, numbers in diagnosis.by_teacher.items()}
    return lines | ({"all": diagnosis.overall} if len(lines) > 1 else {})


def _top(reasons: dict[str, dict[str, int]]) -> list[tuple[str, str, int]]:
    """The most frequent reasons of each domain, and how many others there are."""
    rows = []
    for domain, counts in reasons.items():
        shown = list(counts.items())
        rows += [(domain, reason, count) for reason, count in shown[:MOST_REASONS]]
        rest = shown[MOST_REASONS:]
        if rest:
            rows.append((domain, f"{len(rest):,} other reasons", sum(count for _, count in rest)))
    return rows


def typeset(text: str) -> str:
    """With a true minus sign before numbers, and no line break before a percent sign."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text).replace(" %", "\N{NO-BREAK SPACE}%")
