"""One run's folder for all tests of the audit."""

from __future__ import annotations

import pytest
from audit_case import Drawn
from trajectories import SAMPLES, run_config, write_run

from megatron_opd.audit.diagnose import diagnose
from megatron_opd.audit.read import read_rollouts, trajectory_files


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Not to be written to."""
    config = run_config(tmp_path_factory.mktemp("runs"))
    steps = write_run(config)
    files = trajectory_files(config.run_dir / "trajectories")
    rollouts = read_rollouts(files)
    return Drawn(config, steps, files, rollouts, diagnose(rollouts, SAMPLES, worst=12))
