"""Going on: from which checkpoint, under which config, and what becomes of the rest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.errors import CheckpointError, ConfigError
from megatron_opd.runtime.checkpoints import MANIFEST, TRACKER
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.train.resume import check_unchanged, resume

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
ENDPOINTS = Endpoints("http://a:1", ["http://b:2"], {"math": ["http://c:3"]}, [], "127.0.0.1", 4)
LATER = Endpoints("http://a:9", ["http://b:2"], {"math": ["http://c:3"]}, [], "127.0.0.1", 4)


def config(output: Path, *overrides: str) -> Config:
    return load_config(TOY, [f"output={output}", "existing=resume", *overrides])


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that died after step 5, in the middle of a line, with checkpoints of steps 2 and 4."""
    made = RunDirectory.create(config(tmp_path), ENDPOINTS)
    for step in range(1, 6):
        with made.metrics.open("a") as file:
            file.write(json.dumps({"step": step, "loss/policy": step / 3}) + "\n")
        (made.trajectories / f"step_{step:06d}.parquet").write_text(str(step))
    with made.metrics.open("a") as file:
        file.write('{"step": 6, "loss')
    (made.trajectories / "step_000006.tmp").write_text("half")
    made.events.write_text('{"event": "step"}\n{"eve')
    for name in ("eval_before.parquet", "eval_after.parquet", "pass_rates.parquet"):
        (made.path / name).write_text(name)
    for step in (2, 4):
        (made.checkpoints.begin(step) / "weights").write_text(f"weights {step}")
        made.checkpoints.commit(step, made.identity(), {}, {})
    made.checkpoints.begin(5)
    made.checkpoints.coordinator_state(5).mkdir()
    return made


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_it_goes_on_from_the_newest_and_sets_aside_what_came_after(run: RunDirectory) -> None:
    found = resume(run, config(run.path.parent), LATER)
    assert (found.step, found.damaged, found.finished) == (4, [], False)
    assert run.start_step() == 4 and run.endpoints() == LATER
    assert steps(run.metrics) == [1, 2, 3, 4]
    assert (found.aside / "metrics.jsonl").read_text() == '{"step": 5, "loss/policy": 1.6666666666666667}\n' + (
        '{"step": 6, "loss'
    )
    assert sorted(path.name for path in run.trajectories.iterdir()) == [f"step_{i:06d}.parquet" for i in range(1, 5)]
    assert {path.name for path in (found.aside / "trajectories").iterdir()} == {
        "step_000005.parquet",
        "step_000006.tmp",
    }
    assert run.events.read_text() == '{"event": "step"}\n' and (found.aside / "events.jsonl").read_text() == '{"eve'
    assert run.evaluation("before").is_file() and not run.evaluation("after").exists()
    assert (found.aside / "eval_after.parquet").read_text() == "eval_after.parquet"
    assert {path.name for path in run.checkpoints.path.iterdir()} == {"iter_0000002", "iter_0000004", TRACKER}
    again = resume(run, config(run.path.parent), LATER)  # a death right here changes nothing
    assert (again.step, again.aside) == (4, None) and run.identity() == RunDirectory(run.path).identity()


def test_a_damaged_newest_is_set_aside_and_the_one_before_taken(run: RunDirectory) -> None:
    (run.checkpoints.folder(4) / "weights").write_text("weights 5")
    found = resume(run, config(run.path.parent), LATER)
    assert found.step == 2 and "iter_0000004/weights" in str(found.damaged[0])
    assert steps(run.metrics) == [1, 2] and (run.checkpoints.path / TRACKER).read_text() == "2\n"
    assert run.checkpoints.steps() == [2]
    assert (found.aside / "checkpoints" / "iter_0000004" / "weights").read_text() == "weights 5"


def test_without_a_whole_one_nothing_is_thrown_away(run: RunDirectory) -> None:
    for step in (2, 4):
        (run.checkpoints.folder(step) / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="No checkpoint of the run is whole") as caught:
        resume(run, config(run.path.parent), LATER)
    assert "iter_0000002" in str(caught.value) and "existing=archive" in str(caught.value)
    assert run.checkpoints.steps() == [2, 4] and run.endpoints() == ENDPOINTS


def test_before_the_first_checkpoint_it_starts_anew(tmp_path: Path) -> None:
    made = RunDirectory.create(config(tmp_path), ENDPOINTS)
    made.metrics.write_text('{"step": 1}\n')
    made.evaluation("before").write_text("old")
    identity = made.identity()
    found = resume(made, config(tmp_path), LATER)
    assert found.step == made.start_step() == 0 and made.metrics.read_text() == "" and made.identity() == identity
    assert steps(found.aside / "metrics.jsonl") == [1] and not made.evaluation("before").exists()


def test_a_death_while_the_folder_was_made(tmp_path: Path) -> None:
    run = RunDirectory(config(tmp_path).run_dir)
    run.path.mkdir()
    assert resume(run, config(tmp_path), ENDPOINTS).step == 0 and run.config() == config(tmp_path)


def test_another_runs_checkpoint_is_refused(run: RunDirectory) -> None:
    (run.checkpoints.begin(5) / "weights").write_text("other")
    run.checkpoints.commit(5, "other", {}, {})
    with pytest.raises(CheckpointError, match="another run's"):
        resume(run, config(run.path.parent), LATER)


def test_a_finished_run_is_left_alone_until_it_gets_more_steps(run: RunDirectory) -> None:
    run.summary.write_text("{}")
    assert resume(run, config(run.path.parent, "steps=4"), LATER).finished
    assert run.summary.is_file() and run.endpoints() == ENDPOINTS
    found = resume(run, config(run.path.parent, "steps=8"), LATER)
    assert (found.step, found.finished) == (4, False) and (found.aside / "summary.json").is_file()
    assert "steps: 40" in (found.aside / "config.yaml").read_text() and run.config().steps == 8


def test_what_may_change_and_what_may_not(tmp_path: Path) -> None:
    old = config(tmp_path)
    harmless = ["steps=7", "existing=archive", "checkpoint.every_steps=1", "evaluation.limit=3", "coordinator.port=5"]
    harmless += ["rollout.server.urls=[http://x:1]", "teachers.math.server.port=7", "record.trajectories_every=2"]
    harmless += [
        "student.tensor_parallel=1",
        "student.data_parallel=2",
        "student.recompute=full",
        "engine.memory_fraction=0.5",
    ]
    check_unchanged(old, config(tmp_path, *harmless))
    with pytest.raises(ConfigError, match="not that of the run") as caught:
        check_unchanged(
            old,
            config(tmp_path, "optimizer.lr=1e-2", "steps=7", "seed=3", "calibration=null", "engine.deterministic=true"),
        )
    told = str(caught.value)
    assert "optimizer.lr: was 0.0003, is 0.01" in told and "seed: was 0, is 3" in told
    assert "engine.deterministic: was False, is True" in told and "steps" not in told
    assert "calibration.delta: was 0.4, is not there" in told
