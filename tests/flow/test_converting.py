"""The convert verbs as a user starts them: a round trip, and nothing left behind however they end."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.runtime.checkpoints import write_manifest

from runs import COMMAND, ROOT, assert_all_gone

MODEL = ROOT / "tools" / "toy" / "models" / "student"


def test_there_and_back(tmp_path: Path) -> None:
    """To two ranks by the thin tool, and back to one by the command; the export is the model."""
    tool = [sys.executable, str(ROOT / "tools" / "convert_to_megatron.py")]
    leftover = tmp_path / ".m.partial"
    leftover.mkdir()  # of a conversion that was killed
    there = subprocess.run(
        [*tool, str(MODEL), str(tmp_path / "m"), "tensor_parallel=2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert there.returncode == 0 and "2 processes on the CPU: TP 2" in there.stdout, there.stdout + there.stderr
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    manifest = json.loads((tmp_path / "m" / "release" / "manifest.json").read_text())
    assert manifest["layout"]["tensor"] == 2 and "hf/tokenizer.json" in manifest["files"]
    back = convert("to-hf", tmp_path / "m", tmp_path / "hf")
    assert back.returncode == 0, back.stdout + back.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m"]
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert same_content(tmp_path / "hf" / name, MODEL / name), name


def same_content(found: Path, expected: Path) -> bool:
    if found.suffix != ".safetensors":
        return filecmp.cmp(found, expected, shallow=False)
    ours, theirs = load_file(found), load_file(expected)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def convert(verb: str, given: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    argv = [str(COMMAND), "convert", verb, str(given), str(out), *options]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("verb", ["to-megatron", "to-hf"])
def test_bad_input_is_told_and_nothing_starts(tmp_path: Path, verb: str) -> None:
    done = convert(verb, tmp_path / "nowhere", tmp_path / "out", "tensor_paralel=2")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "error: 2 things must be put right" in done.stdout and "folder does not exist" in done.stdout
    assert "did you mean tensor_parallel?" in done.stdout and "converting" not in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    """No process and no OUT; what a kill leaves of it is hidden, and the next conversion removes it."""
    argv = [str(COMMAND), "convert", "to-megatron", str(MODEL), str(tmp_path / "m"), "tensor_parallel=2"]
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(argv, cwd=ROOT, stdout=output, stderr=output)
    deadline = time.monotonic() + 200
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 3:  # the launcher and two ranks
        assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output").read_text()
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(60) == (128 + number if number == signal.SIGTERM else -number)
    assert_all_gone(family)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"output"} if number == signal.SIGTERM else left <= {"output", ".m.partial"}


def test_a_rank_that_fails_is_told(tmp_path: Path) -> None:
    """A checkpoint that is whole, and no checkpoint: known only when Megatron reads it."""
    (tmp_path / "c").mkdir()
    write_manifest(tmp_path / "c", "test", 0, {"tensor": 1})
    done = convert("to-hf", tmp_path / "c", tmp_path / "out", f"source={MODEL}")
    assert done.returncode == 1 and "error: " in done.stdout and "Traceback (most recent call last)" not in done.stderr
    assert "cannot be read as a Megatron checkpoint" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
