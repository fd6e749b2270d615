"""Each published layout becomes the canonical record that the verifiers and the reader take."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import published
import pyarrow as pa
import pytest
from pyarrow import parquet

from megatron_opd.config import ColumnsConfig, PrepareConfig, VerifierConfig
from megatron_opd.data.reading import PromptReader, read_prompts
from megatron_opd.prepare.command import prepare
from megatron_opd.prepare.console import PrepareConsole
from megatron_opd.records import Outcome
from megatron_opd.verifiers.code import CodeVerifier
from megatron_opd.verifiers.math import MathVerifier


@pytest.fixture
def convert(tmp_path: Path):
    """Writes records to a file, converts them, and returns the canonical ones."""

    def converting(name: str, records: object, suffix: str = ".jsonl", **options) -> list[dict]:
        source = tmp_path / f"in{suffix}"
        if suffix == ".parquet":
            parquet.write_table(pa.Table.from_pylist(records), source)
        elif suffix == ".json":
            source.write_text(json.dumps(records))
        else:
            source.write_text("".join(json.dumps(record) + "\n" for record in records))
        return run(name, source, **options)

    def run(name: str, source: Path, **options) -> list[dict]:
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        out.with_name("out.jsonl.report.json").unlink(missing_ok=True)
        prepare(name, [source], out, PrepareConfig(**options), PrepareConsole())
        return [json.loads(line) for line in out.read_text().splitlines()]

    converting.run = run
    return converting


def judge(record: dict, response: str) -> Outcome:
    kind = CodeVerifier if record["domain"] == "code" else MathVerifier
    return kind(VerifierConfig(timeout_s=20)).verify(record["prompt"], response, record["answer"]).outcome


def fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def test_gsm8k(convert) -> None:
    (record,) = convert("gsm8k", [published.GSM8K])
    assert record["prompt"] == published.GSM8K["question"] + published.MATH_END
    assert (record["answer"], record["domain"], record["id"][:6]) == ("1234", "math", "gsm8k-")
    assert judge(record, "\\boxed{1{,}234}") == Outcome.CORRECT


def test_deepmath_of_parquet(convert) -> None:
    easy = published.DEEPMATH | {"question": "1+1?", "difficulty": 5.5}
    (record,) = convert("deepmath", [published.DEEPMATH, easy], ".parquet", min_difficulty=6.0)
    assert record["prompt"] == published.DEEPMATH["question"] + published.MATH_END
    assert judge(record, "so \\boxed{1}") == Outcome.CORRECT


def test_eurus_code(convert) -> None:
    rows = [
        published.eurus("Add the two numbers of a line.", published.PROGRAM_TESTS),
        published.eurus("Write add.", published.CALL_TESTS),
        published.eurus("What is 1+1?", "2", ability="math"),
    ]
    program, call = convert("eurus-code", rows, ".parquet")
    assert program["prompt"] == "Add the two numbers of a line." + published.CODE_END
    assert judge(program, fenced("print(sum(map(int, input().split())))")) == Outcome.CORRECT
    assert judge(program, fenced("print(3)")) == Outcome.INCORRECT
    assert judge(call, fenced("def add(a, b):\n    return a + b")) == Outcome.CORRECT


def test_verl_of_gopd(convert) -> None:
    rows = [
        published.verl("What is 2+3?" + published.MATH_END, "5", "math"),
        published.verl("Write add." + published.CODE_END, published.CALL_TESTS, "code"),
    ]
    math, code = convert("verl", rows, ".parquet")
    assert [math["domain"], code["domain"]] == ["math", "code"]
    assert math["prompt"] == "What is 2+3?" + published.MATH_END
    assert code["prompt"] == "Write add." + published.CODE_END
    assert json.loads(code["answer"])["fn_name"] == "add"


def test_verl_with_a_list_and_a_system_message(convert) -> None:
    row = published.verl("What is 2+3?", ["5"], "math")
    row["prompt"].insert(0, {"role": "system", "content": "Be brief."})
    (record,) = convert("verl", [row], domain="arithmetic")
    assert record["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert record["prompt"][1]["content"] == "What is 2+3?" + published.MATH_END
    assert (record["answer"], record["domain"]) == ("5", "arithmetic")


@pytest.mark.parametrize(
    "row", [published.MBPP, published.MBPP_SANITIZED, published.MBPP_PLUS], ids=["full", "sanitized", "plus"]
)
def test_mbpp(convert, row: dict) -> None:
    (record,) = convert("mbpp", [row], ".parquet")
    assert record["id"] == f"Mbpp/{row['task_id']}"
    assert row["test_list"][0] in record["prompt"]
    assert judge(record, fenced(row["code"])) == Outcome.CORRECT
    assert judge(record, fenced(row["code"].replace("return ", "return 1 + "))) == Outcome.INCORRECT


def test_mbpp_plus_of_evalplus(convert) -> None:
    (record,) = convert("mbpp", [published.EVALPLUS])
    assert record["prompt"].startswith("Write a function to negate a number.\nassert negate(2) == -2\n\nWrite Python")
    assert judge(record, fenced(published.EVALPLUS["canonical_solution"])) == Outcome.CORRECT


@pytest.mark.parametrize(
    "row",
    [
        {"id": 60, "problem": "How many?", "answer": "204", "year": "2024"},
        {"problem_idx": 1, "problem": "How many?", "answer": 204, "problem_type": ["Algebra"]},
        {"question": "How many?", "answer": "204"},
    ],
)
def test_competitions(convert, row: dict) -> None:
    (record,) = convert("competition", [row])
    assert (record["prompt"], record["answer"]) == ("How many?" + published.MATH_END, "204")


def test_openmmreasoner(convert) -> None:
    (record,) = convert("openmmreasoner", [published.OPENMM], ".parquet")
    assert record["prompt"] == "<image>How long is the side AB?" + published.MATH_END
    assert base64.b64decode(record["images"][0]["base64"]) == published.PNG
    assert (record["answer"], record["domain"]) == ("5", "visual_math")


def test_openmmreasoner_with_parts(convert) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "How long?"}]
    row = published.OPENMM | {"prompt": [{"role": "user", "content": parts}]}
    (record,) = convert("openmmreasoner", [row], ".parquet")
    assert record["prompt"].startswith("<image>How long?")


def test_chartqa_of_both_layouts(convert, tmp_path: Path) -> None:
    (record,) = convert("chartqa", [published.CHARTQA], ".parquet")
    assert json.loads(record["answer"]) == ["14"]
    assert set(record["images"][0]) == {"base64"}
    (tmp_path / published.CHARTQA_AUTHORS["imgname"]).write_bytes(published.PNG)
    (record,) = convert("chartqa", [published.CHARTQA_AUTHORS], ".json")
    assert json.loads(record["answer"]) == ["Spain"]
    assert record["images"] == [{"path": str(tmp_path / published.CHARTQA_AUTHORS["imgname"])}]


def test_infographicvqa(convert, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / published.INFOGRAPHIC["image_local_name"]).write_bytes(published.PNG)
    whole = {"dataset_name": "infographicVQA", "dataset_split": "train", "data": [published.INFOGRAPHIC]}
    (record,) = convert("infographicvqa", whole, ".json", images=folder)
    assert json.loads(record["answer"]) == ["linkedin", "LinkedIn"]
    assert record["images"] == [{"path": str(folder / "20471.jpeg")}]


def test_canonical_comes_back_unchanged(convert, tmp_path: Path) -> None:
    made = convert("verl", [published.verl("2+3?", "5", "math"), published.verl("add", published.CALL_TESTS, "code")])
    (tmp_path / "out.jsonl").rename(tmp_path / "first.jsonl")
    assert convert.run("canonical", tmp_path / "first.jsonl") == made


def test_real_gsm8k_and_aime(convert, gsm8k: Path, aime24: Path) -> None:
    records = convert.run("gsm8k", gsm8k)
    assert len(records) == 1319
    assert len({record["id"] for record in records}) == 1319
    problems = [json.loads(line) for line in aime24.read_text().splitlines()]
    for record, problem in zip(convert.run("competition", aime24), problems, strict=True):
        assert judge(record, f"\\boxed{{{problem['answer']}}}") == Outcome.CORRECT
    assert all(judge(record, f"\\boxed{{{record['answer']}}}") == Outcome.CORRECT for record in records[:100])


def test_real_humaneval(convert, humaneval: Path) -> None:
    import gzip

    with gzip.open(humaneval, "rt") as file:
        problems = [json.loads(line) for line in file]
    records = convert.run("humaneval", humaneval)
    assert [record["id"] for record in records] == [problem["task_id"] for problem in problems]
    verifier = CodeVerifier(VerifierConfig(timeout_s=20))
    for record, problem in zip(records, problems, strict=True):
        solution = fenced(problem["prompt"] + problem["canonical_solution"])
        verdict = verifier.verify(record["prompt"], solution, record["answer"])
        assert verdict.outcome == Outcome.CORRECT, (record["id"], verdict)


def test_what_is_written_can_be_trained_on(convert, tmp_path: Path, byte_tokenizer) -> None:
    records = convert("verl", [published.verl("2+3?", "5", "math"), published.verl("f", published.CALL_TESTS, "code")])
    columns = ColumnsConfig(id="id")
    reader = PromptReader(tmp_path / "out.jsonl", columns, None, {"math", "code"}, byte_tokenizer(), 4096)
    prompts = read_prompts(reader)
    assert [(prompt.id, prompt.answer) for prompt in prompts] == [(item["id"], item["answer"]) for item in records]
