"""Models that would see other pixels or other tokens than the student are refused before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from vision_models import make_vision_model

from megatron_opd.config import Config, load_config
from megatron_opd.train.preflight import fit_mistakes, frozen_models
from megatron_opd.train.vision_checks import vision_mistakes

from runs import TOY

SMALLEST, LARGEST = 4 * 32 * 32, 64 * 32 * 32


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("student"))


@pytest.fixture
def teacher(student: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the student's settings, changed."""

    def make(**changes: object) -> Path:
        config = json.loads((student / "config.json").read_text())
        processor = json.loads((student / "preprocessor_config.json").read_text())
        for name, value in changes.items():
            part = next(part for part in (processor, config["vision_config"], config) if name in part)
            part[name] = value
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
        return tmp_path

    return make


def config_of(student: Path, teacher: Path, *overrides: str) -> Config:
    models = [f"student.model={student}", f"teachers.math.model={teacher}", f"teachers.code.model={student}"]
    return load_config(TOY, [*models, "data.columns.images=images", *overrides])


def mistakes(config: Config) -> list[str]:
    return [str(mistake) for mistake in vision_mistakes(config, frozen_models(config))]


def test_a_teacher_that_reads_images_as_the_student_does(student: Path, teacher) -> None:
    assert mistakes(config_of(student, teacher())) == []
    wider = {"size": {"shortest_edge": SMALLEST // 4, "longest_edge": LARGEST * 4}}
    assert mistakes(config_of(student, teacher(**wider))) == []


DIFFERENT = {
    "patch_size": (14, "patch size"),
    "spatial_merge_size": (1, "merge size"),
    "temporal_patch_size": (1, "temporal patch size"),
    "image_mean": ([0.4, 0.5, 0.5], "image mean"),
    "image_std": ([0.4, 0.5, 0.5], "standard deviation"),
    "image_token_id": (515, "placeholder"),
    "vision_start_token_id": (515, "before an image"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_every_setting_that_must_be_the_same(student: Path, teacher, name: str) -> None:
    value, words = DIFFERENT[name]
    folder = teacher()  # where a name is in both files, the model's own counts
    path = folder / ("preprocessor_config.json" if name.startswith("image_") and "token" not in name else "config.json")
    settings = json.loads(path.read_text())
    (settings["vision_config"] if name in settings.get("vision_config", {}) else settings)[name] = value
    path.write_text(json.dumps(settings))
    found = mistakes(config_of(student, folder))
    assert any(words in mistake and "teachers.math" in mistake for mistake in found)
    assert mistakes(config_of(student, folder, "teachers.math.images=leave_out")) == []


def test_a_size_that_a_model_would_change_is_refused(student: Path, teacher) -> None:
    narrow = teacher(size={"shortest_edge": SMALLEST, "longest_edge": LARGEST // 2})
    (mistake,) = mistakes(config_of(student, narrow))
    assert "teachers.math.model" in mistake and str(LARGEST // 2) in mistake
    assert mistakes(config_of(student, narrow, f"data.images.max_pixels={LARGEST // 2}")) == []
    beyond = mistakes(config_of(student, teacher(), f"data.images.max_pixels={LARGEST * 2}"))
    assert [mistake.split("where:")[1].split(",")[0].strip() for mistake in beyond] == [
        "student.model",
        "teachers.math.model",
        "teachers.code.model",
    ]


def test_vllm_is_not_asked_to_see(student: Path, teacher) -> None:
    config = config_of(student, teacher(), "teachers.math.server.engine=vllm")
    (mistake,) = mistakes(config)
    assert "teachers.math.server.engine" in mistake and "leave_out" in mistake
    assert [str(found) for found in fit_mistakes(config)] == [mistake]  # so preflight and the doctor tell it
    assert mistakes(config_of(student, teacher(), "teachers.math.server.engine=vllm", "data.columns.images=null")) == []


def test_the_sizes_of_a_model_that_sees_are_those_of_its_text_model(student: Path, teacher) -> None:
    config = config_of(student, teacher(), "data.max_prompt_tokens=3000", "scoring.top_k=600")
    told = " ".join(str(mistake) for mistake in fit_mistakes(config))
    assert "2048" in told and "516" in told
