"""A run's folder: what is written is what is read, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.rundir import Endpoints, RunDirectory

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
ENDPOINTS = Endpoints("http://a:1", "http://b:2", {"math": "http://c:3"}, None, "127.0.0.1", 4)


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
