"""Curves over the steps: one for each metric, a line for each domain, values under the pointer without a script."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from megatron_opd.audit import formats
from megatron_opd.audit.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    NARROW,
    TOP,
    Frame,
    Series,
    line_chart,
    nice_ticks,
    whole_ticks,
)
from megatron_opd.audit.heatmap import visible
from megatron_opd.observe.metrics import METRICS, split_name

POINTS = 60  # most points of a curve; a longer run is averaged over equally many steps for each
LINE, CHARACTER = 14.0, 6.2  # of the box under the pointer: height of a line, mean width of a letter

SECTIONS: tuple[tuple[str, tuple[tuple[str, ...], ...]], ...] = (
    (
        "Learning",
        (
            ("reward/correct",),
            ("opd/gap",),
            ("loss/policy",),
            ("loss/grad_norm",),
            ("rollout/length",),
            ("rollout/entropy",),
        ),
    ),
    (
        "The recipe",
        (
            ("order/auc",),
            ("calibration/margin_before", "calibration/margin_after"),
            ("calibration/mean_shift",),
            ("balance/kept",),
            ("order/mixed",),
            ("balance/trained_rollouts",),
        ),
    ),
    (
        "Health",
        (
            ("opd/engine_trainer_difference",),
            ("refresh/probe_difference",),
            ("opd/masked",),
            ("rollout/truncated",),
            ("reward/unknown",),
            ("teacher/dropped",),
        ),
    ),
    (
        "Speed",
        (
            ("time/collect_s", "time/train_s", "refresh/seconds"),
            ("time/generate_s", "time/verify_s", "time/score_s"),
            ("perf/tokens_per_s",),
        ),
    ),
)
OWN_COLOURS = ("d0", "d3", "d2", "d4")  # of lines that are metrics, not domains


@dataclass(frozen=True, slots=True)
class Curve:
    """A chart, what it shows and how to read it."""

    title: str
    meaning: str
    reading: str
    action: str
    legend: list[tuple[str, str]]  # name and CSS class of each line, where these are not the domains
    chart: Markup


def curve_sections(rows: Sequence[dict[str, float]], styles: dict[str, str]) -> list[tuple[str, list[Curve]]]:
    """Titled groups of curves; the last group has every metric that is in no other. styles: class of each domain."""
    known = {name for row in rows for name in row if name != "step"}
    bases = {split_name(name)[0] for name in known}
    drawn = {name for _, curves in SECTIONS for names in curves for name in names}
    sections = [
        (title, [_curve(names, rows, known, styles) for names in curves if bases & set(names)])
        for title, curves in SECTIONS
    ]
    rest = [name for name in METRICS if name in bases - drawn] + sorted(bases - drawn - set(METRICS))
    sections.append(("Every other metric", [_curve((name,), rows, known, styles) for name in rest]))
    return [(title, curves) for title, curves in sections if curves]


def steps_per_point(rows: Sequence[dict[str, float]]) -> int:
    """How many consecutive steps a point stands for."""
    return max(1, math.ceil(len(rows) / POINTS))


def _curve(names: tuple[str, ...], rows: Sequence[dict[str, float]], known: set[str], styles: dict[str, str]) -> Curve:
    metric = METRICS.get(names[0])
    share = metric is not None and metric.is_share
    domains = {domain: style for domain, style in styles.items() if f"{names[0]}/{domain}" in known}
    if len(names) > 1:
        lines = [(name, style, name) for name, style in zip(names, OWN_COLOURS, strict=False) if name in known]
    else:
        lines = [(domain, style, f"{names[0]}/{domain}") for domain, style in domains.items()]
        lines += [] if domains else [("all", "all", names[0])]
    windows = _windows(rows)
    series = [Series(name, style, [_mean(own, source) for own in windows]) for name, style, source in lines]
    chart = _hoverable(visible(names[0]), _places(windows), series, formats.percent_tick if share else formats.tick)
    meanings = [METRICS[name] for name in names if name in METRICS]
    unit = f"; {metric.unit}" if metric and metric.unit not in ("share", "ratio", "1") else ""
    return Curve(
        title=" and ".join(names) if len(names) < 3 else ", ".join(names),
        meaning=". ".join(item.meaning for item in meanings) + unit,
        reading="; ".join(item.reading for item in meanings),
        action="; ".join(item.action for item in meanings),
        legend=[(name, style) for name, style, _ in lines] if len(names) > 1 else [],
        chart=chart,
    )


def _windows(rows: Sequence[dict[str, float]]) -> list[Sequence[dict[str, float]]]:
    width = steps_per_point(rows)
    return [rows[start : start + width] for start in range(0, len(rows), width)]


def _places(windows: Sequence[Sequence[dict[str, float]]]) -> list[tuple[float, str]]:
    ends = [(int(own[0]["step"]), int(own[-1]["step"])) for own in windows]
    return [((a + b) / 2, f"step {a}" if a == b else f"steps {a} to {b}") for a, b in ends]


def _mean(rows: Sequence[dict[str, float]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row and math.isfinite(row[name])]
    return sum(values) / len(values) if values else None


def _hoverable(
    title: str, x: Sequence[tuple[float, str]], series: Sequence[Series], form: Callable[[float], str]
) -> Markup:
    """A line chart with, for each point, a strip that shows all its values while the pointer is on it."""
    known = [value for line in series for value in line.values if value is not None]
    if not known:
        return line_chart(title, x, series, form, x_label="step")
    ticks = _ticks(min(known), max(known))
    first, last = x[0][0], x[-1][0]
    margin = 0.03 * max(last - first, 1)
    frame = Frame((first - margin, last + margin), (ticks[0], ticks[-1]), _spoken(title, x, series, form), NARROW)
    frame.grid(whole_ticks(first, last), ticks, form, "step")
    for line in series:
        points = [
            None if value is None else (frame.x(place), frame.y(value))
            for (place, _), value in zip(x, line.values, strict=True)
        ]
        frame.path(points, f"line {line.style}")
        for point in points:
            if point is not None:
                frame.add("circle", f"dot {line.style}", cx=point[0], cy=point[1], r=2.0)
    for number in range(len(x)):
        _strip(frame, x, number, series, form)
    return frame.markup()


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers around the values, but none below 0 where no value is."""
    if low == high == 0:
        return [0.0, 1.0]
    ticks = nice_ticks(low, high, 5)
    return [value for value in ticks if value >= 0] if low >= 0 else ticks


