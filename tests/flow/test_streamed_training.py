"""A streamed training file with real servers: a killed run goes on at the very record, whatever the file's format."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opd.config import load_config
from megatron_opd.data.inputs import open_stream
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.observe.trajectories import read_trajectories

from runs import ROOT, TOY, Servers, finish

STEPS, PROMPTS, SAMPLES = 4, 8, 4
RECORDS = 30  # fewer than are drawn: the second epoch begins on the way
SETTINGS = [
    *("existing=resume", f"steps={STEPS}", "checkpoint.every_steps=1", "data.eval=null", "data.columns.id=id"),
    *(f"rollout.prompts_per_step={PROMPTS}", f"rollout.samples_per_prompt={SAMPLES}"),
    *("data.stream.window_mb=1", "data.mixture={math: 0.75, code: 0.25}"),
]


@pytest.fixture(params=["jsonl", "parquet"])
def train_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Some prompts of the toy world, each with an id; of parquet in row groups of 7."""
    lines = (ROOT / "tools/toy/data/train.jsonl").read_text().splitlines()
    every = len(lines) // RECORDS
    rows = [json.loads(line) | {"id": f"p{number}"} for number, line in enumerate(lines[::every])]
    path = tmp_path / f"train.{request.param}"
    if request.param == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        plain = [
            row | {"answer": row["answer"] if isinstance(row["answer"], str) else json.dumps(row["answer"])}
            for row in rows
        ]
        pq.write_table(pa.Table.from_pylist(plain), path, row_group_size=7)
    return path


@pytest.mark.timeout(1800)  # two starts: a minute on two free cores, far more on busy ones
def test_a_killed_run_draws_what_it_would_have_drawn(servers: Servers, run_train, train_file: Path) -> None:
    settings = [*servers.attach(), *SETTINGS, f"data.train={train_file}"]
    config = load_config(TOY, settings)
    stream, _ = open_stream(config, load_tokenizer(config.student.model))
    expected = [prompt.id for prompt in stream.take(STEPS * PROMPTS)]
    assert len(set(expected)) < len(expected)

    killed = run_train("streamed", *settings)
    killed.wait_for_step(2)
    killed.kill_everything()
    resumed = run_train("streamed", *settings)
    assert finish(resumed) == 0, resumed.text()
    assert "going on after step" in resumed.text() and resumed.steps() == list(range(1, STEPS + 1))
    rows = read_trajectories(resumed.folder / "trajectories").sort_by("group")
    names = rows.column("prompt_id").to_pylist()
    assert names == [name for name in expected for _ in range(SAMPLES)]
    assert not resumed.folder.joinpath("pass_rates.parquet").exists()  # docs/data.md
