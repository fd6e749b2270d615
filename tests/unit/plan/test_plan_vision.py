"""A plan of a multimodal student: its tower is on the first stage, learns or does not, and reads images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import load_config
from megatron_opd.plan.assumptions import parse_assumptions
from megatron_opd.plan.estimate import Plan, make_plan, make_setting, read_models
from megatron_opd.plan.hardware import find_gpu
from megatron_opd.plan.memory import checkpoint_bytes, stage_params
from megatron_opd.plan.shape import read_shape, shape_of

ROOT = Path(__file__).resolve().parents[3]
MODEL = "conf/plan/models/Qwen3-VL-4B"
TEXT = "conf/plan/models/Qwen3-4B"
TOWER = 415_347_712  # Qwen3-VL-4B's parameters less those of Qwen3-4B

QWEN2_5_VL_3B: dict[str, Any] = {  # as it was published, in one level
    **{"model_type": "qwen2_5_vl", "tie_word_embeddings": True, "hidden_size": 2048, "intermediate_size": 11008},
    **{"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936},
    "vision_config": {
        **{"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048},
        **{"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112},
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # model folders of conf/plan are relative


def plan_of(*overrides: str, model: str = MODEL, assume: tuple[str, ...] = ()) -> Plan:
    config = load_config(ROOT / "conf/plan/qwen3_4b.yaml", [f"student.model={model}", *overrides])
    return make_plan(make_setting(config, find_gpu("h100"), parse_assumptions(list(assume))), read_models(config))


def test_parameters_of_public_models() -> None:
    """As those who loaded the weights have counted them."""
    assert read_shape(ROOT / MODEL, "student.model").params == 4_437_815_808
    assert shape_of(QWEN2_5_VL_3B, Path("Qwen2.5-VL-3B")).params == 3_754_622_976
    assert read_shape(ROOT / MODEL, "").params - read_shape(ROOT / TEXT, "").params == TOWER


@pytest.mark.parametrize("train_vision", [False, True])
def test_the_tower_is_on_the_first_stage_and_learns_where_it_is_told_to(train_vision: bool) -> None:
    sizes = (
        "student.pipeline_parallel=2",
        "student.data_parallel=4",
        f"student.train_vision={str(train_vision).lower()}",
    )
    seeing, blind = plan_of(*sizes), plan_of(*sizes[:2], model=TEXT)
    student = seeing.setting.config.student
    parts = [stage_params(seeing.models.student, student, stage) for stage in range(2)]
    assert [part.frozen for part in parts] == [0 if train_vision else TOWER, 0]
    more = [
        {name: seen.parts()[name] - other.parts()[name] for name in ("weights", "gradients", "optimizer")}
        for seen, other in zip(seeing.student.stages, blind.student.stages, strict=True)
    ]
    learning = TOWER if train_vision else 0
    assert more[0] == {"weights": 2 * TOWER, "gradients": 4 * learning, "optimizer": 12 * learning / student.copies}
    assert more[1] == {"weights": 0, "gradients": 0, "optimizer": 0}
    text = read_shape(ROOT / TEXT, "")
    assert (
        checkpoint_bytes(seeing.setting.config, seeing.models.student)
        == checkpoint_bytes(blind.setting.config, text) + 2 * TOWER + 12 * learning
    )
    assert (seeing.refresh_seconds > blind.refresh_seconds) == train_vision
    assert seeing.rollout.weights == blind.rollout.weights + 2 * TOWER
    assert any("keeps for its backward pass" in note for note in seeing.notes) == train_vision


def test_operations_on_images_by_counting() -> None:
    """Four patches of an image token go through every block, and what they are merged to through the mergers."""
    hidden, units, output, patch = 1024, 4096, 2560, 3 * 2 * 16 * 16
    blocks = 24 * (4 * hidden * hidden + 2 * hidden * units) + patch * hidden
    mergers = 4 * (4 * hidden) * (4 * hidden + output)
    expected = 2 * (4 * blocks + mergers)
    assume = ("prompt_tokens=1000", "image_share=0.3")
    seeing, blind = plan_of(assume=assume), plan_of(model=TEXT, assume=assume)
    step = seeing.setting.step
    assert step.images == pytest.approx(300)
    more = {
        name: getattr(seeing.operations, name) - getattr(blind.operations, name)
        for name in ("forward", "backward", "generation", "teachers", "recompute")
    }
    assert more["forward"] == pytest.approx(step.kept * 300 * expected)  # every rollout's own
    assert more["generation"] == pytest.approx(step.groups * 300 * expected)  # once for a group
    assert more["teachers"] == more["backward"] == more["recompute"] == 0  # those here are of text
    learning = plan_of("student.train_vision=true", assume=assume)
    assert learning.operations.backward - blind.operations.backward == pytest.approx(2 * more["forward"])
    seeing_teacher = plan_of(f"teachers.math.model={MODEL}", f"teachers.code.model={MODEL}", assume=assume)
    assert seeing_teacher.operations.teachers - blind.operations.teachers == pytest.approx(more["generation"])
    none = plan_of(assume=("prompt_tokens=1000", "image_share=0"))
    assert none.operations.total == pytest.approx(blind.operations.total)
    assert seeing.student.time.arithmetic > none.student.time.arithmetic


def test_the_assumption_is_told_where_there_is_a_tower() -> None:
    assert any("image_share" in note for note in plan_of().notes)
    assert not any("image_share" in note for note in plan_of(model=TEXT).notes)
