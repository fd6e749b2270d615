"""One run's folder for all tests of the report: drawn rollouts, metrics that the recipe computes from them, events."""

from __future__ import annotations

import numpy as np
import pytest
from trajectories import Step, run_config, write_run

from megatron_opd.config import Config
from megatron_opd.observe.recorder import Recorder
from megatron_opd.observe.timeline import record_timeline
from megatron_opd.recipe.diagnostics import step_diagnostics
from megatron_opd.runtime.messages import TrainerInfo
from megatron_opd.runtime.rundir import RunDirectory

INFO = TrainerInfo(
    tensor_parallel=2,
    pipeline_parallel=1,
    virtual_pipeline=1,
    context_parallel=1,
    data_parallel=1,
    expert_parallel=1,
    backend="torch",
    backend_reason="Transformer Engine needs a GPU",
    dtype="float32",
    device="cpu",
)
DROP = '3 x The teacher does not answer <"http://teacher:30001">'


def tell(config: Config, steps: list[Step]) -> None:
    """Write events and metrics as a run does, up to its last step."""
    run = RunDirectory(config.run_dir)
    run.events.touch()
    (run.path / "logs").mkdir()
    recorder, rng = Recorder(run.events, run.metrics), np.random.default_rng(3)
    recorder.event("live", version=0, probe_difference=1e-6, info=INFO.model_dump())
    errors = {"math": 0.031, "code": 0.028}
    recorder.evaluated(0, "before", {"math": 0.25, "code": 0.375}, errors, (0, 0))
    recorder.evaluated(0, "teacher math", {"math": 0.94}, {"math": 0.012}, (-1, -1))
    recorder.evaluated(1, "during", {"math": 0.5}, {"math": 0.1}, (1, 2))
    for number, step in enumerate(steps, 1):
        metrics = step_diagnostics(step.calibrated, step.unscored, [item for item, _ in step.dropped])
        record_timeline(
            recorder, number, groups(rng, 90), began=1000.0, offered=1012.5, live=1020.0, train_s=6.0, refresh_s=1.0
        )
        recorder.step(number, metrics | {"loss/policy": 0.2 / number, "time/step_s": 20.0, "rollout/tokens": 1000})
    recorder.event("dropped", step=4, reasons=[DROP])


def groups(rng: np.random.Generator, count: int) -> list[tuple[float, ...]]:
    return [tuple(1000.0 + np.cumsum(rng.uniform(0.1, 2.5, 5))) for _ in range(count)]


@pytest.fixture(scope="session")
def told(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Config of a run that has written 9 steps and whose processes are gone; not to be written to."""
    config = run_config(tmp_path_factory.mktemp("viewed"), seed=7)
    tell(config, write_run(config))
    return config
