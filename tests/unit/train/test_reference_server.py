"""The free reference among the servers of a run: its address, its process, and what is checked before it starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.errors import OpdError
from megatron_opd.train.preflight import preflight
from megatron_opd.train.roles import assign_endpoints, server_roles

from runs import ROOT, TOY

CODE = ROOT / "tools" / "toy" / "models" / "code"


def config(*overrides: str, reference: Path | None = CODE) -> Config:
    if reference is not None:
        overrides = (*overrides, f"reference.model={reference}", "objective.teacher_scale=1.5")
    return load_config(TOY, list(overrides))


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # conf/toy.yaml names its models from there


def test_without_a_reference_there_is_no_server_for_it() -> None:
    settings = config(reference=None)
    endpoints = assign_endpoints(settings)
    assert endpoints.reference == []
    assert [role.name for role in server_roles(settings, endpoints)] == ["rollout", "teacher-math", "teacher-code"]


def test_a_reference_is_started_like_a_teacher() -> None:
    settings = config()
    endpoints = assign_endpoints(settings)
    role = server_roles(settings, endpoints)[-1]
    assert role.name == "reference" and role.ready_url == f"{endpoints.reference[0]}/ready"
    assert role.argv[role.argv.index("--model-path") + 1] == str(CODE)
    assert endpoints.reference[0].endswith(f":{role.argv[role.argv.index('--port') + 1]}")
    assert endpoints.reference not in (endpoints.rollout, *endpoints.teachers.values())


def test_a_reference_with_a_url_is_attached_to() -> None:
    settings = config("reference.server.urls=[http://far:30000]")
    endpoints = assign_endpoints(settings)
    assert endpoints.reference == ["http://far:30000"]
    assert "reference" not in [role.name for role in server_roles(settings, endpoints)]


def copy_of_code(tmp_path: Path, **changes: object) -> Path:
    """The code teacher with other values in its config.json."""
    folder = tmp_path / "model"
    shutil.copytree(CODE, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def test_the_toy_run_with_a_reference_and_rows_passes() -> None:
    preflight(config("scoring.top_k=512"))


def test_a_reference_without_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="No such model folder") as caught:
        preflight(config(reference=tmp_path / "none"))
    assert "reference.model" in str(caught.value)


def test_a_reference_with_a_short_context_is_named(tmp_path: Path) -> None:
    with pytest.raises(OpdError, match="longer than the model's context") as caught:
        preflight(config(reference=copy_of_code(tmp_path, max_position_embeddings=1000)))
    assert "reference.model" in str(caught.value) and "1104" in str(caught.value)


def test_a_reference_with_another_tokenizer_is_named(tmp_path: Path) -> None:
    folder = copy_of_code(tmp_path)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(OpdError, match="The tokenizers differ") as caught:
        preflight(config(reference=folder))
    assert str(folder) in str(caught.value)


def test_more_rows_than_a_vocabulary_has_are_refused() -> None:
    with pytest.raises(OpdError) as caught:
        preflight(config("scoring.top_k=513", reference=None))
    text = str(caught.value)
    assert text.count("More most likely tokens") == 3 and "513" in text and "at most 512" in text
    assert "scoring.top_k, teachers.math.model" in text and "scoring.top_k, student.model" in text
