"""What is dropped, what is refused, and that nothing half-written is left."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import published
import pytest
from typer.testing import CliRunner

from megatron_opd.cli import app
from megatron_opd.config import PrepareConfig
from megatron_opd.data.rows import Row
from megatron_opd.data.templates import TEMPLATES, with_template
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.prepare import command, sources
from megatron_opd.prepare.command import parse_benchmarks, prepare
from megatron_opd.prepare.console import PrepareConsole
from megatron_opd.prepare.contamination import Benchmarks
from megatron_opd.prepare.report import Report
from megatron_opd.prepare.sources import source_rows
from megatron_opd.prepare.templates import bare
from megatron_opd.runtime.supervision import StoppedBySignal

LONG = "A farmer has three fields, and each field has seven rows of twelve trees that bear ten apples in a good year."


def question(text: str, answer: str = "5") -> dict:
    return {"question": text, "answer": f"... #### {answer}"}


def lines(path: Path, records: list) -> Path:
    texts = [item if isinstance(item, str) else json.dumps(item) for item in records]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.fixture
def run(tmp_path: Path):
    """Converts GSM8K records; returns the report."""

    def converting(*shards: list, **options) -> Report:
        files = [lines(tmp_path / f"part{number}.jsonl", shard) for number, shard in enumerate(shards)]
        return prepare("gsm8k", files, tmp_path / "out.jsonl", PrepareConfig(**options), PrepareConsole())

    return converting


def written(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def test_shards_keep_their_order_and_ids_do_not_depend_on_it(run, tmp_path: Path) -> None:
    run([question("one"), question("two")], [question("three")])
    first = written(tmp_path)
    assert [record["prompt"].split("\n")[0] for record in first] == ["one", "two", "three"]
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.report.json").unlink()
    run([question("three")], [question("two"), question("one")])
    assert written(tmp_path) == first[::-1]


def test_duplicates_are_dropped_and_contradictions_told_apart(run, tmp_path: Path) -> None:
    report = run([question("How many?")], [question("how  MANY?"), question("How many?", "6"), question("Other?")])
    assert report.dropped == {"duplicate": 1, "duplicate with another answer": 1}
    assert [record["answer"] for record in written(tmp_path)] == ["5", "5"]
    assert report.examples["duplicate"][0]["where"] == f"{tmp_path / 'part1.jsonl'}:1"


def test_a_benchmark_is_not_trained_on(run, tmp_path: Path) -> None:
    test = lines(tmp_path / "test.jsonl", [question(LONG), question("What is 2+3?")])
    copied = "In other words: " + LONG.upper().replace(",", ";") + " How many apples?"
    kept = [question("What is 2+3? And what is 2+4?"), question("A farmer has three fields, and each has cows.")]
    report = run([question(copied), question("what is 2 + 3"), *kept], benchmarks=(("gsm8k", test),))
    assert report.dropped == {"in a benchmark": 2}
    assert report.benchmarks == {str(test): 2}
    assert "a farmer has three fields and each field has seven rows of twelve" in str(report.examples)
    assert len(written(tmp_path)) == 2


def test_the_number_of_words_decides() -> None:
    benchmarks = Benchmarks(words=5)
    benchmarks.add("b:1", "one two three four five six")
    assert benchmarks.match("zero two three four five six").words == "two three four five six"
    assert benchmarks.match("one two three four 5 six") is None


def test_long_prompts_are_dropped(run, tmp_path: Path, model_folder) -> None:
    folder = model_folder("model")  # a token is a byte; the chat template and ours add some
    report = run([question("short"), question("x" * 200)], tokenizer=folder, max_tokens=200)
    assert report.dropped == {"too long": 1}
    assert "at most 200" in report.examples["too long"][0]["detail"]


def test_a_limit_needs_a_tokenizer(run) -> None:
    with pytest.raises(ConfigError, match="need each other"):
        run([question("short")], max_tokens=5)


def test_bad_records_are_told_with_file_line_and_field(run, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        run([question("fine"), {"question": "?", "answer": "no mark"}], ["{broken", question("")])
    told = str(caught.value)
    assert "3 of 4 records cannot be used" in told
    assert "part0.jsonl:2: answer: got 'no mark', expected a solution that ends with ####" in told
    assert "part1.jsonl:1: got Expecting property name" in told
    assert "part1.jsonl:2: question: got ''" in told
    assert "--max-bad" in told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part0.jsonl", "part1.jsonl"]


def test_some_bad_records_may_be_allowed(run, tmp_path: Path) -> None:
    report = run([question("fine"), "{broken", {"question": "?"}], max_bad=2)
    assert (report.kept, report.dropped) == (1, {"bad record": 2})
    plain = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert plain["dropped"]["bad record"]["examples"][1]["detail"].startswith("answer: got nothing")


def test_a_file_of_another_format_ends_early(run) -> None:
    with pytest.raises(DataError, match="10 of 10 records"):
        run([{"problem": "?", "answer": "5"}] * 1000)


def test_tests_that_the_verifier_cannot_read_are_a_flaw(tmp_path: Path) -> None:
    rows = [published.eurus("f", "{}"), published.eurus("f", '{"inputs": ["1"], "outputs": []}')]
    with pytest.raises(DataError, match="2 of 2") as caught:
        source = lines(tmp_path / "code.jsonl", rows)
        prepare("eurus-code", [source], tmp_path / "out.jsonl", PrepareConfig(), PrepareConsole())
    assert "reward_model.ground_truth: got 1 inputs for 0 outputs" in str(caught.value)


def test_half_of_a_surrogate_pair_is_a_flaw(run) -> None:
    with pytest.raises(DataError, match="A record cannot be used: question"):
        run(['{"question": "\\ud800?", "answer": "#### 5"}'])


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    source = lines(tmp_path / "charts.jsonl", [published.CHARTQA_AUTHORS])
    with pytest.raises(DataError, match="imgname") as caught:
        prepare("chartqa", [source], tmp_path / "out.jsonl", PrepareConfig(), PrepareConsole())
    assert "--set images=" in str(caught.value)


def test_nothing_is_overwritten(run, tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        run([question("one")])
    assert (tmp_path / "out.jsonl").read_text() == "precious"


def test_a_full_disk_is_told_and_leaves_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.os, "fsync", full)
    with pytest.raises(DataError, match="cannot be written"):
        run([question("one")])
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith("part")] == []


def test_a_signal_leaves_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, columns: object) -> Iterator[Row]:
        yield Row(1, question("one"))
        os.kill(os.getpid(), signal.SIGTERM)
        yield Row(2, question("two"))

    monkeypatch.setattr(command, "source_rows", interrupted)
    with pytest.raises(StoppedBySignal):
        run([])
    assert [path.name for path in tmp_path.iterdir()] == ["part0.jsonl"]


@pytest.mark.parametrize("body", ['{"data": 5}', "[1]", '[{"question": "?"', "", '[{"question": "?"}, x]'])
def test_broken_json_files(tmp_path: Path, body: str) -> None:
    path = tmp_path / "in.json"
    path.write_text(body)
    with pytest.raises(DataError):
        list(source_rows(path, None))


def test_a_json_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "CHUNK", 40)
    records = [{"n": number, "text": "x" * number, "list": [{"}": "]"}]} for number in range(120)]
    path = tmp_path / "in.json"
    path.write_text(json.dumps({"name": "set", "data": records}, indent=1))
    rows = list(source_rows(path, None))
    assert [row.record() for row in rows] == records
    assert [row.number for row in rows] == list(range(1, 121))


@pytest.mark.parametrize("name", ["math", "code"])
def test_an_instruction_is_added_once(name: str) -> None:
    asked = with_template("What is {x}?", name)
    assert asked.startswith("What is {x}?")
    assert bare(asked) == bare(f"{asked} \n") == bare(with_template(asked, name)) == "What is {x}?"
    assert TEMPLATES[name].removeprefix("{question}") in asked


def test_the_command(tmp_path: Path) -> None:
    first, second = lines(tmp_path / "a.jsonl", [question("a")]), lines(tmp_path / "b.jsonl", [question("b"), "{"])
    arguments = [
        "prepare",
        "gsm8k",
        str(first),
        str(second),
        str(tmp_path / "out.jsonl"),
        "--set",
        "template=false",
        "--max-bad",
        "1",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert [record["prompt"] for record in written(tmp_path)] == ["a", "b"]
    assert "kept, math" in result.output
    (tmp_path / "out.jsonl").rename(tmp_path / "old.jsonl")
    (tmp_path / "out.jsonl.report.json").unlink()
    result = CliRunner().invoke(app, [*arguments[:-2], "--set", "max_bad=1"])  # the other way to say it
    assert result.exit_code == 0, result.output
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    unknown = CliRunner().invoke(app, ["prepare", "nope", str(first), str(tmp_path / "new.jsonl")])
    assert (unknown.exit_code, "No such format" in unknown.output) == (1, True)


@pytest.mark.parametrize("item", ["gsm8k", "=file", "gsm8k="])
def test_a_benchmark_without_format_or_file(item: str) -> None:
    with pytest.raises(ConfigError, match="a format and a file"):
        parse_benchmarks([item])
