"""Bad input to ``eval`` and ``compare``: every mistake at once, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_opd.cli import app
from megatron_opd.config import load_evaluation
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.evaluation.benchmarks import read_benchmark

ROOT = Path(__file__).resolve().parents[3]
STUDENT = ROOT / "tools/toy/models/student"
PRESETS = sorted((ROOT / "conf/eval").glob("*.yaml"))
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A problem file with these records, as the config's ``benchmarks.NAME.file=...``."""

    def write(name: str, *records: object) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return f"benchmarks.{name}.file={path}"

    return write


def evaluation(tmp_path: Path, *arguments: object) -> str:
    """Output of the command, which must fail before it writes anything."""
    output = f"output={tmp_path / 'out'}"
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), output])
    assert done.exit_code == 1 and not (tmp_path / "out").exists(), done.output
    return done.output


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_presets_have_the_papers_settings(preset: Path) -> None:
    config = load_evaluation([str(preset)])
    for benchmark in config.benchmarks.values():
        assert (benchmark.temperature, benchmark.top_p, benchmark.top_k) == (1.0, 1.0, None)
        if preset.stem != "toy":
            assert benchmark.samples == {"math": 32, "code": 4}[benchmark.verifier]
            assert benchmark.max_new_tokens == 16384 and "{prompt}" in benchmark.template


def test_presets_go_together() -> None:
    config = load_evaluation([*map(str, PRESETS), "limit=3"])
    assert {name: config.judging.kinds[name] for name in ("aime24", "mbpp+")} == {"aime24": "math", "mbpp+": "code"}
    assert len(config.benchmarks) == 9 and config.limit == 3 and config.benchmarks["aime24"].samples == 32


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["sampels=3", "benchmarks.toy_math.tempreature=0"], ["sampels: unknown key", "did you mean temperature"]),
        (["benchmarks.toy_math.template=no place", "pass_at=[0]"], ["template must hold {prompt} once", "pass_at.0"]),
        (["benchmarks.toy_math.temperature=0"], ["temperature 0 gives one response only"]),
        (["benchmarks.toy_math.columns.domain=null"], ["domain needs columns.domain"]),
        (["verifiers.kinds.math=math"], ["set benchmarks.<name>.verifier"]),
        (["benchmarks.toy_code.verifier=judge"], ["set verifiers.judge.url"]),
        (["server.engine=vllm"], ["server.engine must be sglang"]),
        (["benchmarks={'a/b': {file: x, verifier: math}}"], ["a name has letters, digits"]),
    ],
)
def test_mistakes_of_the_config_are_told_together(changes: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_evaluation([str(ROOT / "conf/eval/toy.yaml"), *changes])
    assert all(text in str(caught.value) for text in told)


def test_a_config_is_needed_and_must_be_there() -> None:
    with pytest.raises(ConfigError, match=r"at least one \.yaml file"):
        load_evaluation(["limit=3"])
    with pytest.raises(ConfigError, match="No such config file"):
        load_evaluation(["conf/eval/maths.yaml"])
    with pytest.raises(ConfigError, match="Malformed override"):
        load_evaluation([str(PRESETS[0]), "limit"])


def test_mistakes_of_model_files_and_sizes_are_told_together(tmp_path: Path, write: Write) -> None:
    kinds = [f"benchmarks.{name}.verifier=math" for name in ("a", "b", "c")]
    files = [
        write("a", {"problem": "1 + 1", "answer": 2}),
        write("b", {"prompt": "1 + 1"}),
        "benchmarks.c.file=none.jsonl",
    ]
    short = ["benchmarks.c.max_new_tokens=40", "max_prompt_tokens=512", "engine.python=/nowhere/python"]
    (tmp_path / "empty.yaml").write_text("benchmarks: {}\n")
    text = evaluation(tmp_path, STUDENT, tmp_path / "empty.yaml", *kinds, *files, *short)
    assert "error: 6 things must be put right" in text
    for part in ("benchmarks.a.max_new_tokens 16384", "a.jsonl:1 (benchmarks.a)", "set benchmarks.a.columns"):
        assert part in text
    for part in ("/nowhere/python", "b.jsonl:1 (benchmarks.b)", "none.jsonl (benchmarks.c)"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: None, "No such model folder"),
        (lambda path: path.mkdir(), "The folder holds no model"),
        (lambda path: (path.mkdir(), (path / "config.json").write_text("{}")), "The checkpoint has no weights"),
        (lambda path: (path.mkdir(), (path / "latest_checkpointed_iteration.txt").write_text("7")), "is not there"),
    ],
    ids=["nothing", "empty", "no weights", "no checkpoint"],
)
def test_what_is_no_model_is_told(tmp_path: Path, make: Callable[[Path], object], told: str) -> None:
    make(tmp_path / "model")
    text = evaluation(tmp_path, tmp_path / "model", ROOT / "conf/eval/toy.yaml", "server.urls=[http://127.0.0.1:9]")
    assert told in text


def read(write: Write, tmp_path: Path, *changes: str, records: tuple = ({"prompt": "1 + 1", "answer": 2},)) -> list:
    (tmp_path / "a.yaml").write_text("benchmarks: {a: {verifier: math, samples: 2}}\n")
    config = load_evaluation([str(tmp_path / "a.yaml"), write("a", *records), *changes])
    return read_benchmark(config, "a", load_tokenizer(STUDENT), STUDENT)


def test_a_template_surrounds_the_question_once(write: Write, tmp_path: Path) -> None:
    template = 'benchmarks.a.template="Solve: {prompt} Show {your} work."'
    (problem,) = read(write, tmp_path, template)
    assert problem.text == "Solve: 1 + 1 Show {your} work." and problem.domain == "a" and problem.id == "a/a.jsonl:1"
    (plain,) = read(write, tmp_path)
    assert plain.text == "1 + 1" and plain.token_ids != problem.token_ids
    with pytest.raises(DataError, match="in the template already"):
        read(write, tmp_path, template, records=({"prompt": problem.text, "answer": 2},))


def test_records_of_another_domain_are_left_out(write: Write, tmp_path: Path) -> None:
    records = tuple({"prompt": f"{i} + 1", "answer": i + 1, "domain": "xy"[i % 2]} for i in range(6))
    assert [item.text for item in read(write, tmp_path, "benchmarks.a.domain=y", records=records)] == [
        "1 + 1",
        "3 + 1",
        "5 + 1",
    ]
    assert len(read(write, tmp_path, records=records)) == 6  # without it the column is not read
    assert len(read(write, tmp_path, "benchmarks.a.domain=x", "limit=2", records=records)) == 2
    with pytest.raises(DataError, match=r"x, y(.|\n)*z"):
        read(write, tmp_path, "benchmarks.a.domain=z", records=records)


def test_compare_tells_what_is_no_evaluation(tmp_path: Path) -> None:
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    for first, told in ((tmp_path / "none", "no finished evaluation"), (tmp_path / "other.parquet", "cannot be read")):
        done = CliRunner().invoke(app, ["compare", str(first), str(first)])
        assert done.exit_code == 1 and told in done.output
