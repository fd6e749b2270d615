import gzip
import json
import time
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megatron_opd.config import ColumnsConfig
from megatron_opd.data.reading import PromptReader, read_prompts
from megatron_opd.errors import DataError

GOOD = {"prompt": "Compute 2 + 3.", "answer": "5", "domain": "math"}


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer):
    return byte_tokenizer()


@pytest.fixture
def read(tokenizer, tmp_path):
    """Reads a file, or records written as JSON lines (text goes into the file as it is)."""

    def reading(source, columns=None, default_domain=None, limit=200):
        path = source
        if not isinstance(source, Path):
            path = tmp_path / "p.jsonl"
            lines = [item if isinstance(item, str) else json.dumps(item) for item in source]
            path.write_text("".join(f"{line}\n" for line in lines))
        domains = {"math", "code"}
        return read_prompts(PromptReader(path, columns or ColumnsConfig(), default_domain, domains, tokenizer, limit))

    return reading


@pytest.fixture
def refused(read):
    def reading(*arguments, **options) -> DataError:
        with pytest.raises(DataError) as caught:
            read(*arguments, **options)
        return caught.value

    return reading


def test_a_line_becomes_a_prompt(read, tokenizer):
    (prompt,) = read([GOOD])
    assert (prompt.id, prompt.domain, prompt.text, prompt.answer) == ("p.jsonl:1", "math", "Compute 2 + 3.", "5")
    assert tokenizer.decode(prompt.token_ids) == "<|im_start|>user\nCompute 2 + 3.<|im_end|>\n<|im_start|>assistant\n"
    assert all(type(token) is int for token in prompt.token_ids)


def test_messages(read, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    (prompt,) = read([{**GOOD, "prompt": messages}])
    assert prompt.text == "Hi"
    assert tokenizer.decode(prompt.token_ids).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi"
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("05", "05"), (5, "5"), (5.0, "5"), (0.5, "0.5"), (-3, "-3"), (10**400, str(10**400)), ({"a": [1]}, '{"a": [1]}')],
)
def test_answers_become_strings(read, answer, expected):
    assert read([{**GOOD, "answer": answer}])[0].answer == expected


@pytest.mark.parametrize(
    ("answer", "got"),
    [
        (None, "null"),
        (True, "a boolean: True"),
        ([1], "a list: [1]"),
        (float("nan"), "a number: nan"),
    ],
)
def test_answers_refused(refused, answer, got):
    error = refused([GOOD, {**GOOD, "answer": answer}])
    assert error.what == "A record cannot be used: answer"
    assert str(error.where).endswith("p.jsonl:2")
    assert (error.got, error.expected) == (got, "a string, a number or an object")


def test_columns_and_default_domain(read):
    columns = ColumnsConfig(prompt="question", answer="gold", domain="area", id="key")
    records = [{"question": "a", "gold": 1, "key": "x"}, {"question": "b", "gold": 2, "key": 7, "area": "code"}]
    prompts = read(records, columns, default_domain="math")
    assert [(p.id, p.domain, p.answer) for p in prompts] == [("x", "math", "1"), ("7", "code", "2")]


def test_gzip_and_a_blank_last_line(read, tmp_path):
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(f"{json.dumps(GOOD)}\r\n{json.dumps(GOOD)}\n\n".encode()))
    assert [prompt.id for prompt in read(path)] == ["p.jsonl.gz:1", "p.jsonl.gz:2"]
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read"):
        read(path)


def test_parquet(read, refused, tmp_path):
    path = tmp_path / "p.parquet"
    conversation = [{"role": "user", "content": "Hi"}]
    tests = {"fn_name": "f", "inputs": [[1]], "outputs": [1]}
    table = {"prompt": [conversation] * 2, "answer": [tests] * 2, "domain": ["code", "nope"], "other": [0, 0]}
    parquet.write_table(pyarrow.table(table), path)
    error = refused(path)
    assert (error.where, error.got, error.expected) == (f"{path}:2", "'nope'", "one of code, math")
    parquet.write_table(pyarrow.table(table).slice(0, 1), path)
    (prompt,) = read(path)
    assert (prompt.id, prompt.text, json.loads(prompt.answer)) == ("p.parquet:1", "Hi", tests)
    error = refused(path, ColumnsConfig(prompt="question"))
    assert error.what == "The prompt file has no column 'question'"
    assert error.got == "prompt, answer, domain, other"
    path.write_bytes(b"no parquet")
    assert refused(path).expected == "a parquet file"


def test_files_refused(refused, tmp_path):
    assert refused(tmp_path / "nowhere.jsonl").what == "No such prompt file"
    assert refused([]).what == "The prompt file is empty"
    (tmp_path / "p.csv").write_text("a,b")
    error = refused(tmp_path / "p.csv")
    assert (error.got, error.expected) == (".csv", ".jsonl, .jsonl.gz, .parquet")


