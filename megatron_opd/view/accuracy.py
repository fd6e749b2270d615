"""Accuracy on held-out prompts, by domain: bars with one standard error to either side."""

from __future__ import annotations

from markupsafe import Markup

from megatron_opd.audit import formats
from megatron_opd.audit.charts import BOTTOM, HEIGHT, WIDE, Frame, nice_ticks
from megatron_opd.view.history import Accuracy

MOMENTS = (("before", "ou"), ("during", "d1"), ("after", "o1"), ("teacher", "d0"))
PER_DOMAIN = 130.0  # width of a domain's bars


def accuracy_chart(accuracies: dict[str, dict[str, Accuracy]]) -> Markup:
    """A group of bars for each domain; what was not evaluated is left out."""
    moments = [(when, style) for when, style in MOMENTS if when in accuracies]
    domains = sorted({domain for found in accuracies.values() for domain in found})
    known = [item.value + (item.error or 0) for found in accuracies.values() for item in found.values() if item.value]
    ticks = nice_ticks(0.0, min(max(known, default=1.0), 1.0), 5)
    width = max(WIDE, 62 + PER_DOMAIN * len(domains))
    frame = Frame((-0.5, len(domains) - 0.5), (0.0, ticks[-1]), _spoken(accuracies), width)
    frame.grid([], ticks, formats.percent_tick, "")
    share = 0.78 / max(len(moments), 1)
    for place, domain in enumerate(domains):
        frame.add("text", "tick", domain, x=frame.x(place), y=HEIGHT - BOTTOM + 16, text_anchor="middle")
        for number, (when, style) in enumerate(moments):
            item = accuracies[when].get(domain)
            if item is not None and item.value is not None:
                _bar(frame, place - 0.39 + number * share, share, item, style, f"{domain} {when}: {shown(item)}")
    return frame.markup()


def shown(item: Accuracy | None) -> str:
    """25.5 % (3.1): value and standard error in points."""
    if item is None:
        return ""
    if item.value is None:
        return "not graded"
    return f"{100 * item.value:.1f} %" + ("" if item.error is None else f" ({100 * item.error:.1f})")


def _bar(frame: Frame, left: float, width: float, item: Accuracy, style: str, hint: str) -> None:
    begin, end = frame.x(left), frame.x(left + width) - 3
    size = {"x": begin, "y": frame.y(item.value), "width": end - begin, "height": frame.y(0.0) - frame.y(item.value)}
    frame.add("rect", f"bar {style}", hint=hint, **size)
    if item.error:
        low, high, middle = frame.y(item.value - item.error), frame.y(item.value + item.error), (begin + end) / 2
        frame.add("line", "whisker", x1=middle, x2=middle, y1=low, y2=high)
        for y in (low, high):
            frame.add("line", "whisker", x1=middle - 5, x2=middle + 5, y1=y, y2=y)


def _spoken(accuracies: dict[str, dict[str, Accuracy]]) -> str:
    parts = [f"{domain} {when} {shown(item)}" for when, found in accuracies.items() for domain, item in found.items()]
    return "Accuracy on held-out prompts: " + ", ".join(parts)
