"""Runs with images: real servers that see, and a Megatron student that sees the same."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from real_servers import running
from safetensors.torch import load_file

from megatron_opd.config import load_config
from megatron_opd.runtime.vision import image_file
from megatron_opd.train.roles import assign_endpoints, server_roles

from runs import COMMAND, ROOT, Run, finish

CROSS = ROOT / "conf" / "toy_cross_modal.yaml"
WORLD = ROOT / "tools" / "toy_multimodal"
SMALL = ["rollout.prompts_per_step=8", "rollout.samples_per_prompt=4"]
TOLERANCE = 1e-4
Begin = Callable[..., Run]


@dataclass(frozen=True)
class Urls:
    """The shared servers of conf/toy_cross_modal.yaml."""

    rollout: str
    dice: str
    code: str


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    os.chdir(ROOT)
    config = load_config(CROSS, [])
    endpoints = assign_endpoints(config)
    with running(server_roles(config, endpoints), tmp_path_factory.mktemp("servers")):
        yield Urls(endpoints.rollout[0], endpoints.teachers["dice"][0], endpoints.teachers["code"][0])


@pytest.fixture
def begin(tmp_path: Path, urls: Urls) -> Iterator[Begin]:
    """Start ``megatron-opd train conf/toy_cross_modal.yaml name=NAME OVERRIDES`` on the shared rollout engine."""
    runs: list[Run] = []

    def start(name: str, *overrides: str) -> Run:
        output = tmp_path / f"{name}.out"
        argv = [str(COMMAND), "train", str(CROSS), f"rollout.server.urls=[{urls.rollout}]", *SMALL, *overrides]
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*argv, f"name={name}", f"output={tmp_path}"],
                cwd=ROOT,
                stdout=file,
                stderr=file,
                stdin=subprocess.DEVNULL,
            )
        runs.append(Run(process, tmp_path / name, output))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()


def teachers(urls: Urls) -> list[str]:
    return [f"teachers.{name}.server.urls=[{getattr(urls, name)}]" for name in ("dice", "code")]


def test_a_seeing_and_a_text_teacher_teach_one_student(urls: Urls, begin: Begin) -> None:
    run = begin("cross", *teachers(urls), "steps=3", "evaluation.limit=100", "evaluation.teachers=true")
    assert finish(run) == 0, run.text()
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    for row in run.metrics():
        assert row["refresh/probe_difference"] <= TOLERANCE and row["opd/engine_trainer_difference"] <= TOLERANCE
        assert row["loss/grad_norm"] > 1e-3
    accuracy = run.summary()["eval"]
    assert min(accuracy["teacher"].values()) >= 0.85
    assert all(0.05 <= value <= 0.45 for value in accuracy["before"].values())

    rows = [
        row
        for path in sorted((run.folder / "trajectories").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    trained = {row["domain"]: bool(row["images"]) for row in rows}
    assert trained == {"dice": True, "code": False}
    files = [image_file(run.folder.parent / ".images", name) for row in rows for name in row["images"]]
    assert files and all(file.is_file() for file in files)

    before, after = (
        load_file(folder / "model.safetensors") for folder in (WORLD / "models/student", run.folder / "student_hf")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name].to(before[name].dtype)).any()}
    assert not any("visual" in name for name in changed)  # frozen
    assert any("layers.0." in name for name in changed) and any("layers.3." in name for name in changed)


def test_a_seeing_student_that_equals_its_teacher_has_nothing_to_learn(urls: Urls, begin: Begin) -> None:
    # The teacher learns from itself: the rollout engine gets its weights with the first refresh.
    model = "tools/toy_multimodal/models/teacher"
    data = [f"data.{split}=tools/toy_multimodal/data/dice_{split}.jsonl" for split in ("train", "eval")]
    settings = [f"student.model={model}", "teachers.code=null", f"teachers.dice.server.urls=[{urls.dice}]"]
    run = begin("nothing", "conf/recipe/opd.yaml", *settings, *data, "steps=1", "evaluation.limit=8")
    assert finish(run) == 0, run.text()
    (row,) = run.metrics()
    assert row["opd/abs_gap"] <= 1e-3 and row["opd/abs_advantage"] <= 1e-3
    assert row["loss/grad_norm"] <= 1e-3 and abs(row["loss/policy"]) <= 1e-3