def _strip(
    frame: Frame, x: Sequence[tuple[float, str]], number: int, series: Sequence[Series], form: Callable[[float], str]
) -> None:
    """The invisible strip of one point, and what appears on it."""
    here = frame.x(x[number][0])
    left = LEFT if number == 0 else (frame.x(x[number - 1][0]) + here) / 2
    right = frame.right if number == len(x) - 1 else (frame.x(x[number + 1][0]) + here) / 2
    group = ET.SubElement(frame.svg, "g", {"class": "at"})
    height = HEIGHT - TOP - BOTTOM
    ET.SubElement(group, "rect", _sized("strip", left, TOP, right - left, height))
    ET.SubElement(
        group, "line", {"class": "guide", "x1": f"{here:.1f}", "x2": f"{here:.1f}", "y1": f"{TOP:g}", "y2": "180"}
    )
    texts = [(x[number][1], "name")]
    texts += [
        (line.name + " " + form(line.values[number]), line.style) for line in series if line.values[number] is not None
    ]
    width = max(len(text) for text, _ in texts) * CHARACTER + 14
    start = here + 8 if here + 8 + width < frame.right else max(2.0, here - 8 - width)
    box = ET.SubElement(group, "g", {"class": "tip"})
    ET.SubElement(box, "rect", _sized("box", start, TOP, width, LINE * len(texts) + 8) | {"rx": "4"})
    for row, (text, style) in enumerate(texts):
        place = {"class": f"value {style}", "x": f"{start + 7:.1f}", "y": f"{TOP + LINE * (row + 1):.1f}"}
        ET.SubElement(box, "text", place).text = text


def _sized(style: str, x: float, y: float, width: float, height: float) -> dict[str, str]:
    sizes = {"x": x, "y": y, "width": width, "height": height}
    return {"class": style} | {name: f"{value:.1f}" for name, value in sizes.items()}


def _spoken(title: str, x: Sequence[tuple[float, str]], series: Sequence[Series], form: Callable[[float], str]) -> str:
    """What a screen reader says: each line's first and last value."""
    parts = []
    for line in series:
        known = [(name, value) for (_, name), value in zip(x, line.values, strict=True) if value is not None]
        if known:
            ends = [f"{form(value)} at {name}" for name, value in (known[0], known[-1])]
            parts.append(f"{line.name}: {' to '.join(ends)}")
    return f"{title}. " + "; ".join(parts)
