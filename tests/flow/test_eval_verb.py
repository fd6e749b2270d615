"""``megatron-opd eval`` and ``compare`` with real servers: the toy experts, in the domain they know."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.convert.command import to_megatron
from megatron_opd.convert.console import ConversionConsole
from megatron_opd.evaluation.model import find_model
from megatron_opd.evaluation.results import read_problems

from runs import COMMAND, GONE_LIMIT_S, ROOT, Run, Servers, assert_all_gone, finish, starting

MODELS = ROOT / "tools/toy/models"
PROBLEMS, SAMPLES = 40, 4


@pytest.fixture
def run_eval(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start ``megatron-opd eval MODEL conf/eval/toy.yaml ...`` into a folder of that name; killed after the test."""
    with starting(tmp_path) as begin:

        def evaluate(folder: str, model: Path, url: str, *changes: str) -> Run:
            asked = [f"output={tmp_path / folder}", f"server.urls=[{url}]", f"limit={PROBLEMS}", *changes]
            return begin(tmp_path / folder, "eval", str(model), "conf/eval/toy.yaml", *asked)

        yield evaluate


def compare(*arguments: object) -> subprocess.CompletedProcess:
    argv = [str(COMMAND), "compare", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def finished(run: Run) -> list[dict]:
    """The whole lines of the journal, without the header."""
    path = run.folder / "samples.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]][1:]


def test_an_evaluation_is_stopped_goes_on_and_is_compared(servers: Servers, run_eval, tmp_path: Path) -> None:
    stopped = run_eval("teacher", MODELS / "math", servers.math, "keep_texts=true", "concurrency=2")
    deadline = time.monotonic() + 120
    while len(finished(stopped)) < 6:
        assert stopped.process.poll() is None and time.monotonic() < deadline, stopped.text()
        time.sleep(0.02)
    family = list(stopped.family().values())
    stopped.process.terminate()
    assert stopped.process.wait(GONE_LIMIT_S) == 128 + 15
    assert_all_gone(family)
    kept = finished(stopped)
    assert 6 <= len(kept) < 2 * PROBLEMS and not (stopped.folder / "problems.parquet").exists()

    teacher = run_eval("teacher", MODELS / "math", servers.math, "keep_texts=true")
    assert finish(teacher) == 0, teacher.text()
    assert f"going on: {len(kept)} of {2 * PROBLEMS} problems" in teacher.text()
    assert finished(teacher)[: len(kept)] == kept
    found = read_problems(teacher.folder)
    rows = {row["id"]: row for row in finished(teacher)}
    assert len(found.problems) == len(rows) == 2 * PROBLEMS
    for problem in found.problems:
        assert (
            problem.outcomes == rows[problem.id]["outcomes"] and len(problem.texts) == len(problem.lengths) == SAMPLES
        )
    scores = json.loads((teacher.folder / "summary.json").read_text())["benchmarks"]
    math = scores["toy_math"]
    share = sum(p.correct for p in found.problems if p.benchmark == "toy_math") / (PROBLEMS * SAMPLES)
    assert math["accuracy"]["value"] == pytest.approx(share) and math["pass_at"]["1"]["value"] == pytest.approx(share)
    assert share > 0.7 > 0.3 > scores["toy_code"]["accuracy"]["value"]  # it knows mathematics and no code
    assert sorted(math["pass_at"]) == ["1", "2", "4"] and math["pass_at"]["4"]["value"] >= share

    student = run_eval("student", MODELS / "student", servers.rollout)
    assert finish(student) == 0, student.text()
    told = compare(teacher.folder, student.folder, "--json")
    assert told.returncode == 0, told.stdout
    gap = json.loads(told.stdout)["benchmarks"]["toy_math"]["difference"]
    assert gap["p_value"] < 0.001 and gap["estimate"]["high"] < 0 and gap["worse"] > gap["better"]
    assert "not done alike: keep_texts: True and False" in compare(teacher.folder, student.folder).stdout

    other = run_eval("student", MODELS / "student", servers.rollout, "benchmarks.toy_math.samples=2")
    assert finish(other) == 1 and "drawn with another benchmarks.toy_math.samples" in other.text()
    fewer = run_eval("fewer", MODELS / "student", servers.rollout, "limit=5", "existing=refuse")
    assert finish(fewer) == 0, fewer.text()
    apart = compare(student.folder, fewer.folder)
    assert (
        apart.returncode == 1 and "not of the same problems" in apart.stdout and "70 only in the first" in apart.stdout
    )
    refused = run_eval("fewer", MODELS / "student", servers.rollout, "limit=5", "existing=refuse")
    assert finish(refused) == 1 and "exists already" in refused.text()
    archived = run_eval("fewer", MODELS / "student", servers.rollout, "limit=4", "existing=archive")
    assert finish(archived) == 0 and len(list(tmp_path.glob("fewer*"))) == 2, archived.text()


def test_a_megatron_checkpoint_is_converted_and_the_copy_goes_away(tmp_path: Path) -> None:
    # In a process of its own: a conversion ends everything below its process, here the shared servers too.
    child = get_context("spawn").Process(target=convert_and_compare, args=(tmp_path,))
    child.start()
    child.join(200)
    assert child.exitcode == 0


def convert_and_compare(tmp_path: Path) -> None:
    to_megatron(MODELS / "math", tmp_path / "checkpoint", [], ConversionConsole())
    model = find_model(tmp_path / "checkpoint", None)
    assert model.checkpoint is not None and model.digest() != find_model(MODELS / "math", None).digest()
    with model.servable(tmp_path / "copy") as folder:
        ours, theirs = (load_file(place / "model.safetensors") for place in (folder, MODELS / "math"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert find_model(folder, None).folder == folder
    assert not (tmp_path / "copy").exists()
