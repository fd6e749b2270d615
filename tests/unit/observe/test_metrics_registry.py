"""Every number has its sentence, and the documents that are made from the code are up to date."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_opd.observe.documents import generated
from megatron_opd.observe.metrics import GROUPS, METRICS, split_name

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted(generated(ROOT / "docs").items())


@pytest.mark.parametrize(("path", "text"), DOCUMENTS, ids=[path.name for path, _ in DOCUMENTS])
def test_documents_are_those_that_the_code_makes(path: Path, text: str) -> None:
    assert path.read_text() == text, "run `.venv/bin/python tools/make_docs.py`"


def test_every_metric_is_in_a_group_and_says_everything() -> None:
    for name, metric in METRICS.items():
        assert split_name(name) == (name, None) and name.split("/")[0] in GROUPS, name
        assert all((metric.meaning, metric.unit, metric.reading, metric.action)), name
        assert not metric.meaning.endswith(".") and "|" not in metric.meaning + metric.reading + metric.action, name
    assert {name.split("/")[0] for name in METRICS} == set(GROUPS)


def test_every_name_that_the_code_writes_is_known() -> None:
    literal = re.compile(rf'"((?:{"|".join(GROUPS)})/[a-z_0-9]+)"')
    sources = [path for path in (ROOT / "megatron_opd").rglob("*.py") if not path.name.startswith("metrics_")]
    written = {name for path in sources for name in literal.findall(path.read_text())}
    assert written >= {"loss/policy", "opd/gap", "perf/row_fill", "rollout/tokens"} and written <= set(METRICS)


def test_a_domain_is_told_from_a_metric() -> None:
    assert split_name("opd/gap/math") == ("opd/gap", "math")
    assert split_name("opd/gap/a/b") == ("opd/gap", "a/b")
