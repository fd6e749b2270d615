"""Checks of a run with a multimodal student, once where all is well and once for each way to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from vision_models import make_vision_model

from megatron_opd.config import Config
from megatron_opd.doctor import models
from megatron_opd.doctor.models import check_images, check_sizes
from megatron_opd.errors import ModelError


@pytest.fixture
def seeing(settings: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """The toy run with a multimodal student, and with a teacher of mathematics that is the same model."""
    model = make_vision_model(tmp_path / "model")
    own = [f"student.model={model}", f"teachers.math.model={model}", "student.tensor_parallel=2"]
    small = ["data.max_prompt_tokens=512", "rollout.max_new_tokens=256"]
    return lambda *changes: settings(*own, *small, *changes)


def test_sizes_of_text_and_tower_are_looked_at(seeing, only) -> None:
    assert only(check_sizes(seeing())).state == "ok"
    uneven = only(check_sizes(seeing("student.tensor_parallel=4")))
    assert uneven.state == "failed" and "2 key-value heads over 4" in uneven.found
    many = only(check_sizes(seeing("student.pipeline_parallel=4")))
    assert many.state == "failed" and "vision tower" in many.found
    long = list(check_sizes(seeing("rollout.max_new_tokens=1600")))
    assert any("student.model" in one.found and "= 2112" in one.found and "2048" in one.needed for one in long)
    top = list(check_sizes(seeing("scoring.top_k=517")))
    assert any("student.model" in one.found and "516" in one.needed for one in top)


def test_a_weight_of_the_tower_that_is_missing_is_found(seeing, only) -> None:
    config = seeing()
    path = config.student.model / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.visual.pos_embed.weight"]
    save_file(tensors, path)
    found = only(check_sizes(config))
    assert found.state == "failed" and "model.visual.pos_embed.weight" in found.found


def test_what_reads_images_is_told_and_who_does_not(seeing, settings, only) -> None:
    good = only(check_images(seeing()))
    assert good.state == "ok" and "32 pixels a token, 4 to 64 tokens" in good.found
    assert "teachers.code.model" in good.found and "teachers.math.model" not in good.found
    other = only(check_images(seeing("data.images.min_pixels=1024", "data.images.max_pixels=9300")))
    assert "1 to 9 tokens" in other.found
    assert only(check_images(settings())).state == "skipped"


def test_a_folder_without_the_image_processor(seeing) -> None:
    config = seeing()
    path = config.student.model / "preprocessor_config.json"
    processor = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in processor.items() if name != "image_mean"}))
    with pytest.raises(ModelError, match="do not say how it reads images"):
        list(check_images(config))
    path.unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        list(check_images(config))


def test_a_pillow_that_does_not_keep_pixels(seeing, only, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_copied", lambda pixels: pixels[::-1])
    assert only(check_images(seeing())).state == "failed"
