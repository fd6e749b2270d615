"""Configs of the toy run with changes, and what a check finds in them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.doctor.finding import Finding

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Config]:
    monkeypatch.chdir(ROOT)  # where the toy models are
    for name in ("SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    return lambda *changes: load_config(Path("conf/toy.yaml"), [f"output={tmp_path / 'runs'}", *changes])


@pytest.fixture
def only() -> Callable[[Iterable[Finding]], Finding]:
    def one(findings: Iterable[Finding]) -> Finding:
        found = list(findings)
        assert len(found) == 1, found
        return found[0]

    return one
