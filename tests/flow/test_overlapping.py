"""Rollouts, scoring and training at once, with real servers; weights change amid responses, kill -9 loses nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_opd.config import load_config
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.data.stream import PromptStream
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.observe.trajectories import read_trajectories

from runs import TOY, Servers, finish

GROUPS, SAMPLES, STEPS = 8, 4, 5
SETTINGS = [
    *("existing=resume", f"steps={STEPS}", "checkpoint.every_steps=1"),
    *("evaluation.before=false", "evaluation.every_steps=4", "evaluation.limit=4"),
    *(f"rollout.prompts_per_step={GROUPS}", f"rollout.samples_per_prompt={SAMPLES}"),
    *("rollout.max_staleness=1", "refresh.pause=retract"),
]


def test_a_run_ahead_stays_in_its_bound_and_trains_every_prompt_once(servers: Servers, run_train) -> None:
    settings = [*servers.attach(), *SETTINGS]
    first = run_train("ahead", *settings)
    first.wait_for_step(2)
    first.kill_everything()
    run = run_train("ahead", *settings)
    assert finish(run) == 0, run.text()
    assert "going on after step" in run.text() and run.steps() == list(range(1, STEPS + 1))
    rows = run.metrics()
    assert rows[0]["rollout/staleness_max"] == 0 and rows[0]["opd/stale_tokens"] == 0
    assert max(row["rollout/staleness_max"] for row in rows) == 1
    for row in rows:
        assert row["rollout/stale_dropped"] == 0 and row["refresh/probe_difference"] <= 1e-4
        if row["opd/stale_tokens"] > 0:
            assert 0.8 < row["opd/importance_weight"] < 1.2 and row["opd/importance_truncated"] < 0.05
    (evaluated,) = [event for event in run.events() if event["event"] == "evaluated" and event["when"] == "during"]
    assert evaluated["step"] == 4 and set(evaluated["accuracy"]) == {"code", "math"}
    assert 4 <= evaluated["weights"][0] <= evaluated["weights"][1] <= 5  # training went on meanwhile
    assert len(read_pass_rates(run.folder / "eval_step_000004.parquet").ids) == 8
    table = read_trajectories(run.folder / "trajectories")
    assert np.unique(table.column("group").to_numpy(), return_counts=True)[1].tolist() == [SAMPLES] * GROUPS * STEPS
    config = load_config(TOY, SETTINGS)
    prompts, _ = read_inputs(config, load_tokenizer(config.student.model))
    drawn = PromptStream(prompts, config.seed).take(GROUPS * STEPS)
    assert Counter(table.column("prompt_id").to_pylist()) == Counter({prompt.id: SAMPLES for prompt in drawn})
