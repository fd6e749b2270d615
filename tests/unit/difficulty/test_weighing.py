"""From pass rates to repeats, by hand; and the files that are made of them."""

from __future__ import annotations

import datetime
import gzip
import json
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opd.config import ColumnsConfig, DifficultyConfig
from megatron_opd.data.pass_rates import PassRates
from megatron_opd.data.reading import PromptReader, read_prompts
from megatron_opd.difficulty.picture import draw_histograms
from megatron_opd.difficulty.weighing import weigh
from megatron_opd.difficulty.weighted import check_convertible, write_weighted
from megatron_opd.errors import DataError

N2 = DifficultyConfig(samples=2, max_repeats=3)


def rates_of(*rows: tuple[str, int, int]) -> PassRates:
    """Rates of 2 samples each from rows of domain, graded and passes."""
    domains, graded, passes = zip(*rows, strict=True)
    ids, samples = [f"p{position}" for position in range(len(rows))], np.full(len(rows), 2)
    return PassRates(ids, list(domains), samples, np.array(graded), np.array(passes), "m", {})


def test_repeats_by_hand() -> None:
    # math: c = 0, 1, 2 has 8, 1, 3 prompts. The mean of the middle is 1: both ends are heavy, U. Nothing is higher in
    # the middle: it stays. code: 9, 1, 2: the hard end hides the easy one, and 1 .. 2 are raised to 2: p12 twice.
    math = [("math", 2, 0)] * 8 + [("math", 2, 1)] + [("math", 2, 2)] * 3
    code = [("code", 2, 1)] + [("code", 2, 2)] * 2 + [("code", 2, 0)] * 9
    times, (of_code, of_math) = weigh(rates_of(*math, *code), N2, seed=0)
    assert times.tolist() == [1] * 12 + [2, 1, 1] + [1] * 9
    assert (of_math.domain, of_math.shape, of_math.counts.tolist()) == ("math", "U", [8, 1, 3])
    assert (of_code.domain, of_code.shape, of_code.raised) == ("code", "mirrored_J", range(1, 3))
    assert of_code.counts.tolist() == [9, 1, 2] and of_code.target.tolist() == [9, 2, 2]
    assert of_code.appearances.tolist() == [9, 2, 2] and (of_code.prompts, of_code.epoch) == (12, 13)
    assert (of_code.passes, of_code.graded) == (5, 24)


def test_the_cap_wins_over_the_target() -> None:
    # 0, 1, 2 has 40, 1, 9: mirrored J, 1 .. 2 are wanted 9 times, and the one prompt with c = 1 may appear 3 times.
    rows = [("math", 2, 0)] * 40 + [("math", 2, 1)] + [("math", 2, 2)] * 9
    times, (row,) = weigh(rates_of(*rows), N2, seed=0)
    assert times.tolist() == [1] * 40 + [3] + [1] * 9
    assert row.target.tolist() == [40, 9, 9] and row.appearances.tolist() == [40, 3, 9]


def test_the_level_ends_raises_to_the_unraised_end() -> None:
    rows = [("math", 2, 0)] * 40 + [("math", 2, 1)] * 20 + [("math", 2, 2)] * 9
    times, (row,) = weigh(rates_of(*rows), N2.model_copy(update={"level": "ends"}), seed=0)
    assert row.shape == "mirrored_J" and row.appearances.tolist() == [40, 40, 27]
    assert times[40:60].tolist() == [2] * 20 and times[60:].tolist() == [3] * 9


def test_prompts_with_an_unknown_outcome_are_left_alone() -> None:
    known = [("code", 2, 1)] + [("code", 2, 2)] * 2 + [("code", 2, 0)] * 9
    times, (row,) = weigh(rates_of(("code", 1, 1), *known, ("code", 0, 0)), N2, seed=0)
    assert times.tolist() == [1, 2] + [1] * 12 and row.counts.tolist() == [9, 1, 2]
    assert (row.left_alone, row.prompts, row.epoch) == (2, 14, 15)
    assert (row.passes, row.graded) == (6, 25)


def test_a_domain_without_any_known_outcome_stays_as_it_is() -> None:
    times, (row,) = weigh(rates_of(("law", 0, 0), ("law", 0, 0)), N2, seed=0)
    assert times.tolist() == [1, 1] and row.shape == "flat" and row.epoch == 2


