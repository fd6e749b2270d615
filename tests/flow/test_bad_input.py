"""Bad input: one error that says what, where, got, expected and fix; exit code 1; nothing was started."""

from __future__ import annotations

import json
import os
import shutil
import socket
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

import psutil
import pytest

from megatron_opd.cli import app
from megatron_opd.data.tokenizer import load_tokenizer

from runs import ROOT, TOY

STUDENT = ROOT / "tools" / "toy" / "models" / "student"
GOOD_LINE = '{"prompt": "Compute 1 + 1.", "answer": "2", "domain": "math"}\n'


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What every fork below would import."""
    import_module("megatron_opd.train.supervisor")
    load_tokenizer(STUDENT)


def command_line(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and output of ``megatron-opd`` with these arguments, in a fork that need not import anything anew."""
    output = tmp_path / "output.txt"
    child = get_context("fork").Process(target=run_app, args=(output, arguments))
    child.start()
    child.join(120)
    return child.exitcode, output.read_text()


def run_app(output: Path, arguments: tuple[str, ...]) -> None:
    os.chdir(ROOT)
    with output.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        app(arguments)


def refused(tmp_path: Path, *overrides: str, config: Path = TOY) -> str:
    """The error of a run that must be refused before any process of it starts."""
    code, text = command_line(tmp_path, "train", str(config), "name=bad", f"output={tmp_path / 'runs'}", *overrides)
    assert code == 1, text
    assert not (tmp_path / "runs").exists() and "Traceback" not in text
    assert not [
        process for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info["cmdline"])
    ]
    return text[text.index("error: ") :]


def prompts(tmp_path: Path, text: str) -> str:
    """An override that trains on a file with ``text``."""
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    return f"data.train={path}"


def test_no_such_model_folder(tmp_path: Path) -> None:
    error = refused(tmp_path, "student.model=/nowhere/student", "teachers.code.model=/nowhere/code")
    assert error.startswith("error: 2 things must be put right")
    assert "No such model folder" in error and "student.model" in error and "/nowhere/student" in error
    assert "teachers.code.model" in error and "expected: a folder with config.json" in error and "fix: " in error


def test_a_folder_without_weights(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    error = refused(tmp_path, f"student.model={tmp_path / 'model'}")
    assert "The checkpoint has no weights" in error and "*.safetensors" in error


def test_a_teacher_whose_config_is_no_json(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "teacher")
    (tmp_path / "teacher" / "config.json").write_text("{")
    error = refused(tmp_path, f"teachers.math.model={tmp_path / 'teacher'}")
    assert "config.json is not JSON" in error and str(tmp_path / "teacher" / "config.json") in error


def test_a_teacher_with_another_tokenizer(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "teacher")
    file = tmp_path / "teacher" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(tokenizer))
    error = refused(tmp_path, f"teachers.math.model={tmp_path / 'teacher'}")
    assert "The tokenizers differ: token" in error and str(tmp_path / "teacher") in error
    assert "got: " in error and "expected: " in error and "fix: " in error


def test_an_unknown_domain(tmp_path: Path) -> None:
    error = refused(tmp_path, prompts(tmp_path, GOOD_LINE + GOOD_LINE.replace("math", "law")))
    assert "prompts.jsonl:2" in error and "law" in error and "code" in error and "math" in error


def test_an_empty_prompt_file(tmp_path: Path) -> None:
    assert "The prompt file is empty" in refused(tmp_path, prompts(tmp_path, ""))


def test_a_missing_prompt_file(tmp_path: Path) -> None:
    assert "/nowhere.jsonl" in refused(tmp_path, "data.train=/nowhere.jsonl")


def test_malformed_lines_are_all_named(tmp_path: Path) -> None:
    error = refused(tmp_path, prompts(tmp_path, GOOD_LINE + "{'prompt'\n" + GOOD_LINE + '{"prompt": 3}\n'))
    assert "prompts.jsonl:2" in error and "prompts.jsonl:4" in error and "prompts.jsonl:1" not in error


def test_a_prompt_over_the_limit(tmp_path: Path) -> None:
    text = GOOD_LINE + GOOD_LINE.replace("Compute", "Compute " + "now " * 2000)
    error = refused(tmp_path, prompts(tmp_path, text))
    assert "prompts.jsonl:2" in error and "1024" in error


@pytest.mark.parametrize("override", ["optimizer.lrr=1", "steps=-1", "steps", "student.tensor_parallel=two"])
def test_an_unknown_key_or_a_wrong_override(tmp_path: Path, override: str) -> None:
    error = refused(tmp_path, override)
    assert override.split("=")[0] in error


def test_no_such_config(tmp_path: Path) -> None:
    assert "No such config file" in refused(tmp_path, config=tmp_path / "none.yaml")


def test_sizes_that_do_not_fit_name_both_numbers(tmp_path: Path) -> None:
    error = refused(tmp_path, "student.tensor_parallel=3")
    assert "3" in error and "4" in error and "student.tensor_parallel" in error


def test_prompt_and_response_longer_than_the_context(tmp_path: Path) -> None:
    error = refused(tmp_path, "rollout.max_new_tokens=4000")
    assert "5024" in error and "4096" in error


def test_no_engine_environment(tmp_path: Path) -> None:
    error = refused(tmp_path, "engine.python=/nowhere/python")
    assert "/nowhere/python" in error and "engine.python" in error and "make install" in error


@pytest.mark.parametrize("key", ["coordinator.port", "rollout.server.port", "teachers.math.server.port"])
def test_a_port_in_use(tmp_path: Path, key: str) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        error = refused(tmp_path, f"{key}={port}")
    assert key in error and str(port) in error and "Address already in use" in error


def test_a_run_folder_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "bad").mkdir()
    code, text = command_line(tmp_path, "train", str(TOY), "name=bad", f"output={tmp_path}", "existing=refuse")
    assert code == 1 and "The run's folder exists already" in text
    assert str(tmp_path / "bad") in text and "existing=archive" in text
    assert list((tmp_path / "bad").iterdir()) == []


def test_a_server_that_dies_while_starting_shows_its_last_lines(tmp_path: Path, run_train) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(STUDENT, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    run = run_train("dies", f"teachers.math.model={broken}")
    assert run.process.wait(120) == 1
    text = run.text()
    assert "teacher-math" in text and "teacher-math.log" in text and "safetensors" in text.lower()
