"""The main job with real servers and a real Megatron student: results, invariants, own data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_opd.observe.metrics import METRICS, split_name
from megatron_opd.view.report import view

from runs import ROOT, Servers, finish

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
SMALL = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "evaluation.limit=24"]


def test_a_short_run_leaves_a_summary_metrics_and_a_model(servers: Servers, run_train) -> None:
    run = run_train("short", *servers.attach(), *SMALL, "steps=3", "evaluation.limit=100")
    assert finish(run) == 0, run.text()
    summary, metrics = run.summary(), run.metrics()
    assert set(summary) >= {"eval", "steps", "wall_s", "tokens", "engine", "student", "refresh"}
    for when in ("before", "after", "teacher"):
        assert set(summary["eval"][when]) == {"math", "code"}
        assert summary["eval"]["n"][when] == {"math": 100, "code": 100}
        for domain, value in summary["eval"][when].items():
            error = summary["eval"]["standard_error"][when][domain]
            assert error == pytest.approx((value * (1 - value) / 100) ** 0.5)
    assert min(summary["eval"]["teacher"].values()) >= 0.85
    assert all(0.1 <= value <= 0.4 for value in summary["eval"]["before"].values())
    assert (summary["engine"]["name"], summary["engine"]["version"]) == ("sglang", "0.5.21")
    assert (summary["student"]["tensor_parallel"], summary["student"]["backend"]) == (2, "torch")
    assert summary["refresh"]["mode"] == "broadcast" and summary["refresh"]["seconds_per_step"] > 0
    tokens = summary["tokens"]
    assert tokens["generated"] > tokens["scored"] >= tokens["trained"] > 0
    assert [row["step"] for row in metrics] == [1, 2, 3]
    for row in metrics:  # engine and trainer are the same policy, before and after each refresh
        assert row["refresh/probe_difference"] <= 1e-4
        assert row["opd/engine_trainer_difference"] <= 1e-4
        assert row["loss/grad_norm"] > 1e-3 and row["opd/clipped"] == 0
    model = AutoModelForCausalLM.from_pretrained(run.folder / "student_hf")
    before = AutoModelForCausalLM.from_pretrained(ROOT / "tools/toy/models/student")
    changed = [name for name, weight in model.named_parameters() if (weight != before.get_parameter(name)).any()]
    assert len(changed) == len(list(before.parameters()))
    assert AutoTokenizer.from_pretrained(run.folder / "student_hf").chat_template
    assert "accuracy on held-out prompts" in run.text() and "step 3/3" in run.text()
    assert {split_name(name)[0] for row in metrics for name in row} - {"step/"} <= set(METRICS)
    timelines = [event for event in run.events() if event["event"] == "timeline"]
    assert [(event["step"], len(event["groups"])) for event in timelines] == [(1, 8), (2, 8), (3, 8)]
    for event in timelines:
        ready = max(group[-1] for group in event["groups"])
        assert 0 < ready <= event["offered"] <= event["trained"][1] <= event["live"]
    assert view(run.folder)[0].startswith("Finished: 3 of 3 steps")
    assert "Step 3, the newest" in (run.folder / "view.html").read_text()


def test_a_student_that_equals_its_teacher_has_nothing_to_learn(servers: Servers, run_train) -> None:
    # The math teacher learns from itself: the rollout engine gets its weights with the first refresh.
    # Plain distillation: a margin above 0 is an outcome reward, which a student that equals its teacher still gets.
    model = "tools/toy/models/math"
    settings = (f"model={model}", f"server.urls=[{servers.math}]")
    teachers = [f"teachers.{domain}.{setting}" for domain in ("math", "code") for setting in settings]
    engine = [f"student.model={model}", f"rollout.server.urls=[{servers.rollout}]"]
    plain = "conf/recipe/opd.yaml"
    run = run_train("nothing", plain, *engine, *teachers, *SMALL, "steps=1", "evaluation.teachers=false")
    assert finish(run) == 0, run.text()
    (row,) = run.metrics()
    assert row["opd/abs_gap"] <= 1e-3 and row["opd/abs_advantage"] <= 1e-3
    assert row["loss/grad_norm"] <= 1e-3 and abs(row["loss/policy"]) <= 1e-3


@pytest.mark.parametrize(
    "layout",
    [
        ["student.tensor_parallel=1", "student.data_parallel=2"],
        ["student.tensor_parallel=2", "student.sequence_parallel=true"],
    ],
    ids=["data parallel", "sequence parallel"],
)
def test_other_layouts_and_many_rows(servers: Servers, run_train, layout: list[str]) -> None:
    settings = ["steps=2", "student.row_tokens=200", "loss.normalize=token", "data.eval=null"]
    run = run_train("layout", *servers.attach(), *SMALL, *layout, *settings)
    assert finish(run) == 0, run.text()
    for row in run.metrics():
        assert row["refresh/probe_difference"] <= 1e-4 and row["opd/engine_trainer_difference"] <= 1e-4


def test_a_refresh_that_cannot_be_proven_stops_the_run(servers: Servers, run_train) -> None:
    run = run_train("unproven", *servers.attach(), *SMALL, "steps=1", "refresh.probe_tolerance=1e-12")
    assert finish(run) == 1
    assert "After a weight refresh the rollout engine's log-probs are not the trainer's" in run.text()
    assert "expected: at most 1e-12" in run.text() and not (run.folder / "summary.json").exists()


@pytest.mark.skipif(not GSM8K.is_file(), reason="the GSM8K test file is not beside the checkout")
def test_own_data_with_a_column_map(servers: Servers, run_train) -> None:
    columns = ["data.columns.prompt=question", "data.columns.domain=null"]
    run = run_train(
        "gsm8k",
        *(*servers.attach(), *SMALL, "steps=2", f"data.train={GSM8K}", *columns, "data.default_domain=math"),
        *("data.eval=null", "rollout.max_new_tokens=64"),
    )
    assert finish(run) == 0, run.text()
    assert [row["step"] for row in run.metrics()] == [1, 2]
    assert run.summary()["tokens"]["trained"] > 0


def test_own_data_in_parquet_with_chat_messages(servers: Servers, run_train, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in (ROOT / "tools/toy/data/train.jsonl").read_text().splitlines()[:40]]
    table = {
        "messages": [[{"role": "user", "content": row["prompt"]}] for row in rows],
        "label": [row["answer"] for row in rows],
        "field": [row["domain"] for row in rows],
    }
    pq.write_table(pa.table(table), tmp_path / "own.parquet")
    columns = ["data.columns.prompt=messages", "data.columns.answer=label", "data.columns.domain=field"]
    run = run_train(
        "parquet",
        *(*servers.attach(), *SMALL, "steps=1", f"data.train={tmp_path / 'own.parquet'}", *columns),
        "data.eval=null",
    )
    assert finish(run) == 0, run.text()
    assert run.metrics()[0]["rollout/length"] > 0
