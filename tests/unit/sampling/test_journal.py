"""The journal: no sample lost or counted twice, wherever a run is killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from megatron_opd.config import VerifierConfig, load_config, load_evaluation
from megatron_opd.config.sections import JudgeConfig
from megatron_opd.difficulty.identity import settings_of
from megatron_opd.errors import ConfigError, DataError, EngineError
from megatron_opd.evaluation.command import _settings
from megatron_opd.sampling import identity
from megatron_opd.sampling.identity import judging_of, model_digest
from megatron_opd.sampling.journal import Journal, Sampled

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
IDENTITY = {"student.model": "sha256 ab", "difficulty.samples": 3, "difficulty.top_k": None}
SAMPLES = {"a": 3, "b": 3, "c": 3}
A = Sampled("a", [1, 0, -1], [5, 3, 4], cut=[0, 1, 0], weights=-1, unknown=["timed out after 5 s"])
B = Sampled("b", [1, 1, 1], [3, 3, 3], cut=[0, 0, 0], weights=-1, texts=["2", "2", "2"])


def begin(folder: Path, **changes: object) -> Journal:
    return Journal.open(folder / "out" / "samples.jsonl", "models/4b", IDENTITY | changes, SAMPLES, "difficulty.output")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal with the lines of A and B."""
    with begin(tmp_path) as journal:
        journal.add(A, "http://here")
        journal.add(B, "http://here")
    return tmp_path / "out" / "samples.jsonl"


def test_a_line_is_in_the_file_when_add_returns(tmp_path: Path) -> None:
    with begin(tmp_path) as journal:
        journal.add(A, "http://here")
        header, line = (json.loads(line) for line in journal.path.read_text().splitlines())
    assert header == {"journal": 2, "model": "models/4b", "identity": IDENTITY}
    assert (line["id"], line["outcomes"], line["unknown"]) == ("a", [1, 0, -1], ["timed out after 5 s"])


def test_unknown_outcomes_are_neither_passes_nor_failures() -> None:
    assert (A.graded, A.passes, B.graded, B.passes) == (2, 1, 3, 3)


def test_a_second_run_goes_on(path: Path, tmp_path: Path) -> None:
    with begin(tmp_path) as journal:
        assert journal.done == {"a": A, "b": B} and journal.weights == -1
        journal.add(Sampled("c", [0, 0, 0], [1, 1, 1], [0, 0, 0], -1), "http://here")
    with begin(tmp_path) as journal:
        assert list(journal.done) == ["a", "b", "c"]


def test_a_kill_at_any_byte_loses_only_the_line_it_tore(path: Path, tmp_path: Path) -> None:
    whole = path.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        finished = sum(end <= size for end in ends)
        with begin(tmp_path) as journal:
            assert list(journal.done) == ["a", "b"][: max(0, finished - 1)], size
            for sampled in [A, B][len(journal.done) :]:
                journal.add(sampled, "http://here")
        assert path.read_bytes() == whole, size


def test_a_prompt_that_is_there_twice_is_an_error_that_names_both_lines(path: Path, tmp_path: Path) -> None:
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[1])
    with pytest.raises(DataError, match=r"samples\.jsonl:4(.|\n)*a, as in line 2"):
        begin(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"id": "c", "outcomes": [1, 0], "lengths": [1, 1], "cut": [0, 0], "weights": -1}',
        '{"id": "c", "outcomes": [1, 0, 2], "lengths": [1, 1, 1], "cut": [0, 0, 0], "weights": -1}',
        '{"id": "c", "outcomes": [1, 0, 0], "lengths": [1, 1], "cut": [0, 0, 0], "weights": -1}',
        '{"id": "c", "outcomes": [1, 0, 0], "lengths": [1, 1, 1], "cut": [0, 0, 0], "weights": -1, "texts": ["x"]}',
        '{"id": "d", "outcomes": [1, 0, 0], "lengths": [1, 1, 1], "cut": [0, 0, 0], "weights": -1}',
    ],
    ids=["no JSON", "no object", "nothing", "too few", "no outcome", "a length missing", "texts missing", "unknown"],
)
def test_a_line_that_cannot_be_used_is_named(path: Path, tmp_path: Path, line: str) -> None:
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError, match=r"samples\.jsonl:4"):
        begin(tmp_path)


def test_other_settings_are_refused_and_named(path: Path, tmp_path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path, **{"difficulty.top_k": 50, "student.model": "sha256 cd"})
    text = str(caught.value)
    assert "another student.model, difficulty.top_k" in text and "difficulty.samples" not in text
    assert 'student.model = "sha256 cd", difficulty.top_k = 50' in text and "difficulty.top_k = null" in text
    assert str(path) in text and "difficulty.output" in text and path.read_bytes() == before


