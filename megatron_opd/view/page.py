"""The report of a run: one HTML file that needs nothing else, no network, no script.

It shares style and heat-maps with the audit. Texts of models and data are untrusted: Jinja escapes all of them, and the
page's policy forbids scripts and requests; filters and values under the pointer are style sheets alone.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opd import __version__
from megatron_opd.audit import formats
from megatron_opd.audit import page as audit_page
from megatron_opd.audit.heatmap import LEVELS, visible
from megatron_opd.config import Config
from megatron_opd.observe.lines import duration, layout
from megatron_opd.observe.reference import config_keys
from megatron_opd.view.accuracy import MOMENTS, accuracy_chart, shown
from megatron_opd.view.browse import FATES, OUTCOMES, Browser
from megatron_opd.view.curves import curve_sections, steps_per_point
from megatron_opd.view.gantt import STAGES, TRAINER, pictures
from megatron_opd.view.history import History

FOLDER = Path(__file__).parent
MOST_TROUBLES = 200


@dataclass(frozen=True, slots=True)
class Change:
    """A key of the config that is not as the schema has it."""

    key: str
    value: str
    default: str
    meaning: str


def render(history: History, browser: Browser | None, no_rollouts: str) -> str:
    """The HTML text. no_rollouts: why there is no ``browser``."""
    environment = audit_page.templates(FOLDER, audit_page.FOLDER)
    environment.filters |= {
        "nats": formats.nats,
        "whole": formats.whole,
        "tick": formats.tick,
        "typeset": audit_page.typeset,
        "visible": visible,
        "lines": lambda text: "\n".join(map(visible, text.splitlines())),
    }
    domains = sorted(history.config.teachers)
    samples = browser.samples if browser else []
    styles = {domain: f"d{number % audit_page.DOMAIN_COLOURS}" for number, domain in enumerate(domains)}
    return environment.get_template("view.html.jinja").render(
        version=__version__,
        made=time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        history=history,
        config=history.config,
        headline=headline(history),
        facts=facts(history),
        styles=styles,
        accuracy_chart=accuracy_chart(history.accuracies) if history.accuracies else None,
        accuracy_rows=_accuracy_rows(history),
        moments=[(when, style) for when, style in MOMENTS if when in history.accuracies],
        curves=curve_sections(history.metrics, styles),
        pooled=steps_per_point(history.metrics),
        pictures=pictures(history.of_kind("timeline")),
        stages=STAGES + TRAINER,
        browser=browser,
        no_rollouts=no_rollouts,
        outcomes=[pair for pair in OUTCOMES.values() if pair[0] in {item.outcome for item in samples}],
        fates={state: name for state, name in FATES.items() if state in {item.state for item in samples}},
        levels=LEVELS,
        troubles=troubles(history.events),
        changes=changes(history.config),
        files=files(history),
    )


def headline(history: History) -> str:
    """One sentence on how the run is."""
    done = f"{history.steps} of {history.config.steps} steps"
    match history.state:
        case "running":
            return f"Running: {done}" + (f"; {_doing(history)}" if history.doing else "")
        case "finished":
            wall_s = json.loads(history.run.summary.read_text())["wall_s"]
            return f"Finished: {done} in {duration(wall_s)}"
        case "failed":
            return f"Failed after {done}"
        case "stopped":
            return f"Stopped by {history.of_kind('stopped')[-1]['signal']} after {done}"
        case "vanished":
            return f"Ended without a word after {done}: its processes were killed, or the machine went down"


def _doing(history: History) -> str:
    doing = history.doing
    counted = f" {doing.done} of {doing.total}" if doing.total else ""
    left = "" if doing.left_s is None else f", about {duration(doing.left_s)} to go"
    return f"{doing.what}{counted}{left}"


def facts(history: History) -> dict[str, str]:
    """What a reader must know of the run."""
    config, rollout = history.config, history.config.rollout
    found = {
        "student": f"{config.student.model}, {config.student.dtype}, {layout(config.student)}",
        "teachers": ", ".join(f"{domain} = {teacher.model}" for domain, teacher in config.teachers.items()),
        "data": str(config.data.train),
        "step": f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} rollouts, "
        f"up to {rollout.max_new_tokens:,} tokens each",
        **audit_page.recipe_facts(config),
        "seed": str(config.seed),
    }
    live = history.of_kind("live")
    if live:
        info = live[-1]["info"]
        found["layers"] = f"{info['backend']} on {info['device']} ({info['backend_reason']})"
    sums = {
        name: sum(row.get(f"{group}/tokens", 0) for row in history.metrics)
        for group, name in (("rollout", "sampled"), ("teacher", "scored"), ("loss", "trained"))
    }
    if sums["sampled"]:
        found["tokens"] = ", ".join(f"{count:,.0f} {name}" for name, count in sums.items())
    if history.seconds is not None:
        found["time"] = duration(history.seconds) + " since the student was ready"
    if history.of_kind("resumed"):
        found["resumed"] = ", ".join(f"after step {event['step']}" for event in history.of_kind("resumed"))
    return found


def _accuracy_rows(history: History) -> list[tuple[str, list[str]]]:
    moments = [when for when, _ in MOMENTS if when in history.accuracies]
    domains = sorted({domain for found in history.accuracies.values() for domain in found})
    return [(domain, [shown(history.accuracies[when].get(domain)) for when in moments]) for domain in domains]


def troubles(events: Sequence[dict]) -> list[tuple[str, str, str]]:
    """When, what and details of everything that did not go as planned, newest first."""
    found = []
    for event in events:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        match event["event"]:
            case "dropped":
                found.append((when, f"step {event['step']}: dropped rollouts", "; ".join(event["reasons"])))
            case "checkpoint_failed":
                found.append((when, "a checkpoint was not saved", event["error"]))
            case "sink_left":
                found.append((when, f"{event['sink']} was left", event["reason"]))
            case "resumed":
                damaged = "".join(f"; damaged: {text}" for text in event["damaged"])
                found.append((when, "resumed", f"after step {event['step']}{damaged}"))
            case "failed":
                found.append((when, f"{event['role']} failed", event["error"]))
            case "stopped":
                found.append((when, "stopped", f"by {event['signal']}"))
    return found[::-1][:MOST_TROUBLES]


def changes(config: Config) -> list[Change]:
    """Every key that is not at its default, with the default and the meaning."""
    known = {key.name: key for key in config_keys()}
    rows = []
    for name, value in _flat(config.model_dump(mode="json", exclude_defaults=True)):
        key = known.get(name) or known.get(re.sub(r"^(\w+)\.[^.]+", r"\1.<name>", name))
        rows.append(Change(name, value, key.default if key else "", key.meaning if key else ""))
    return rows


def _flat(value: object, name: str = "") -> list[tuple[str, str]]:
    """Dotted key and value; a section that is on with all its defaults is one row."""
    if not isinstance(value, dict):
        return [(name, "null" if value is None else str(value))]
    if not value:
        return [(name, "on, with its defaults")]
    return [row for part, inner in value.items() for row in _flat(inner, f"{name}.{part}" if name else part)]


def files(history: History) -> list[tuple[str, str, str]]:
    """Name, absolute path and meaning of what the run has written."""
    run = history.run
    listed = (
        (run.config_file, "the resolved config"),
        (run.metrics, "a line for each step; docs/operations.md says what each number means"),
        (run.events, "what happened, a line each"),
        (run.summary, "results"),
        (run.trajectories, "every rollout of each recorded step, parquet"),
        (run.evaluation("before"), "passes of each held-out prompt before training"),
        (run.evaluation("after"), "the same after training"),
        (run.pass_rates, "how often each prompt was solved while training"),
        (run.checkpoints.path, "what a run goes on from"),
        (run.export, "the trained student, a Hugging Face checkpoint"),
        (run.logs, "a log for each process"),
        (run.tensorboard, "TensorBoard's event files"),
        (run.superseded, "what a resumed run wound back"),
        (run.path / "audit.html", "what the recipe did, and where a teacher is wrong"),
    )
    return [(path.name, str(path.absolute()), meaning) for path, meaning in listed if path.exists()]
