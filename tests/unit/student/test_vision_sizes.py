"""Multimodal models before anything starts: sizes that are refused, and the weights that there must be."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText
from vision_models import FAMILIES, make_vision_model

from megatron_opd.config import StudentConfig
from megatron_opd.convert.checks import check_to_megatron
from megatron_opd.errors import ConfigError, ModelError
from megatron_opd.student.hf_weights import expected_shapes, weight_mistakes, weights_dtype
from megatron_opd.student.sizes import read_hf_config, student_mistakes

Change = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    work = tmp_path_factory.mktemp("models")
    return {family: make_vision_model(work / family, family) for family in FAMILIES}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda family: Path(shutil.copytree(folders[family], tmp_path / family))


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_checkpoint(family: str, tied: bool, tmp_path: Path) -> None:
    folder = make_vision_model(tmp_path / "model", family, tied=tied)
    hf_config = read_hf_config(folder)
    found = shapes_of(folder)
    assert expected_shapes(folder, hf_config) == found and ("lm_head.weight" in found) != tied
    assert weight_mistakes(folder, hf_config) == [] and weights_dtype(folder) == "float32"
    assert student_mistakes(StudentConfig(model=folder, tensor_parallel=2, pipeline_parallel=2), hf_config) == []


_OTHER_TEXT = {
    **{"hidden_size": 96, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6},
    **{"num_key_value_heads": 3, "vocab_size": 700, "layer_types": ["full_attention"] * 3},
}
_OTHER_VISION = {
    **{"depth": 4, "hidden_size": 48, "intermediate_size": 40, "num_heads": 3, "out_hidden_size": 96},
    **{"patch_size": 8, "spatial_merge_size": 3, "temporal_patch_size": 1},
    **{"deepstack_visual_indexes": [1, 2, 3], "num_position_embeddings": 81, "fullatt_block_indexes": [0, 3]},
}
_SECTIONS = {"qwen3_vl": [8, 4, 4], "qwen2_5_vl": [2, 2, 4]}


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_with_other_sizes(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """No size of the text or of the tower is what it was, and the heads are not hidden / heads in Qwen3-VL."""
    plain = json.loads((folders[family] / "config.json").read_text())
    plain["text_config"] |= {key: value for key, value in _OTHER_TEXT.items() if key in plain["text_config"]}
    plain["text_config"]["rope_parameters"]["mrope_section"] = _SECTIONS[family]
    plain["vision_config"] |= {key: value for key, value in _OTHER_VISION.items() if key in plain["vision_config"]}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path)).save_pretrained(tmp_path / "model")
    folder = tmp_path / "model"
    hf_config = read_hf_config(folder)
    assert expected_shapes(folder, hf_config) == shapes_of(folder)
    assert student_mistakes(StudentConfig(model=folder), hf_config) == []


def test_a_config_of_the_first_release_of_qwen2_5_vl_says_the_same(folders: dict[str, Path]) -> None:
    """Published as one level, with names of transformers 4."""
    folder = folders["qwen2_5_vl"]
    new = read_hf_config(folder)
    rope = new["text_config"].pop("rope_parameters")
    old = new | new.pop("text_config") | {"model_type": "qwen2_5_vl"}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]}}
    old["vision_config"]["in_chans"] = old["vision_config"].pop("in_channels")
    assert expected_shapes(folder, old) == shapes_of(folder)
    assert student_mistakes(StudentConfig(model=folder), old) == []
    old["rope_scaling"]["mrope_section"] = [2, 2, 2]
    assert "config.json: rope_scaling.mrope_section" in str(student_mistakes(StudentConfig(model=folder), old)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("change", ["missing", "cut", "file"])
def test_a_weight_of_the_tower_that_is_missing_or_cut_is_found(copied: Callable, family: str, change: str) -> None:
    folder = copied(family)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("visual.blocks.1.attn.qkv.weight"))
    if change == "file":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        tensors |= {name: tensors.pop(name)[1:].clone()} if change == "cut" else {}
        if change == "missing":
            del tensors[name]
        save_file(tensors, path)
    (error,) = weight_mistakes(folder, read_hf_config(folder))
    expected = {"missing": f"lacks weights.*{name}", "cut": r"\[95, 32\] instead of \[96, 32\]", "file": "is damaged"}
    with pytest.raises(ModelError, match=f"(?s){expected[change]}"):
        raise error
    with pytest.raises(ModelError, match=f"(?s){expected[change]}"):
        check_to_megatron(folder, folder / "out", [])


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_under_the_names_of_the_other_family_are_refused_with_the_fix(copied: Callable, family: str) -> None:
    folder = copied(family)
    tensors = load_file(folder / "model.safetensors")
    ours, theirs = ("visual.", "model.visual.") if family == "qwen2_5_vl" else ("model.visual.", "visual.")
    renamed = {theirs + name.removeprefix(ours) if name.startswith(ours) else name: tensors[name] for name in tensors}
    save_file(renamed, folder / "model.safetensors")
    (error,) = weight_mistakes(folder, read_hf_config(folder))
    assert "other names than those that the family is published under" in error.what
    assert error.got.startswith(theirs) and f"{ours} for {theirs}" in error.fix


def changed(part: str | None, **values: Any) -> Change:
    """Puts values into a part of config.json, or takes out those that are None."""

    def change(plain: dict[str, Any]) -> None:
        inner = plain
        for key in part.split(".") if part else []:
            inner = inner[key]
        inner |= values
        for key in [key for key, value in values.items() if value is None]:
            del inner[key]

    return change


ROPE = "text_config.rope_parameters"
BAD = [
    ("qwen3_vl", changed("text_config", hidden_act="gelu"), "text_config.hidden_act", "silu"),
    ("qwen3_vl", changed("text_config", attention_bias=True), "text_config.attention_bias", "False"),
    ("qwen2_5_vl", changed("text_config", use_sliding_window=True), "text_config.use_sliding_window", "False"),
    ("qwen3_vl", changed("text_config", num_attention_heads=None), "text_config.num_attention_heads", "positive"),
    ("qwen3_vl", changed(ROPE, rope_type="yarn"), ROPE, "rope_type default"),
    ("qwen3_vl", changed(ROPE, partial_rotary_factor=0.5), ROPE, "of whole heads"),
    ("qwen3_vl", changed(ROPE, mrope_section=None), f"{ROPE}.mrope_section", "3 positive"),
    ("qwen3_vl", changed(ROPE, mrope_section=[8, 8]), f"{ROPE}.mrope_section", "3 positive"),
    ("qwen3_vl", changed(ROPE, mrope_section=[6, 5, 6]), f"{ROPE}.mrope_section", "a sum of 16"),
    ("qwen2_5_vl", changed(ROPE, mrope_section=[6, 5, 5]), f"{ROPE}.mrope_section", "a sum of 8"),
    ("qwen3_vl", changed(ROPE, mrope_interleaved=False), f"{ROPE}.mrope_interleaved", "true"),
    ("qwen2_5_vl", changed(ROPE, mrope_interleaved=True), f"{ROPE}.mrope_interleaved", "false"),
    ("qwen3_vl", changed(None, vision_config=None), "vision_config", "vision tower"),
    ("qwen3_vl", changed("vision_config", depth=None), "vision_config.depth", "positive whole number"),
    ("qwen3_vl", changed("vision_config", in_channels=4), "vision_config.in_channels", "3"),
    ("qwen3_vl", changed("vision_config", out_hidden_size=65), "vision_config.out_hidden_size", "64"),
    ("qwen3_vl", changed("vision_config", num_heads=3), "vision_config.hidden_size", "a multiple of num_heads = 3"),
    ("qwen3_vl", changed("vision_config", num_position_embeddings=60), "num_position_embeddings", "a square number"),
    ("qwen3_vl", changed("vision_config", deepstack_visual_indexes=[0, 3]), "deepstack_visual_indexes", "below 3"),
    ("qwen3_vl", changed("vision_config", deepstack_visual_indexes=[2, 0]), "deepstack_visual_indexes", "ascending"),
    ("qwen2_5_vl", changed("vision_config", fullatt_block_indexes=None), "fullatt_block_indexes", "below 3"),
    ("qwen2_5_vl", changed("vision_config", window_size=0), "vision_config.window_size", "positive whole number"),
    ("qwen3_vl", changed(None, image_token_id=516), "image_token_id", "below vocab_size = 516"),
    ("qwen3_vl", changed(None, vision_start_token_id=None), "vision_start_token_id", "a token id"),
    ("qwen3_vl", changed(None, tie_word_embeddings=True), "tie_word_embeddings", "False in text_config"),
]


@pytest.mark.parametrize(("family", "change", "where", "text"), BAD)
def test_what_is_not_supported_is_told_with_its_place(
    folders: dict[str, Path], family: str, change: Change, where: str, text: str
) -> None:
    plain = copy.deepcopy(read_hf_config(folders[family]))
    change(plain)
    (error,) = student_mistakes(StudentConfig(model=folders[family]), plain)
    assert isinstance(error, ModelError) and error.where.endswith(where), error
    assert text in str(error)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [({"pipeline_parallel": 4}, 4), ({"pipeline_parallel": 2, "virtual_pipeline": 2}, 4)],
)
def test_layers_that_get_features_of_the_tower_are_all_on_the_first_stage(
    folders: dict[str, Path], sizes: dict[str, int], parts: int
) -> None:
    student = StudentConfig(model=folders["qwen3_vl"], **sizes)
    (error,) = student_mistakes(student, read_hf_config(student.model))
    assert isinstance(error, ConfigError) and "student.pipeline_parallel" in error.where and "2" in error.expected
    other = StudentConfig(model=folders["qwen2_5_vl"], **sizes)
    assert student_mistakes(other, read_hf_config(other.model)) == []


def test_a_text_model_has_no_tower_to_train(folders: dict[str, Path]) -> None:
    text = Path(__file__).parents[3] / "tools/toy/models/student"
    (error,) = student_mistakes(StudentConfig(model=text, train_vision=True), read_hf_config(text))
    assert isinstance(error, ConfigError) and error.where == "student.train_vision"
    seeing = StudentConfig(model=folders["qwen3_vl"], train_vision=True)
    assert student_mistakes(seeing, read_hf_config(seeing.model)) == []
