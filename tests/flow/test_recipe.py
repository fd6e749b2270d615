"""The recipe in a real run: what it drops, shifts and records, and every option from the literature at once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_opd.audit.report import audit
from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.observe.trajectories import SCHEMA, read_trajectories

from runs import Servers, finish

SMALL = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=8", "data.eval=null"]


def test_balancing_and_calibration_do_what_they_record(servers: Servers, run_train) -> None:
    run = run_train("uni", *servers.attach(), *SMALL, "steps=2", "balance.refill_rounds=1")
    assert finish(run) == 0, run.text()
    rows = read_trajectories(run.folder / "trajectories")
    assert rows.schema.equals(SCHEMA)
    columns = {name: rows.column(name).to_numpy(zero_copy_only=False) for name in ("step", "group", "outcome", "state")}
    tokens = run.summary()["tokens"]
    lengths = [len(ids) for ids in rows.column("token_ids").to_pylist()]
    assert sum(lengths) == tokens["sampled"] == tokens["generated"] > tokens["scored"]
    for step, metrics in zip((1, 2), run.metrics(), strict=True):
        own = columns["step"] == step
        assert metrics["balance/kept"] == pytest.approx(np.mean(columns["state"][own] == "trained"))
        assert metrics["balance/trained_rollouts"] == np.sum(columns["state"][own] == "trained")
        assert len(set(columns["group"][own])) == 8 + metrics["balance/refilled_prompts"]
        for group in set(columns["group"][own]):
            kept = columns["outcome"][own & (columns["group"] == group) & (columns["state"] == "trained")]
            both = set(columns["outcome"][own & (columns["group"] == group)]) >= {0, 1}
            assert not both or (kept == 1).sum() == (kept == 0).sum()  # 1:1 where both are there
    for row in rows.to_pylist():
        assert row["state"] in ("trained", "balanced_out")
        assert (row["teacher_logprobs"] is None) == (row["state"] == "balanced_out")  # never scored
        if row["state"] == "trained":
            gaps = np.array(row["teacher_logprobs"]) - np.array(row["student_logprobs"])
            assert row["gaps"] == pytest.approx(gaps, abs=1e-5)
            assert row["mean_gap"] == pytest.approx(gaps[row["mask"]].mean(), abs=1e-5)
    report = audit(run.folder)
    assert report.page.stat().st_size > 20_000
    steps = json.loads(report.numbers.read_text())["by_step"]
    for step, metrics in zip(("1", "2"), run.metrics(), strict=True):
        assert steps[step]["order"]["auc"] == pytest.approx(metrics["order/auc"])
        assert steps[step]["kept_share"] == pytest.approx(metrics["balance/kept"])
    graded = read_pass_rates(run.folder / "pass_rates.parquet")
    assert graded.graded.sum() == len(rows) and graded.passes.sum() == (columns["outcome"] == 1).sum()


def test_every_option_from_the_literature_at_once(servers: Servers, run_train) -> None:
    run = run_train(
        "options",
        *(*servers.attach(), *SMALL, "steps=2"),
        *("reference.model=tools/toy/models/code", f"reference.server.urls=[{servers.code}]"),
        *("objective.teacher_scale=1.25", "objective.gap_floor=-5", "objective.sign_filter=true"),
        *("objective.group_advantage=0.1", "objective.constant_reward=0.1", "objective.domain_weights.math=0.5"),
        *("objective.forward_kl=0.5", "objective.forward_kl_entropy=0.01", "scoring.top_k=4"),
        *("balance.order=after_scoring", "balance.scope=global", "calibration.margin=hinge"),
        *("calibration.direction=balanced", "calibration.delta_unit=sigma", "data.lazy.prior=[2,2]"),
    )
    assert finish(run) == 0, run.text()
    for metrics in run.metrics():
        assert 0 < metrics["opd/topk_overlap"] <= 1 and metrics["opd/forward_kl"] > 0
        assert metrics["opd/engine_trainer_difference"] <= 1e-4
        assert metrics["calibration/trained"] < metrics["balance/kept"] < 1  # the sign filter takes its share too
    rows = read_trajectories(run.folder / "trajectories").to_pylist()
    assert {row["state"] for row in rows} == {"trained", "filtered", "balanced_out"}
    assert all(row["teacher_logprobs"] is not None for row in rows)
    assert any(row["outcome_term"] > 0 for row in rows) and any(row["outcome_term"] < 0 for row in rows)
    assert min(min(row["gaps"]) for row in rows) >= -5


def test_a_run_ends_with_the_step_that_reaches_its_tokens(servers: Servers, run_train) -> None:
    run = run_train("budget", *servers.attach(), *SMALL, "steps=50", "max_generated_tokens=1500")
    assert finish(run) == 0, run.text()
    rows = read_trajectories(run.folder / "trajectories")
    steps, lengths = (
        rows.column("step").to_numpy(),
        np.array([len(ids) for ids in rows.column("token_ids").to_pylist()]),
    )
    assert lengths[steps < steps.max()].sum() < 1500 <= lengths.sum()
    assert run.summary()["steps"] == steps.max() == run.metrics()[-1]["step"] < 50
    assert (run.folder / "student_hf" / "model.safetensors").is_file()