@pytest.mark.parametrize(
    ("line", "got"),
    [
        ('{"prompt": "a", "answer": }', "Expecting value at column 27: {"),
        ('{"prompt": "a"', "Expecting ',' delimiter at column 15: {"),
        ("", "a blank line"),
        ("[1]", "a list"),
        ("[" * 5000, "maximum recursion depth"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_malformed_lines(refused, line, got):
    error = refused([GOOD, line, GOOD])
    assert str(error.where).endswith("p.jsonl:2")
    assert str(error.got).startswith(got)
    assert error.expected == "one JSON object"


def test_a_long_malformed_line_is_clipped(refused):
    error = refused(['{"prompt": "' + "x" * 500 + '", "answer" 1' + " " * 500 + "}"])
    assert len(error.got) < 120
    assert '"answer" 1' in error.got


def test_text_that_is_not_utf8(refused, tmp_path):
    (tmp_path / "p.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xff"}\n')
    error = refused(tmp_path / "p.jsonl")
    assert (error.where, error.got) == (f"{tmp_path / 'p.jsonl'}:2", "byte 0xff at column 13")


@pytest.mark.parametrize(
    ("change", "got", "expected"),
    [
        ({"prompt": 7}, "a number: 7", "a string or a list of messages"),
        ({"prompt": " \n"}, "an empty prompt", "some text"),
        ({"prompt": []}, "no messages", "a last message of 'user'"),
        ({"prompt": ["Hi"]}, "'Hi'", "messages with role and content, both strings"),
        (
            {"prompt": [{"role": "assistant", "content": "Hi"}]},
            "a last message of 'assistant'",
            "a last message of 'user'",
        ),
        ({"prompt": "x" * 200}, "219 tokens", "at most 200"),
        ({"domain": "maths"}, "'maths'", "one of code, math"),
        ({"domain": None}, "null", "a domain"),
    ],
)
def test_fields_refused(refused, change, got, expected):
    error = refused([GOOD, GOOD, {**GOOD, **change}])
    assert str(error.where).endswith("p.jsonl:3")
    assert error.what == f"A record cannot be used: {next(iter(change))}"
    assert (error.got, error.expected) == (got, expected)
    assert error.fix


@pytest.mark.parametrize("column", ["prompt", "answer", "domain"])
def test_missing_fields(refused, column):
    error = refused([{key: value for key, value in GOOD.items() if key != column}])
    assert (error.what, error.got) == (f"A record cannot be used: {column}", "nothing")


def test_messages_that_the_template_refuses(refused):
    roles = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]
    error = refused([{**GOOD, "prompt": roles}])
    assert error.got == "TemplateError: system comes first"


def test_duplicate_ids(refused):
    error = refused([{**GOOD, "id": "a"}, {**GOOD, "id": "b"}, {**GOOD, "id": "a"}], ColumnsConfig(id="id"))
    assert str(error.where).endswith("p.jsonl:3")
    assert (error.got, error.expected) == ("'a'", "an id of its own; row 1 has it too")


def test_all_flaws_are_told_at_once(refused):
    bad = {**GOOD, "domain": "x"}
    error = refused([GOOD, bad, "{", {**GOOD, "answer": None}, GOOD])
    assert error.what == "3 of 5 records cannot be used"
    rows = error.got.strip().split("\n")
    assert [row.split("p.jsonl:")[1][0] for row in rows] == ["2", "3", "4"]
    assert rows[0].endswith("p.jsonl:2: domain: got 'x', expected one of code, math")
    assert rows[2].endswith("p.jsonl:4: answer: got null, expected a string, a number or an object")
    error = refused([bad] * 25)
    assert error.what == "25 of 25 records cannot be used"
    assert error.got.count("p.jsonl:") == 10
    assert error.got.endswith("... and 15 more")


def test_gsm8k(read, gsm8k):
    started = time.monotonic()
    prompts = read(gsm8k, ColumnsConfig(prompt="question", answer="answer", domain=None), "math", limit=2000)
    assert time.monotonic() - started < 3
    assert len(prompts) == 1319
    assert prompts[0].text.startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert prompts[0].answer.endswith("#### 18")
    assert {prompt.domain for prompt in prompts} == {"math"}


def test_repeats(read):
    rows = [{**GOOD, "repeats": 3, "times": 2}, {**GOOD, "repeats": 1, "times": 1}]
    assert [prompt.repeats for prompt in read(rows)] == [1, 1]
    assert [prompt.repeats for prompt in read(rows, ColumnsConfig(repeats="repeats"))] == [3, 1]
    assert [prompt.repeats for prompt in read(rows, ColumnsConfig(repeats="times"))] == [2, 1]


@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, [1]])
def test_repeats_that_are_no_count(refused, value):
    error = refused([GOOD | {"repeats": 1}, GOOD | {"repeats": value}], ColumnsConfig(repeats="repeats"))
    assert error.where.endswith("p.jsonl:2") and "repeats" in str(error) and error.expected == "a whole number >= 1"


def test_no_repeats(refused, tmp_path):
    columns = ColumnsConfig(repeats="repeats")
    error = refused([GOOD], columns)
    assert error.where.endswith("p.jsonl:1") and error.got == "nothing" and "data.columns" in error.fix
    path = tmp_path / "p.parquet"
    parquet.write_table(pyarrow.table({name: [value] for name, value in GOOD.items()}), path)
    assert "no column 'repeats'" in str(refused(path, columns))
