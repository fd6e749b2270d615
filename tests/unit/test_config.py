"""The config: merging, and errors that list every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.config import load_config
from megatron_opd.errors import ConfigError
from megatron_opd.observe.reference import config_reference

TOY = Path(__file__).resolve().parents[2] / "conf" / "toy.yaml"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults() -> None:
    config = load_config(TOY, ["steps=2", "optimizer.lr=1e-4", "teachers.math.server.urls=[http://10.0.0.1:3]"])
    assert (config.steps, config.optimizer.lr, config.optimizer.adam_beta2) == (2, 1e-4, 0.98)
    assert config.teachers["math"].server.urls == ["http://10.0.0.1:3"]
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


def test_a_file_builds_on_others_and_wins_over_them(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text(f"defaults: [{TOY}]\nsteps: 3\nseed: 1\nbalance: null\n")
    (tmp_path / "own.yaml").write_text("defaults: [deep/base.yaml]\nseed: 2\n")
    config = load_config(tmp_path / "own.yaml", [])
    assert (config.steps, config.seed, config.name, config.balance) == (3, 2, "toy", None)
    (tmp_path / "more.yaml").write_text("seed: 5\ncalibration: {delta: 0.1}\n")
    config = load_config(tmp_path / "own.yaml", ["seed=4", str(tmp_path / "more.yaml"), "steps=7"])
    assert (config.seed, config.steps, config.calibration.delta) == (5, 7, 0.1)
    assert config.calibration.direction == "spread"  # what the recipe says beside it stays


def test_a_file_that_builds_on_itself_or_on_nothing_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("defaults: [b.yaml]\n")
    (tmp_path / "b.yaml").write_text("defaults: [a.yaml]\n")
    with pytest.raises(ConfigError, match="builds on itself"):
        load_config(tmp_path / "a.yaml", [])
    (tmp_path / "c.yaml").write_text("defaults: [missing.yaml]\n")
    with pytest.raises(ConfigError, match="No such config file") as caught:
        load_config(tmp_path / "c.yaml", [])
    assert "missing.yaml" in str(caught.value)


def test_null_switches_a_part_off_and_a_value_switches_it_on() -> None:
    plain = load_config(TOY, ["conf/recipe/opd.yaml"])
    assert plain.balance is None and plain.calibration is None
    assert load_config(TOY, ["balance=null"]).balance is None
    assert load_config(TOY, ["conf/recipe/opd.yaml", "balance.ratio=2"]).balance.ratio == 2.0


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.teacher_scale=1.25"], "needs reference"),
        (["reference.model=x"], "of use to nothing else"),
        (["objective.forward_kl=1"], "set scoring.top_k"),
        (["objective.forward_kl=1", "scoring.top_k=4", "objective.forward_kl_entropy=2"], "at most 1.609"),
        (["rollout.max_staleness=1"], "set refresh.pause to retract or in_place"),
        (
            ["rollout.colocate=true", "refresh.mode=disk", "rollout.max_staleness=2", "refresh.pause=retract"],
            "rollout.max_staleness 2 samples meanwhile",
        ),
        (["rollout.colocate=true"], "cannot use refresh.mode broadcast"),
        (
            ["rollout.colocate=true", "refresh.mode=tensor", "rollout.server.urls=[http://127.0.0.1:9]"],
            "is for engines that the run starts",
        ),
        (["objective.domain_weights.law=1"], "domain_weights.law names no teacher"),
        (["calibration=null", "objective.placebo=true"], "calibration, which is null"),
        (["objective.gap_floor=1", "objective.gap_ceiling=0"], "is not below"),
        (["calibration.margin=hinge", "calibration.method=mask"], "hinge is a way to shift"),
        (["calibration.direction=correct_up"], "calibration.direction: got 'correct_up'"),
        (["balance.ration=1"], "did you mean ratio?"),
        (["balance.ratio=0"], "balance.ratio: got 0"),
        (["data.lazy.priors=1"], "did you mean prior?"),
        (["data.mixture={math: 1}"], "must name each domain of teachers (code, math)"),
        (["data.mixture={math: 1, code: 0}"], "data.mixture.code: got 0"),
        (["data.stream.window_mb=8"], "stream needs columns.id"),
        (["data.stream.window_mb=8", "data.columns.id=id", "data.lazy.prior=[1,1]"], "leave stream or lazy out"),
    ],
)
def test_parts_of_the_recipe_that_do_not_fit_are_told(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(TOY, overrides)
    assert said in str(caught.value)


def test_the_paper_settings_are_the_papers() -> None:
    text = load_config(TOY, ["conf/recipe/uni_opd_text.yaml"])
    assert (text.calibration.margin, text.calibration.direction, text.calibration.delta) == ("mean", "spread", 0.4)
    assert (text.rollout.prompts_per_step, text.rollout.samples_per_prompt, text.optimizer.lr) == (64, 16, 1e-6)
    images = load_config(TOY, ["conf/recipe/uni_opd_multimodal.yaml"])
    assert (images.calibration.margin, images.calibration.direction, images.calibration.delta) == ("mean", "lift", 0.0)
    assert images.balance == text.balance and text.balance.ratio == 1.0 and text.balance.scope == "group"