def test_another_kind_of_file_is_refused(path: Path, tmp_path: Path) -> None:
    path.write_text('{"prompt": "1 + 1"}\n')
    with pytest.raises(ConfigError, match="not a journal of this version"):
        begin(tmp_path)


def test_two_processes_never_write_at_once(path: Path, tmp_path: Path) -> None:
    with begin(tmp_path), pytest.raises(ConfigError, match="Another process is at work"):
        begin(tmp_path)
    begin(tmp_path).__exit__()


def test_the_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pass_rates.parquet").touch()
    with pytest.raises(ConfigError, match=r"something else(.|\n)*pass_rates\.parquet"):
        begin(tmp_path)
    assert [item.name for item in (tmp_path / "out").iterdir()] == ["pass_rates.parquet"]


def test_samples_of_other_weights_are_not_mixed_in(path: Path, tmp_path: Path) -> None:
    with begin(tmp_path) as journal:
        with pytest.raises(EngineError, match=r"http://there, prompt c(.|\n)*version 7(.|\n)*version -1"):
            journal.add(Sampled("c", [0, 0, 0], [1, 1, 1], [0, 0, 0], weights=7), "http://there")
        assert list(journal.done) == ["a", "b"]
    assert path.read_bytes().count(b"\n") == 3


def test_every_option_that_changes_a_sample_is_in_the_identity() -> None:
    def settings(*changes: str) -> dict[str, object]:
        kinds = ["verifiers.kinds.math=math", "verifiers.kinds.code=code"]
        return settings_of(load_config(TOY, [*kinds, *changes]), {"math"})

    for change in ("difficulty.temperature=0.7", "rollout.max_new_tokens=79", "verifiers.kinds.math=none"):
        assert settings(change) != settings()
    for change in ("verifiers.sandbox=limits", "verifiers.anls_threshold=0.6", "verifiers.timeout_s=6"):
        assert settings(change) != settings()
    for change in ("data.columns.prompt=question", "engine.dtype=bfloat16", "engine.deterministic=true"):
        assert settings(change) != settings()
    for change in ("difficulty.level=ends", "difficulty.max_repeats=2", "seed=3", "verifiers.kinds.code=none"):
        assert settings(change) == settings()
    assert settings("verifiers.workers=3") == settings()
    assert settings("seed=3", "engine.deterministic=true") != settings("engine.deterministic=true")


def test_a_verdict_depends_on_every_option_of_a_verifier_but_those_named_here() -> None:
    default, without = VerifierConfig(), {"kinds", "workers"}
    assert {f"verifiers.{name}" for name in VerifierConfig.model_fields if name not in without} == set(
        judging_of(default, ["math"])
    )
    judge = JudgeConfig(url="http://here", model="a")
    judged = [
        judging_of(default.model_copy(update={"judge": judge.model_copy(update=change)}), ["judge"])
        for change in ({}, {"model": "b"}, {"url": "http://there"}, {"max_tokens": 7}, {"token_env": "TOKEN"})
    ]
    assert all(other != judged[0] for other in judged[1:4]) and judged[4] == judged[0]


def test_the_fence_in_force_belongs_to_the_verdicts_of_code(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for level in ("namespaces", "limits"):
        monkeypatch.setattr(identity, "choose", lambda wanted, level=level: level if wanted == "best" else wanted)
        levels.append(judging_of(VerifierConfig(), ["code"]))
        assert judging_of(VerifierConfig(), ["math"])["verifiers.sandbox"] == "best"
    assert levels[0] != levels[1]  # the same config on two machines
    evaluation = load_evaluation([str(TOY.parent / "eval/toy.yaml"), "verifiers.anls_threshold=0.7"])
    found = _settings(evaluation)
    assert found["verifiers.sandbox in force"] == "limits" and found["verifiers.anls_threshold"] == 0.7


def test_a_model_is_known_by_its_content(tmp_path: Path) -> None:
    digests = set()
    for name, weights, config in [("a", b"0" * 9_000_000, "{}"), ("b", b"0" * 9_000_000, "{}"), ("c", b"0" * 20, "{}")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        digests.add(model_digest(tmp_path / name))
    assert len(digests) == 2 and model_digest(tmp_path / "a") == model_digest(tmp_path / "b")
    for position in (0, 8_999_999):
        changed = bytearray(b"0" * 9_000_000)
        changed[position] = 1
        (tmp_path / "b" / "model.safetensors").write_bytes(changed)
        digests.add(model_digest(tmp_path / "b"))
    (tmp_path / "a" / "config.json").write_text("{ }")
    assert len(digests | {model_digest(tmp_path / "a")}) == 5
