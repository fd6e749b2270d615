"""Charts: where marks are, and what is drawn when there is nothing to draw."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_opd.audit import formats
from megatron_opd.audit.charts import (
    BOTTOM,
    HEIGHT,
    TOP,
    WIDE,
    Outline,
    Series,
    bar_chart,
    histogram_chart,
    line_chart,
    nice_ticks,
)


def steps(count: int) -> list[tuple[float, str]]:
    return [(step, f"step {step}") for step in range(1, count + 1)]


def of_class(chart: str, style: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(chart).iter() if style in element.get("class", "").split()]


finite = st.floats(-1e6, 1e6)


@given(finite, finite)
@example(0.0, 1e-12)
@example(0.0, 5e-324)
def test_ticks_enclose_the_values_and_are_evenly_spaced(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high, 5)
    slack = 1e-6 * max(abs(low), abs(high)) + 1e-9
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 12
    np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


def test_a_missing_value_breaks_the_line_and_is_never_zero() -> None:
    values = [0.5, None, 0.7, 0.9, None]
    chart = line_chart("t", steps(5), [Series("math", "d0", values)], formats.tick, x_label="step")
    (path,) = of_class(chart, "line")
    assert re.sub(r"[^ML]", "", path.get("d")) == "MML"
    dots = of_class(chart, "dot")
    assert [dot.find("title").text for dot in dots] == ["math, step 1: 0.5", "math, step 3: 0.7", "math, step 4: 0.9"]
    assert all(TOP <= float(dot.get("cy")) <= HEIGHT - BOTTOM for dot in dots)
    heights = [float(dot.get("cy")) for dot in dots]
    assert heights == sorted(heights, reverse=True)  # larger is higher up


@pytest.mark.parametrize("values", [[0.2, 0.2 + 2**-54], [0.0, 0.0], [1e9, 1e9], [-3.0, -3.0], [1e-12, 2e-12]])
def test_values_that_are_equal_up_to_rounding_can_be_drawn(values: list[float]) -> None:
    chart = line_chart("t", steps(2), [Series("math", "d0", values)], formats.tick, x_label="step")
    assert "nan" not in chart and len(of_class(chart, "dot")) == 2


def test_one_step_is_a_dot() -> None:
    chart = line_chart("t", [(7, "step 7")], [Series("math", "d0", [0.5])], formats.tick, x_label="step", reference=0.5)
    assert len(of_class(chart, "dot")) == 1 and "7" in [tick.text for tick in of_class(chart, "tick")]


def test_nothing_to_draw_says_so() -> None:
    empty = [
        line_chart("t", steps(2), [Series("math", "d0", [None, None])], formats.tick, x_label="step"),
        histogram_chart("t", np.linspace(0, 1, 3), [], 1.0, "G"),
        bar_chart("t", [], 1.0, "correct"),
    ]
    assert all(of_class(chart, "nothing")[0].text == "n/a" for chart in empty)


def test_bars_stand_on_the_axis_and_are_as_high_as_their_shares() -> None:
    chart = bar_chart(
        "t", [Series("early", "d0 early", [0.2, 0.0, 0.4]), Series("late", "d0", [0.1, 0.3, 0.2])], 0.4, "c"
    )
    bars = of_class(chart, "bar")
    heights = np.array([float(bar.get("height")) for bar in bars])
    np.testing.assert_allclose(heights / heights.max(), np.array([0.2, 0.0, 0.4, 0.1, 0.3, 0.2]) / 0.4, atol=1e-3)
    bases = [float(bar.get("y")) + float(bar.get("height")) for bar in bars]
    np.testing.assert_allclose(bases, HEIGHT - BOTTOM, atol=0.02)
    lefts = [float(bar.get("x")) for bar in bars]
    assert sorted(lefts)[::2] == lefts[:3]  # early left of late, pair by pair


def test_a_histogram_has_its_mean_inside_and_zero_marked() -> None:
    outlines = [Outline("right", "o1", np.array([0.25, 0.75]), 0.5), Outline("wrong", "o0", np.array([1.0, 0.0]), -9.0)]
    chart = histogram_chart("t", np.array([-1.0, 0.0, 1.0]), outlines, 1.0, "G")
    means = of_class(chart, "mean")
    assert [mean.find("title").text for mean in means] == ["mean of right: +0.500", "mean of wrong: -9.000"]
    assert all(0 < float(mean.get("x1")) < WIDE for mean in means)
    assert len(of_class(chart, "zero")) == 1


def test_a_name_cannot_become_markup() -> None:
    name = "<script>alert(1)</script>\"'&"
    chart = line_chart(name, steps(2), [Series(name, "d0", [1.0, 2.0])], formats.tick, x_label="step")
    assert "<script" not in chart and ET.fromstring(chart).get("aria-label") == name


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (formats.percent(None), "n/a"),
        (formats.percent(0.0), "0 %"),
        (formats.percent(0.012), "1.2 %"),
        (formats.percent(0.0996), "10 %"),
        (formats.percent(0.5), "50 %"),
        (formats.percent(0.996), "99.6 %"),
        (formats.percent(1.0), "100 %"),
        (formats.nats(-0.0001), "+0.000"),
        (formats.nats(-0.25), "-0.250"),
        (formats.nats(None), "n/a"),
        (formats.size(12.34), "12.3"),
        (formats.size(12345.0), "12,345"),
        (formats.ratio(0.5251), "0.525"),
        (formats.tick(-0.25), "\N{MINUS SIGN}0.25"),
        (formats.percent_tick(0.025), "2.5 %"),
    ],
)
def test_numbers_are_written_as(shown: str, expected: str) -> None:
    assert shown == expected
