"""Weights of a multimodal student reach the real SGLang, with the tower and without it, and are proven on an image."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import running
from safetensors.torch import load_file
from vision_models import FAMILIES, make_vision_model

from megatron_opd.config import load_config
from megatron_opd.runtime.ports import free_port
from megatron_opd.train.roles import replica_roles

from runs import ROOT, TOY

TOLERANCE = 1e-4  # float32


@pytest.fixture(scope="module", params=FAMILIES)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What refreshes to two engines gave, of which the second remembers what its tower made of an image."""
    os.chdir(ROOT)
    work = tmp_path_factory.mktemp(request.param)
    (work / "images").mkdir()
    model = make_vision_model(work / "model", request.param, tied=request.param == "qwen3_vl")
    config = load_config(TOY, [f"student.model={model}"])
    urls = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    forgets, remembers = (
        replica_roles(config.engine, 0, 0, "rollout", config.rollout.server, model, [url])[0] for url in urls
    )
    remembers = replace(
        remembers, name="remembers", environment=remembers.environment | {"SGLANG_VLM_CACHE_SIZE_MB": "100"}
    )
    with running([forgets, remembers], work):
        worker, log = str(Path(__file__).with_name("vision_refresh_worker.py")), work / "worker.log"
        with log.open("w") as output:
            done = subprocess.run(
                [sys.executable, "-W", "ignore", worker, str(work), str(model), *urls],
                check=False,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
                stdout=output,
                stderr=output,
                timeout=300,
            )
        assert done.returncode == 0, log.read_text()[-6000:]
    weights = load_file(model / "model.safetensors")
    tower = sum(tensor.nbytes for name, tensor in weights.items() if "visual." in name)
    sizes = {"tower": tower, "all": sum(tensor.nbytes for tensor in weights.values())}
    yield json.loads((work / "found.json").read_text()) | {"urls": urls, "sizes": sizes}


def test_a_frozen_tower_is_not_sent_and_images_are_seen_as_before(found: dict) -> None:
    frozen, sizes = found["frozen"], found["sizes"]
    assert frozen["bytes"] == sizes["all"] - sizes["tower"] and sizes["tower"] > 100_000
    assert frozen["probe"] <= TOLERANCE and max(frozen["sample"]) <= TOLERANCE


@pytest.mark.parametrize("mode", ["broadcast", "disk", "tensor"])
def test_a_tower_that_learns_is_sent_by_every_way(found: dict, mode: str) -> None:
    assert found[mode]["bytes"] == found["sizes"]["all"]
    assert found[mode]["probe"] <= TOLERANCE and max(found[mode]["sample"]) <= TOLERANCE


def test_one_wrong_bit_in_the_engines_tower_is_noticed(found: dict) -> None:
    assert "log-probs are not the trainer's" in found["other_tower"]


def test_an_engine_that_goes_on_with_features_of_the_old_tower_is_out(found: dict) -> None:
    """As SGLang does unless it is started otherwise; the probe's image is the same at every refresh."""
    first, second = found["both"]
    assert first["live"] == found["urls"] and max(first["sample"]) <= TOLERANCE
    assert second["live"] == found["urls"][:1] and max(second["sample"]) <= TOLERANCE
    assert "log-probs are not the trainer's" in second["out"][found["urls"][1]]
