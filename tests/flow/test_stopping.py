"""However a run ends, at most 20 s later none of its processes lives."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from runs import GONE_LIMIT_S, Servers, assert_all_gone

SMALL = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "data.eval=null", "steps=1000"]


def family_of(run, least: int) -> list[psutil.Process]:
    """The run's processes, once there are at least so many."""
    deadline = time.monotonic() + 60
    while len(family := list(run.family().values())) < least:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.1)
    return family


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_everything_starts(run_train, number: signal.Signals) -> None:
    run = run_train("early", *SMALL)  # starts three servers of its own
    family = family_of(run, 8)
    run.process.send_signal(number)
    assert_all_gone(family)
    assert run.process.wait(GONE_LIMIT_S) == 128 + number
    assert f"error: {number.name}" in run.text()


def test_a_signal_during_training(servers: Servers, run_train) -> None:
    run = run_train("signal", *servers.attach(), *SMALL)
    run.wait_for("step")
    family = family_of(run, 4)
    run.process.terminate()
    assert_all_gone(family)
    assert run.process.wait(GONE_LIMIT_S) == 128 + signal.SIGTERM


def test_the_supervisor_itself_is_killed(servers: Servers, run_train) -> None:
    attached = [f"teachers.math.server.urls=[{servers.math}]", f"rollout.server.urls=[{servers.rollout}]"]
    run = run_train("orphans", *attached, *SMALL)  # teacher-code is its own, with children of its own
    run.wait_for("step")
    family = family_of(run, 7)
    run.process.kill()
    assert_all_gone(family)


@pytest.mark.parametrize("victim", ["megatron_opd.coordinator", "megatron_opd.student.worker"])
def test_a_process_of_the_run_is_killed(servers: Servers, run_train, victim: str) -> None:
    run = run_train("victim", *servers.attach(), *SMALL, "checkpoint.restarts=0")
    run.wait_for("step")
    family = family_of(run, 4)
    pid = next(process.pid for name, process in run.family().items() if victim in name)
    os.kill(pid, signal.SIGKILL)
    assert_all_gone(family)
    assert run.process.wait(GONE_LIMIT_S) == 1
    assert "error: " in run.text()


def test_a_server_of_the_run_is_killed_while_it_starts(servers: Servers, run_train) -> None:
    attached = [f"teachers.math.server.urls=[{servers.math}]", f"rollout.server.urls=[{servers.rollout}]"]
    run = run_train("server", *attached, *SMALL)
    family = family_of(run, 5)
    pid = next(process.pid for name, process in run.family().items() if "toy/models/code" in name)
    os.kill(pid, signal.SIGKILL)
    assert_all_gone(family)
    assert run.process.wait(GONE_LIMIT_S) == 1
    assert "teacher-code died" in run.text() and "SIGKILL" in run.text()
