"""A scheduler's signal before the end: the step under way is saved, and the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Callable

from runs import Run, Servers, finish

QUICK = ["data.eval=null", "student.tensor_parallel=1", "rollout.prompts_per_step=8", "checkpoint.every_steps=100"]


def test_a_signal_saves_the_step_under_way_and_the_run_goes_on_from_it(
    run_train: Callable[..., Run], servers: Servers
) -> None:
    run = run_train("paused", "steps=1000", *QUICK, *servers.attach())
    run.wait_for_step(2)
    run.process.send_signal(signal.SIGUSR1)
    assert finish(run) == 0, run.text()
    stopped = run.steps()[-1]
    assert run.events()[-1]["event"] in ("paused", "checkpoint")  # nothing was exported or evaluated
    assert not (run.folder / "student_hf").exists() and not (run.folder / "summary.json").exists()
    assert (run.folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == f"{stopped}\n"
    again = run_train("paused", f"steps={stopped + 2}", "existing=resume", *QUICK, *servers.attach())
    assert finish(again) == 0, again.text()
    assert f"going on after step {stopped}" in again.text()
    assert again.steps() == list(range(1, stopped + 3))
