"""Processes die, and the run ends complete: every prompt of the epoch is trained exactly once."""

from __future__ import annotations

import signal

import pytest
from faults import (
    COORDINATOR,
    MATH,
    ROLLOUT,
    SMALL,
    await_doing,
    await_log,
    kill,
    log_length,
    lost_and_repeated,
    proxied,
    wrong_numbers,
)
from faulty_server import FAULTS

from runs import Servers, finish

STEPS = 5


@pytest.mark.timeout(1200)  # five starts of a server: most of a minute each on busy cores
def test_everything_dies_once_and_nothing_is_lost(servers: Servers, run_train) -> None:
    settings = [*SMALL, f"steps={STEPS}", f"teachers.code.server.urls=[{servers.code}]"]
    run = run_train("mortal", *settings)
    await_doing(run, "step 1: rollouts")
    await_log(run, "teacher-math", "POST /generate", log_length(run, "teacher-math"))
    kill(run, MATH)  # its replica, during scoring
    await_doing(run, "step 2: rollouts")
    kill(run, ROLLOUT)  # the only one, during generation
    await_doing(run, "step 3: training")
    await_log(run, "rollout", "/begin_weight_update", log_length(run, "rollout"))
    kill(run, ROLLOUT)  # during a refresh
    await_doing(run, "step 5: rollouts")
    kill(run, COORDINATOR)
    assert finish(run, 600) == 0, run.text()
    events = run.events()
    died = [event["name"] for event in events if event["event"] == "server_died"]
    assert died == ["teacher-math", "rollout", "rollout"]
    assert [event["name"] for event in events if event["event"] == "server_returned"] == died
    again = [event["version"] for event in events if event["event"] == "weights_sent_again"]
    assert 1 in again  # those of step 2, while it was sampled
    assert [event["step"] for event in events if event["event"] == "resumed"] in ([3], [4])
    assert not [event for event in events if event["event"] == "dropped"]
    assert "signal SIGKILL" in run.text() and "starting rollout again in 1 s, 1 of 3" in run.text()
    assert lost_and_repeated(run, STEPS, settings) == (0, 0)
    for row in run.metrics():  # no token of an engine's first weights
        assert row["opd/engine_trainer_difference"] <= 1e-4 and row["refresh/probe_difference"] <= 1e-4


@pytest.mark.timeout(900)
def test_a_teacher_that_hangs_is_killed_and_comes_back(servers: Servers, run_train) -> None:
    attached = [f"rollout.server.urls=[{servers.rollout}]", f"teachers.code.server.urls=[{servers.code}]"]
    settings = [*SMALL, *attached, "engine.hang_s=10", "engine.request_timeout_s=3600", "steps=3"]
    run = run_train("hung-up", *settings)
    await_doing(run, "step 2: rollouts")
    await_log(run, "teacher-math", "POST /generate", log_length(run, "teacher-math"))
    kill(run, MATH, signal.SIGSTOP)  # during scoring; without an end to its requests the run would wait for an hour
    assert finish(run, 600) == 0, run.text()
    told = [event["event"] for event in run.events() if event["event"].startswith("server_")]
    assert told == ["server_hangs", "server_died", "server_returned"]
    assert "teacher-math has answered nothing for" in run.text()
    assert not [event for event in run.events() if event["event"] == "dropped"]
    assert lost_and_repeated(run, 3, settings) == (0, 0)
    assert wrong_numbers(run, "math", servers.math, settings) == 0


def test_no_wrong_number_of_a_teacher_reaches_the_loss(servers: Servers, run_train) -> None:
    with proxied(servers.math, servers.code) as (faulty, url):
        attached = [f"rollout.server.urls=[{servers.rollout}]", f"teachers.code.server.urls=[{servers.code}]"]
        patience = ["engine.request_timeout_s=4", "scoring.max_dropped_share=1", "engine.routing.failures=2"]
        settings = [*SMALL, *attached, *patience, f"teachers.math.server.urls=[{url}]", "steps=4"]
        run = run_train("lied-to", *settings)
        await_doing(run, "step 1: rollouts")
        faulty.plan[:] = [*FAULTS, "swapped"]  # every second reply; a swap takes two
        await_doing(run, "step 4: rollouts")
        left = list(faulty.plan)
        faulty.plan.clear()
        faulty.spoil_next("error_503", 6)  # for a while; probes get it too
        assert finish(run, 600) == 0, run.text()
        assert not left and faulty.spoilt == faulty.times
        found = "\n".join(line for event in run.events() if event["event"] == "dropped" for line in event["reasons"])
        for kind in {fault.kind for fault in FAULTS.values() if not fault.transient}:
            assert f" x {kind}, such as" in found, found
        assert lost_and_repeated(run, 4, settings) == (0, 0)
        assert wrong_numbers(run, "math", servers.math, settings) == 0
