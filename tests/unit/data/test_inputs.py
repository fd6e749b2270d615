"""Which stream a config gives, and what is checked before a run."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_opd.config import Config, load_config
from megatron_opd.coordinator.buffer import Draws
from megatron_opd.coordinator.state import Progress, read, write
from megatron_opd.data import inputs
from megatron_opd.data.inputs import check_inputs, open_stream
from megatron_opd.errors import DataError

TOY = Path(__file__).resolve().parents[3] / "conf/toy.yaml"
STREAM = ("data.stream.window_mb=32", "data.stream.max_bad_share=0.01")
MIXTURE = ("data.mixture={math: 0.75, code: 0.25}",)
LAZY = ("data.lazy.prior=[1,1]",)
PARQUET = ("parquet",)  # the same records in a parquet file of row groups of 7


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


@pytest.fixture
def config(tmp_path: Path):
    """The toy config with 40 prompts of its own, half of them code, and further settings."""
    lines = [
        json.dumps({"id": f"p{n}", "prompt": f"q{n}", "answer": str(n), "domain": ["math", "code"][n % 2]})
        for n in range(40)
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=7)

    def loading(*settings: str) -> Config:
        suffix = "parquet" if settings[:1] == PARQUET else "jsonl"
        fixed = [f"data.train={tmp_path / 'train'}.{suffix}", "data.eval=null", "data.columns.id=id"]
        return load_config(TOY, [*fixed, *(item for item in settings if item not in PARQUET)])

    return loading


@pytest.mark.parametrize(
    "settings",
    [
        *[(), STREAM, MIXTURE, STREAM + MIXTURE, LAZY, LAZY + MIXTURE],
        *[PARQUET, PARQUET + STREAM, PARQUET + STREAM + MIXTURE],
    ],
)
def test_a_killed_run_draws_every_prompt_once(config, tokenizer, tmp_path: Path, settings: tuple[str, ...]) -> None:
    stream, fingerprint = open_stream(config(*settings), tokenizer)
    draws = Draws(stream, 0, [])
    trained = [prompt.id for step in range(2) for _, prompt in draws.take(step, 5)]
    draws.take(2, 5)  # under way when the run dies
    draws.take(3, 5)
    in_flight = draws.in_flight(2)
    write(tmp_path / "state", Progress(groups=draws.next_group, in_flight=in_flight), stream.state(), fingerprint)
    expected = trained + [prompt.id for number in (2, 3) for _, prompt in draws._drawn[number]]
    expected += [prompt.id for step in (4, 5, 6) for _, prompt in draws.take(step, 10)]

    resumed, again = open_stream(config(*settings), tokenizer)
    progress, state = read(tmp_path / "state", again)
    resumed.restore(state)
    after = Draws(resumed, progress.groups, progress.in_flight)
    assert trained + [prompt.id for step in range(2, 6) for _, prompt in after.take(step, 10)] == expected
    if not any("mixture" in item or "lazy" in item for item in settings):
        assert Counter(expected[:40]) == Counter(f"p{n}" for n in range(40))


@pytest.mark.parametrize("settings", [MIXTURE, STREAM + MIXTURE, LAZY + MIXTURE, PARQUET + STREAM + MIXTURE])
def test_a_mixture_holds_in_memory_and_streamed(config, tokenizer, settings: tuple[str, ...]) -> None:
    drawn, _ = open_stream(config(*settings), tokenizer)
    assert Counter(prompt.domain for prompt in drawn.take(40)) == {"math": 30, "code": 10}


def test_of_a_streamed_file_the_first_records_are_checked(config, tokenizer, tmp_path: Path, monkeypatch) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "p40", "prompt": "?", "domain": "math"}\n')
    with pytest.raises(DataError, match="answer"):
        check_inputs(config(), tokenizer)
    with pytest.raises(DataError, match="answer"):
        check_inputs(config(*STREAM), tokenizer)
    monkeypatch.setattr(inputs, "HEAD", 40)
    check_inputs(config(*STREAM), tokenizer)


@pytest.mark.parametrize("settings", [MIXTURE, STREAM + MIXTURE])
def test_a_domain_of_the_mixture_without_records(config, tokenizer, tmp_path: Path, settings: tuple[str, ...]) -> None:
    (tmp_path / "train.jsonl").write_text('{"id": "p", "prompt": "?", "answer": "1", "domain": "math"}\n')
    with pytest.raises(DataError, match="A domain has no prompts"):
        open_stream(config(*settings), tokenizer)[0].take(8)
