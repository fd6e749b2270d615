"""The charts of the page against the rollouts."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import numpy as np
import pytest
from audit_case import Drawn

from megatron_opd.audit import formats, panels
from megatron_opd.audit.panels import Panel, curves, difficulty, returns

STYLES = {"code": "d0", "math": "d1"}


def hints(panel: Panel, style: str) -> list[str]:
    """What marks of a CSS class tell when pointed at."""
    elements = [element for element in ET.fromstring(panel.chart) if style in element.get("class", "").split()]
    return [element.find("title").text for element in elements]


def ticks(panel: Panel) -> list[str]:
    return [element.text for element in ET.fromstring(panel.chart) if element.get("class") == "tick"]


def test_each_step_is_a_point_of_each_domain(drawn: Drawn) -> None:
    found = curves(drawn.rollouts, drawn.diagnosis, STYLES)
    assert len(found) == 8
    by_step = drawn.diagnosis.by_step_and_domain
    expected = [f"math, step {step}: {by_step[step]['math'].length:.4g}" for step in drawn.diagnosis.steps]
    length = next(panel for panel in found if panel.title == "Length")
    assert [hint for hint in hints(length, "dot") if hint.startswith("math")] == expected


def test_many_steps_are_pooled_not_averaged(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panels, "POINTS", 3)
    assert panels.steps_per_point(drawn.diagnosis) == 3
    auc = next(panel for panel in curves(drawn.rollouts, drawn.diagnosis, STYLES) if panel.title == "Pairwise AUC")
    math = [hint for hint in hints(auc, "dot") if hint.startswith("math")]
    early, late = drawn.diagnosis.early["math"], drawn.diagnosis.late["math"]  # thirds of the run, as the points are
    assert math[0] == f"math, steps 1 to 3: {early.order.auc:.4g}"
    assert math[-1] == f"math, steps 7 to 9: {late.order.auc:.4g}" and len(math) == 3


def test_histograms_hold_every_return_and_have_the_same_axes(drawn: Drawn) -> None:
    found = returns(drawn.rollouts, drawn.diagnosis)
    own = drawn.rollouts.take((drawn.rollouts.domain == "math") & np.isfinite(drawn.rollouts.mean_gap))
    counts = {name: count for name, _, count in found["math"].counts}
    assert counts == {name: int((own.outcome == outcome).sum()) for name, _, outcome in panels.OUTCOMES}
    before, after, depth = found["math"].panels
    assert ticks(before) == ticks(after)
    means = [own.trained_gap[own.outcome == outcome].mean() for outcome in (1, 0, -1)]
    names = ("right", "wrong", "unknown")
    assert hints(after, "mean") == [f"mean of {name}: {mean:+.3f}" for name, mean in zip(names, means, strict=True)]
    edges = np.linspace(-0.1, 0.1, 5)  # narrower than the returns
    for outline in panels._outlines(own.mean_gap, own.outcome, edges):
        assert outline.shares.sum() == pytest.approx(1.0)
    first = drawn.diagnosis.by_domain["math"].depth_correct[0]
    assert hints(depth, "dot")[0] == f"right, quarter 1: {formats.tick(first)}"


def test_difficulty_shows_early_beside_late(drawn: Drawn) -> None:
    code, math = difficulty(drawn.diagnosis, STYLES)
    assert (code.title, math.title) == ("code", "math") and ticks(code)[:2] == ticks(math)[:2]
    item = drawn.diagnosis.difficulty["math"]
    bars = hints(math, "bar")
    assert len(bars) == 2 * (item.samples + 1)
    assert bars[0].startswith("first third of steps, 0 right: ") and bars[-1].startswith(
        "last third of steps, 8 right: "
    )
    assert f"{item.left_out} groups left out" in math.meaning
