"""The stages of one step over time: a bar for each group of rollouts, then training and refresh below."""

from __future__ import annotations

from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from megatron_opd.audit.charts import nice_ticks
from megatron_opd.audit.formats import tick

STAGES = (("generate", "d0"), ("verify", "d3"), ("wait to be balanced", "ou"), ("score", "d1"))
TRAINER = (("train", "o1"), ("refresh", "d2"))
WIDTH, LEFT, RIGHT, TOP = 960.0, 74.0, 16.0, 8.0
ROW, GAP, BASE = 6.0, 10.0, 34.0


@dataclass(frozen=True, slots=True)
class Picture:
    """One step."""

    step: int
    title: str
    chart: Markup


def pictures(events: list[dict]) -> list[Picture]:
    """Of the newest, the slowest and the first of the steps that ``events`` (timelines) tell of."""
    if not events:
        return []
    slowest = max(events, key=lambda event: event["live"])
    chosen = {event["step"]: event for event in (events[-1], slowest, events[0])}
    roles = {events[0]["step"]: "the first", slowest["step"]: "the slowest", events[-1]["step"]: "the newest"}
    return [_picture(event, roles[step]) for step, event in chosen.items()]


def _picture(event: dict, role: str) -> Picture:
    shown, count = len(event["groups"]), event["all_groups"]
    groups = f"{count} groups" if shown == count else f"{shown} of {count} groups"
    title = f"Step {event['step']}, {role}: {event['live']:.1f} s, {groups}"
    return Picture(event["step"], title, _draw(event, title))


def _draw(event: dict, title: str) -> Markup:
    groups = event["groups"]
    row = ROW if len(groups) > 24 else 2 * ROW
    end = max([event["live"], *(group[-1] for group in groups)])
    ticks = [value for value in nice_ticks(0.0, end, 8) if value <= end * 1.001]
    below = TOP + len(groups) * row + GAP
    height = below + 2 * (2 * ROW + 4) + BASE
    svg = ET.Element("svg", {"viewBox": f"0 0 {WIDTH:g} {height:g}", "role": "img", "aria-label": title})

    def x(seconds: float) -> float:
        return LEFT + seconds / end * (WIDTH - LEFT - RIGHT)

    for value in ticks:
        place = f"{x(value):.1f}"
        ET.SubElement(svg, "line", {"class": "grid", "x1": place, "x2": place, "y1": f"{TOP}", "y2": f"{height - 32}"})
        _text(svg, f"{tick(value)} s", x(value), height - 18, "middle")
    for number, marks in enumerate(groups):
        for (name, style), begin, stop in zip(STAGES, marks[:-1], marks[1:], strict=True):
            _bar(svg, (x(begin), x(stop)), TOP + number * row, row - 1, style, f"{name}: {begin:.2f} to {stop:.2f} s")
    if groups:
        _text(svg, "groups", LEFT - 8, TOP + 10, "end")
    spans = (event["trained"], [event["trained"][1], event["live"]])
    for number, ((name, style), (begin, stop)) in enumerate(zip(TRAINER, spans, strict=True)):
        top = below + number * (2 * ROW + 4)
        _bar(svg, (x(max(begin, 0.0)), x(stop)), top, 2 * ROW, style, f"{name}: {begin:.2f} to {stop:.2f} s")
        _text(svg, name, LEFT - 8, top + 10, "end")
    return Markup(ET.tostring(svg, encoding="unicode"))  # ElementTree has escaped every text


def _bar(svg: ET.Element, ends: tuple[float, float], top: float, height: float, style: str, hint: str) -> None:
    width = max(ends[1] - ends[0], 0.4)
    sizes = {"x": ends[0], "y": top, "width": width, "height": height}
    places = {name: f"{value:.1f}" for name, value in sizes.items()}
    bar = ET.SubElement(svg, "rect", {"class": f"bar {style}"} | places)
    ET.SubElement(bar, "title").text = hint


def _text(svg: ET.Element, text: str, x: float, y: float, anchor: str) -> None:
    place = {"class": "tick", "x": f"{x:.1f}", "y": f"{y:.1f}", "text-anchor": anchor}
    ET.SubElement(svg, "text", place).text = text
