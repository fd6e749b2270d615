"""A run's folder: what is written is what is read, and nothing is overwritten."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.rundir import Endpoints, RunDirectory

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
ENDPOINTS = Endpoints("http://a:1", ["http://b:2"], {"math": ["http://c:3"]}, [], "127.0.0.1", 4)


def config(output: Path, existing: str) -> Config:
    return load_config(TOY, [f"output={output}", f"existing={existing}", "optimizer.lr=3e-7", "seed=5"])


def test_config_and_endpoints_survive_the_folder(tmp_path: Path) -> None:
    settings = config(tmp_path, "refuse")
    run = RunDirectory.create(settings, ENDPOINTS)
    again = RunDirectory(run.path)
    assert again.config() == settings and again.endpoints() == ENDPOINTS
    assert again.logs.is_dir() and again.events.read_text() == ""


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    RunDirectory.create(config(tmp_path, "refuse"), ENDPOINTS)
    with pytest.raises(ConfigError, match="exists already") as caught:
        RunDirectory.create(config(tmp_path, "refuse"), ENDPOINTS)
    assert str(tmp_path / "toy") in str(caught.value)


def test_or_moved_aside_as_often_as_needed(tmp_path: Path) -> None:
    for number in range(3):
        run = RunDirectory.create(config(tmp_path, "archive"), ENDPOINTS)
        (run.path / "mark").write_text(str(number))
    marks = sorted(path.read_text() for path in tmp_path.glob("*/mark"))
    assert marks == ["0", "1", "2"] and (tmp_path / "toy" / "mark").read_text() == "2"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = RunDirectory.create(config(tmp_path, "refuse"), ENDPOINTS)
    code = (
        "import sys, time; from pathlib import Path; from megatron_opd.runtime.rundir import RunDirectory\n"
        f"with RunDirectory(Path({str(run.path)!r})).present(): print('here', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "here\n"
        with pytest.raises(ConfigError, match="A process still works in the run's folder"), run.occupied():
            pass
    finally:
        child.kill()
        child.wait()
    with run.occupied(wait_s=5), run.present():  # a killed process leaves nothing behind
        pass