def test_nothing_is_deleted_and_the_same_seed_gives_the_same() -> None:
    passes = np.random.default_rng(0).integers(0, 9, 500) * np.random.default_rng(1).integers(0, 2, 500)
    samples = np.full(500, 8)
    rates = PassRates([str(i) for i in range(500)], ["math"] * 500, samples, samples, passes, "m", {})
    times, (row,) = weigh(rates, DifficultyConfig(), seed=5)
    assert times.min() == 1 and times.max() <= 4 and (row.appearances >= row.counts).all()
    assert row.appearances.sum() == times.sum()
    assert (times == weigh(rates, DifficultyConfig(), seed=5)[0]).all()


LINES = [
    '{"prompt":"1 + 1 = \u00e9", "answer": 2.50,  "domain": "math", "note": {"repeats": 1e400}}',
    '  {"prompt": "3", "answer": "\\u00e9", "domain": "math"}  \r',
]


def write_lines(path: Path) -> None:
    text = "\n".join(LINES).encode() + b"\n\n"
    with gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb") as file:
        file.write(text)


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz"])
def test_records_stay_as_they_are(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name)
    write_weighted(tmp_path / name, tmp_path / "weighted.jsonl", [3, 1], [0.25, None])
    first, second = (tmp_path / "weighted.jsonl").read_bytes().decode().split("\n")[:2]
    assert first == LINES[0][:-1] + ', "repeats": 3, "pass_rate": 0.25}'
    assert second == LINES[1].rstrip()[:-1] + ', "repeats": 1, "pass_rate": null}'
    assert json.loads(second)["answer"] == "\u00e9" and len(list(tmp_path.iterdir())) == 2


def test_rows_of_a_parquet_file_keep_all_columns(tmp_path: Path, byte_tokenizer) -> None:
    rows = {
        "messages": [[{"role": "user", "content": "1 + 1"}], [{"role": "user", "content": "2"}]],
        "label": [Decimal("2.00"), Decimal("0.10")],
        "day": [datetime.date(2026, 1, 2), None],
        "tags": [{"level": 3}, {"level": None}],
    }
    pq.write_table(pa.table(rows), tmp_path / "p.parquet")
    write_weighted(tmp_path / "p.parquet", tmp_path / "weighted.jsonl", [2, 1], [0.5, 1.0])
    first, second = (json.loads(line) for line in (tmp_path / "weighted.jsonl").read_text().splitlines())
    assert first == {
        "messages": rows["messages"][0],
        "label": 2,
        "day": "2026-01-02",
        "tags": {"level": 3},
        "repeats": 2,
        "pass_rate": 0.5,
    }
    assert (second["label"], second["day"]) == ("0.10", None)
    columns = ColumnsConfig(prompt="messages", answer="label", domain=None)
    old, new = (
        read_prompts(PromptReader(tmp_path / name, changed, "math", {"math"}, byte_tokenizer(), 200))
        for name, changed in [
            ("p.parquet", columns),
            ("weighted.jsonl", columns.model_copy(update={"repeats": "repeats"})),
        ]
    )
    assert [(p.text, p.answer, p.token_ids) for p in old] == [(p.text, p.answer, p.token_ids) for p in new]
    assert [p.repeats for p in old] == [1, 1] and [p.repeats for p in new] == [2, 1]


@pytest.mark.parametrize("column", ["repeats", "pass_rate"])
def test_a_file_that_has_such_a_column_is_refused(tmp_path: Path, column: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(LINES[0] + "\n" + json.dumps({"prompt": "1", column: 2}) + "\n")
    with pytest.raises(DataError, match=rf"{column}' already(.|\n)*p\.jsonl:2(.|\n)*rename"):
        check_convertible(path)


def test_a_value_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["1", "2"], "image": [None, b"\x00"]}), tmp_path / "p.parquet")
    with pytest.raises(DataError, match=r"p\.parquet:2(.|\n)*type bytes"):
        check_convertible(tmp_path / "p.parquet")


def test_a_failure_leaves_no_weighted_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "p.jsonl")
    with pytest.raises(ValueError):
        write_weighted(tmp_path / "p.jsonl", tmp_path / "weighted.jsonl", [1], [1.0])
    assert not (tmp_path / "weighted.jsonl").exists()


@pytest.mark.parametrize(("domains", "samples"), [(1, 1), (3, 8), (2, 64)])
def test_a_picture_is_drawn_for_any_number_of_domains_and_samples(tmp_path: Path, domains: int, samples: int) -> None:
    names = [f"domain {number}" for number in range(domains)]
    passes, full = np.arange(10 * domains) % (samples + 1), np.full(10 * domains, samples)
    rates = PassRates([str(i) for i in range(len(full))], names * 10, full, full, passes, "m", {})
    _, rows = weigh(rates, DifficultyConfig(samples=samples), seed=0)
    draw_histograms(tmp_path / "histogram.png", rows, "a model")
    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["histogram.png"]
