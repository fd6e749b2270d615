"""How numbers are written. None is "n/a": nothing can be said, which is not 0."""

from __future__ import annotations


def percent(value: float | None) -> str:
    """12 %, or with one digit more near either end: 1.2 %, 99.6 %."""
    if value is None:
        return "n/a"
    digits = 1 if 0 < value < 0.0995 or 0.99 < value < 1 else 0
    return f"{100 * value:.{digits}f} %"


def nats(value: float | None) -> str:
    """A gap, margin or offset that has a sign: +0.015."""
    return "n/a" if value is None else f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: never -0.000


def size(value: float | None) -> str:
    """A number without a sign: 0.125, 12.3, 123."""
    if value is None:
        return "n/a"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def ratio(value: float | None) -> str:
    """An area under the curve: 0.525."""
    return "n/a" if value is None else f"{value:.3f}"


def whole(value: int) -> str:
    """12,345."""
    return f"{value:,}"


def tick(value: float) -> str:
    """A value beside an axis: as short as it can be."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def percent_tick(value: float) -> str:
    """A share beside an axis."""
    return f"{100 * value:.3g} %".replace("-", "\N{MINUS SIGN}")
