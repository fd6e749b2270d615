"""Engines that give their memory to the student while it trains, one of which dies meanwhile."""

from __future__ import annotations

import pytest
from faults import ROLLOUT, SMALL, await_log, kill, log_length, lost_and_repeated

from runs import Servers, finish

STEPS = 4


@pytest.mark.timeout(900)
def test_memory_is_lent_in_every_step_and_an_engine_that_dies_meanwhile_returns(servers: Servers, run_train) -> None:
    teachers = [f"teachers.code.server.urls=[{servers.code}]", f"teachers.math.server.urls=[{servers.math}]"]
    settings = [*SMALL, *teachers, "rollout.colocate=true", "refresh.mode=tensor", f"steps={STEPS}"]
    run = run_train("colocated", *settings)
    run.wait_for_step(1)
    await_log(run, "rollout", "POST /release_memory_occupation", log_length(run, "rollout"))
    kill(run, ROLLOUT)
    assert finish(run, 600) == 0, run.text()
    log = (run.folder / "logs" / "rollout.log").read_text()
    released, resumed = (log.count(f'POST /{name}_memory_occupation HTTP/1.1" 200') for name in ("release", "resume"))
    assert (released, resumed) == (STEPS, STEPS - 1)  # the one that died did not come back for its memory
    assert [event["name"] for event in run.events() if event["event"] == "server_died"] == ["rollout"]
    assert lost_and_repeated(run, STEPS, settings) == (0, 0)
    for row in run.metrics():
        assert row["opd/engine_trainer_difference"] <= 1e-4 and row["refresh/probe_difference"] <= 1e-4
