"""The config: merging, and errors that list every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.config import load_config
from megatron_opd.errors import ConfigError
from megatron_opd.observe.reference import config_reference

TOY = Path(__file__).resolve().parents[2] / "conf" / "toy.yaml"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults() -> None:
    config = load_config(TOY, ["steps=2", "optimizer.lr=1e-4", "teachers.math.server.url=http://10.0.0.1:3"])
    assert (config.steps, config.optimizer.lr, config.optimizer.adam_beta2) == (2, 1e-4, 0.98)
    assert config.teachers["math"].server.url == "http://10.0.0.1:3"
    assert config.student.tensor_parallel == 2


def test_all_mistakes_are_reported_together_with_the_nearest_key() -> None:
    overrides = [
        "optimiser.lr=1",
        "student.tensor_paralel=2",
        "steps=none",
        "loss.clip_low=3",
        "teachers.math.modell=x",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config(TOY, overrides)
    text = str(caught.value)
    assert "5 mistakes" in text and str(TOY) in text
    assert "optimiser: unknown key; did you mean optimizer?" in text
    assert "student.tensor_paralel: unknown key; did you mean tensor_parallel?" in text
    assert "teachers.math.modell: unknown key; did you mean model?" in text
    assert "steps: got 'none'" in text and "loss.clip_low: got 3" in text


@pytest.mark.parametrize("override", ["steps", "=3", "two"])
def test_a_malformed_override_is_an_error(override: str) -> None:
    with pytest.raises(ConfigError, match="Malformed override") as caught:
        load_config(TOY, [override])
    assert override in str(caught.value)


def test_a_missing_file_and_a_broken_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such config file"):
        load_config(tmp_path / "none.yaml", [])
    (tmp_path / "broken.yaml").write_text("steps: [1\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "broken.yaml", [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "list.yaml", [])


def test_a_domain_without_a_verifier_is_an_error() -> None:
    with pytest.raises(ConfigError, match="mistake") as caught:
        load_config(TOY, ["teachers.law.model=x"])
    assert "verifiers.kinds.law" in str(caught.value)


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(TOY, []).steps = 3


def test_the_reference_names_every_key_with_a_sentence() -> None:
    lines = config_reference().splitlines()
    keys, sentences = lines[::2], lines[1::2]
    assert any(key.startswith("teachers.<name>.model:") for key in keys)
    assert all(sentence.strip().endswith(".") for sentence in sentences)
