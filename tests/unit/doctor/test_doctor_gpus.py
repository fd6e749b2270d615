"""The GPU checks against a program that answers as nvidia-smi does."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.doctor import gpus

ROWS = [f"{number}, NVIDIA H100 80GB HBM3, 81559, 4, 570.86.15" for number in range(4)]
HEADER = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15    CUDA Version: 12.8     |"


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts an nvidia-smi on the path that knows these rows, or fails."""

    def make(rows: list[str], code: int = 0) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        query = "\n".join(rows)
        text = f'#!/bin/sh\ncase "$1" in --query*) echo "{query}";; *) echo "{HEADER}";; esac\nexit {code}\n'
        (folder / "nvidia-smi").write_text(text)
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return make


def test_without_a_gpu(settings, only, monkeypatch) -> None:
    monkeypatch.setattr(gpus, "gpu_present", lambda: False)
    assert only(gpus.check_gpus(settings())).state == "skipped"
    assert only(gpus.check_gpus(settings("engine.device=cuda"))).state == "failed"


def test_each_role_on_gpus_of_its_own(settings, smi) -> None:
    smi(ROWS)
    own = ["rollout.server.gpus='2'", "teachers.math.server.gpus='3'", "teachers.code.server.urls=[http://a:1]"]
    kinds, where = gpus.check_gpus(settings(*own))
    assert kinds.found == "4 x NVIDIA H100 80GB HBM3, 81,559 MB each, driver 570.86.15 (CUDA up to 12.8)"
    assert where.state == "ok" and where.found == "0: student; 1: student; 2: rollout; 3: teacher-math"


def test_a_gpu_that_engines_lend_to_the_student_is_no_fault(settings, smi) -> None:
    smi(ROWS)
    lending = [
        "rollout.colocate=true",
        "refresh.mode=tensor",
        "rollout.server.gpus='0'",
        "teachers.math.server.gpus='3'",
    ]
    elsewhere, beside = "teachers.code.server.gpus='2'", "teachers.code.server.gpus='0'"
    assert list(gpus.check_gpus(settings(*lending, elsewhere)))[-1].state == "ok"
    assert list(gpus.check_gpus(settings(*lending, beside)))[-1].state == "warning"


def test_shared_missing_and_busy_gpus(settings, smi) -> None:
    smi(ROWS)
    shared = list(gpus.check_gpus(settings()))[-1]
    assert shared.state == "warning" and "0: student, rollout, teacher-math, teacher-code" in shared.found
    smi([ROWS[0].replace(" 4,", " 40000,")])
    _, busy, lacking = gpus.check_gpus(settings("rollout.server.gpus='5'"))
    assert busy.state == "warning" and "GPU 0: 40,000 MB" in busy.found
    assert lacking.state == "failed" and "student, rollout" in lacking.found


def test_a_driver_that_does_not_answer(settings, smi) -> None:
    smi(["Failed to initialize NVML: Driver/library version mismatch"], code=18)
    with pytest.raises(RuntimeError, match="nvidia-smi failed"):
        list(gpus.check_gpus(settings()))
