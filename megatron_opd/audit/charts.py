"""Charts as inline SVG: lines over steps, histograms, bars. Colours and fonts come from the page's style sheet.

Text goes through ElementTree, so a domain's name cannot become markup. A missing value (None) is a gap in a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

import numpy as np
from markupsafe import Markup

from megatron_opd.audit.formats import nats, percent, percent_tick, tick

NARROW, WIDE, HEIGHT = 310.0, 400.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 12.0, 12.0, 34.0

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its values at the chart's x positions, and the CSS class that gives it its colour."""

    name: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Outline:
    """One histogram over shared bins: the share of rollouts in each, and their mean."""

    name: str
    style: str
    shares: np.ndarray
    mean: float


class Frame:
    """Axes of one chart: maps data to pixels and draws grid, ticks and labels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], label: str, width: float) -> None:
        self._x, self._y = x, y
        self.right = width - RIGHT
        self.svg = ET.Element("svg", viewBox=f"0 0 {width:g} {HEIGHT:g}", role="img")
        self.svg.set("aria-label", label)

    def x(self, value: float) -> float:
        low, high = self._x
        return LEFT + (value - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high = self._y
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def add(
        self, tag: str, style: str, text: str | None = None, hint: str | None = None, **places: float | str
    ) -> None:
        """An element of CSS class ``style``; underscores in names of attributes are hyphens."""
        shown = {
            name.replace("_", "-"): f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
            for name, value in places.items()
        }
        element = ET.SubElement(self.svg, tag, {"class": style} | shown)
        element.text = text
        if hint is not None:
            ET.SubElement(element, "title").text = hint

    def grid(self, x_ticks: Sequence[float], y_ticks: Sequence[float], form: Format, x_label: str) -> None:
        """Horizontal lines with their values, and values below."""
        for value in y_ticks:
            self.across(value, "grid")
            self.add("text", "tick", form(value), x=LEFT - 7, y=self.y(value) + 4, text_anchor="end")
        base = HEIGHT - BOTTOM
        self.add("line", "axis", x1=LEFT, x2=self.right, y1=base, y2=base)
        for value in x_ticks:
            self.add("text", "tick", tick(value), x=self.x(value), y=base + 15, text_anchor="middle")
        self.add("text", "label", x_label, x=(LEFT + self.right) / 2, y=HEIGHT - 4, text_anchor="middle")

    def across(self, y: float, style: str) -> None:
        """A horizontal line at a value."""
        self.add("line", style, x1=LEFT, x2=self.right, y1=self.y(y), y2=self.y(y))

    def upright(self, x: float, style: str, hint: str | None = None) -> None:
        """A vertical line at a value."""
        self.add("line", style, hint=hint, x1=self.x(x), x2=self.x(x), y1=TOP, y2=HEIGHT - BOTTOM)

    def path(self, points: Sequence[tuple[float, float] | None], style: str) -> None:
        """A line through pixel positions, interrupted where there is none."""
        words, pen = [], "M"
        for point in points:
            words += [f"{pen}{point[0]:.1f} {point[1]:.1f}"] if point else []
            pen = "L" if point else "M"
        self.add("path", style, d="".join(words))

    def markup(self) -> Markup:
        return Markup(ET.tostring(self.svg, encoding="unicode"))  # ElementTree has escaped every text


def line_chart(
    title: str,
    x: Sequence[tuple[float, str]],
    series: Sequence[Series],
    form: Format,
    *,
    x_label: str,
    reference: float | None = None,
    width: float = NARROW,
) -> Markup:
    """Lines through dots that tell their values. ``x``: place and name of each point, for example (3, "step 3").

    ``reference``: a value worth comparing with, drawn dashed.
    """
    known = [value for line in series for value in line.values if value is not None]
    if not known:
        return _nothing(title, width)
    known += [] if reference is None else [reference]
    ticks = nice_ticks(min(known), max(known), 5)
    first, last = x[0][0], x[-1][0]
    margin = 0.03 * max(last - first, 1)
    frame = Frame((first - margin, last + margin), (ticks[0], ticks[-1]), title, width)
    frame.grid(whole_ticks(first, last), ticks, form, x_label)
    if reference is not None:
        frame.across(reference, "reference")
    for line in series:
        points = [
            None if value is None else (frame.x(place), frame.y(value))
            for (place, _), value in zip(x, line.values, strict=True)
        ]
        frame.path(points, f"line {line.style}")
        for (_, name), value, point in zip(x, line.values, points, strict=True):
            if point is not None:
                hint = f"{line.name}, {name}: {form(value)}"
                frame.add("circle", f"dot {line.style}", hint=hint, cx=point[0], cy=point[1], r=2.4)
    return frame.markup()


def histogram_chart(title: str, edges: np.ndarray, outlines: Sequence[Outline], top: float, x_label: str) -> Markup:
    """Step outlines over the bins between ``edges``, with a mark at each mean; ``top``: highest share of the axis."""
    if not outlines:
        return _nothing(title, WIDE)
    low, high = float(edges[0]), float(edges[-1])
    ticks = nice_ticks(0.0, top, 4)
    frame = Frame((low, high), (0.0, ticks[-1]), title, WIDE)
    frame.grid([value for value in nice_ticks(low, high, 6) if low <= value <= high], ticks, percent_tick, x_label)
    if low < 0 < high:
        frame.upright(0.0, "zero")
    for outline in outlines:
        heights = [0.0, *np.repeat(outline.shares, 2).tolist(), 0.0]
        places = zip(np.repeat(edges, 2).tolist(), heights, strict=True)
        frame.path([(frame.x(at), frame.y(height)) for at, height in places], f"area {outline.style}")
    for outline in outlines:
        hint = f"mean of {outline.name}: {nats(outline.mean)}"
        frame.upright(min(max(outline.mean, low), high), f"mean {outline.style}", hint)
    return frame.markup()


def bar_chart(title: str, groups: Sequence[Series], top: float, x_label: str) -> Markup:
    """Bars side by side at 0, 1, 2, ...; values are shares."""
    if not groups:
        return _nothing(title, WIDE)
    count = len(groups[0].values)
    ticks = nice_ticks(0.0, top, 4)
    frame = Frame((-0.5, count - 0.5), (0.0, ticks[-1]), title, WIDE)
    frame.grid(range(0, count, math.ceil(count / 17)), ticks, percent_tick, x_label)
    width = 0.84 / len(groups)
    for place, group in enumerate(groups):
        for at, value in enumerate(group.values):
            left, right = (frame.x(at - 0.42 + (place + end) * width) for end in (0, 1))
            size = {"x": left, "y": frame.y(value), "width": right - left - 1, "height": frame.y(0.0) - frame.y(value)}
            frame.add("rect", f"bar {group.style}", hint=f"{group.name}, {at} right: {percent(value)}", **size)
    return frame.markup()


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers that enclose low .. high: multiples of 1, 2 or 5 times a power of ten."""
    low, high = widened(float(low), float(high))
    raw = (high - low) / count
    exponent = math.floor(math.log10(raw))
    power = 10.0**exponent
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12 - exponent) for number in range(first, last + 1)]


def whole_ticks(first: float, last: float) -> list[float]:
    """Round whole numbers from first to last, at least one."""
    found = [value for value in nice_ticks(first, last, 7) if value == int(value) and first <= value <= last]
    return found or [first]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, or a wider one where both ends are equal up to rounding."""
    largest = max(abs(low), abs(high))
    margin = 0.0 if high - low > max(1e-6 * largest, 1e-300) else max(0.1 * largest, 1e-3)
    return low - margin, high + margin


def _nothing(title: str, width: float) -> Markup:
    frame = Frame((0.0, 1.0), (0.0, 1.0), title, width)
    frame.add("text", "nothing", "n/a", x=width / 2, y=HEIGHT / 2, text_anchor="middle")
    return frame.markup()
