"""A streamed parquet file: what holds of one of JSON lines, and never more row groups in memory than were allowed."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opd.config import ColumnsConfig, StreamConfig
from megatron_opd.data import row_groups
from megatron_opd.data.file_stream import FileStream
from megatron_opd.data.mixture import MixedStream
from megatron_opd.data.reading import PromptReader, read_prompts
from megatron_opd.data.row_groups import RowGroups
from megatron_opd.errors import DataError

COLUMNS = ["prompt", "answer", "domain", "id"]
ROWS, GROUP = 50, 7
WINDOW_MB = 2


class LetterTokenizer:
    """A token for each letter: making real ones is not what is tested here."""

    def apply_chat_template(self, messages: list[dict], **_: object) -> list[int]:
        return [ord(letter) for letter in messages[-1]["content"]]


@pytest.fixture
def megabyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """A megabyte of so few bytes that two of them hold two row groups of the files here."""
    monkeypatch.setattr(row_groups, "MEGABYTE", 700)


def record(number: int) -> dict:
    letters = "".join(random.Random(number).choices("abcdefgh", k=40))  # nothing that is stored once for all rows
    text = f"question {number} {letters}"
    domain = "code" if number % 3 == 0 else "math"
    return {"id": f"p{number}", "prompt": text, "answer": str(number), "domain": domain, "repeats": 1 + number % 2}


def write(path: Path, records: list[dict] | None = None, group: int = GROUP) -> Path:
    rows = [record(number) for number in range(ROWS)] if records is None else records
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group, compression="none")
    return path


def open_file(path: Path, domain: str | None = None, takes_bad: bool = True, repeats: str | None = None) -> FileStream:
    columns = ColumnsConfig(id="id", repeats=repeats)
    reader = PromptReader(path, columns, None, {"math", "code"}, LetterTokenizer(), 100)
    groups = RowGroups(path, COLUMNS + ([repeats] if repeats else []), WINDOW_MB)
    return FileStream(groups, reader, 0, StreamConfig(window_mb=WINDOW_MB), domain, takes_bad=takes_bad)


def test_every_row_once_an_epoch_in_another_order(tmp_path: Path, megabyte: None) -> None:
    path = write(tmp_path / "f.parquet")
    stream = open_file(path)
    epochs = [[prompt.id for prompt in stream.take(ROWS)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(f"p{number}" for number in range(ROWS))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    whole = read_prompts(PromptReader(path, ColumnsConfig(id="id"), None, {"math", "code"}, LetterTokenizer(), 100))
    assert sorted(open_file(path).take(ROWS), key=lambda prompt: int(prompt.id[1:])) == whole


def test_no_more_is_in_memory_than_a_window(tmp_path: Path, megabyte: None, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = RowGroups(write(tmp_path / "f.parquet"), COLUMNS, WINDOW_MB)
    reads: list[int] = []
    read = groups._file.read_row_group
    monkeypatch.setattr(
        groups._file, "read_row_group", lambda number, **more: reads.append(number) or read(number, **more)
    )
    reader = PromptReader(tmp_path, ColumnsConfig(id="id"), None, {"math", "code"}, LetterTokenizer(), 100)
    stream = FileStream(groups, reader, 0, StreamConfig(window_mb=WINDOW_MB))
    for _ in range(ROWS):
        stream.take(1)
        assert sum(groups._bytes[number] for number in groups._held) <= WINDOW_MB * row_groups.MEGABYTE
    assert sorted(reads) == list(range(len(groups)))  # each once
    assert max(len(window) for window in groups.windows(np.arange(len(groups)), WINDOW_MB)) == 2


@pytest.mark.parametrize("position", [0, 1, 6, 7, 13, 49, 50, 51, 173])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_goes_on_from_any_row(tmp_path: Path, megabyte: None, position: int, mixed: bool) -> None:
    path = write(tmp_path / "f.parquet")

    def opened() -> FileStream | MixedStream:
        if not mixed:
            return open_file(path)
        return MixedStream([open_file(path, "code"), open_file(path, "math", takes_bad=False)], [0.3, 0.7])

    first, second = opened(), opened()
    first.take(position)
    second.restore(first.state())
    drawn = first.draw(120)
    assert second.draw(120) == drawn
    assert [second.find(name) for name, _ in drawn] == [prompt for _, prompt in drawn]
    assert all((value == second.state()[name]).all() for name, value in first.state().items())


def test_repeats(tmp_path: Path, megabyte: None) -> None:
    stream = open_file(write(tmp_path / "f.parquet"), repeats="repeats")
    drawn = Counter(prompt.id for prompt in stream.take(75))
    assert drawn == {f"p{number}": 1 + number % 2 for number in range(ROWS)}


def test_chat_messages_are_read_from_nested_columns(tmp_path: Path) -> None:
    rows = [record(number) | {"prompt": [{"role": "user", "content": f"q{number}"}]} for number in range(20)]
    stream = open_file(write(tmp_path / "f.parquet", rows))
    assert {prompt.text for prompt in stream.take(20)} == {f"q{number}" for number in range(20)}


def test_a_bad_row_is_told_with_its_number(tmp_path: Path, megabyte: None) -> None:
    rows = [record(number) for number in range(ROWS)]
    rows[20]["domain"] = "maths"
    with pytest.raises(DataError, match="A record cannot be used: domain") as caught:
        open_file(write(tmp_path / "f.parquet", rows)).take(ROWS + 1)
    assert caught.value.where == f"{tmp_path / 'f.parquet'}:21"


def test_a_row_group_that_does_not_fit_is_refused_with_the_size_that_does(tmp_path: Path, megabyte: None) -> None:
    path = write(tmp_path / "f.parquet", group=ROWS)
    with pytest.raises(DataError, match="too large to be streamed") as caught:
        RowGroups(path, COLUMNS, WINDOW_MB)
    needed = int(caught.value.got.split()[0])
    assert f"data.stream.window_mb={needed}," in caught.value.fix
    assert len(RowGroups(path, COLUMNS, needed)) == 1
    with pytest.raises(DataError, match="too large"):
        RowGroups(path, COLUMNS, needed - 1)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    whole = write(tmp_path / "f.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.parquet").touch()
    (tmp_path / "folder.parquet").mkdir()
    for name in ("cut", "empty", "folder", "missing"):
        with pytest.raises(DataError, match=r"cannot be read|No such prompt file"):
            RowGroups(tmp_path / f"{name}.parquet", COLUMNS, WINDOW_MB)
    with pytest.raises(DataError, match="no column 'question'"):
        RowGroups(tmp_path / "f.parquet", ["question"], WINDOW_MB)
    pq.write_table(pa.Table.from_pylist([record(0)]).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(DataError, match="empty"):
        RowGroups(tmp_path / "none.parquet", COLUMNS, WINDOW_MB)


def test_damage_inside_is_told_where_it_is(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet")
    content = bytearray(path.read_bytes())
    content[4:200] = b"\xff" * 196  # the first row group's pages
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read(.|\n)*row group 0"):
        open_file(path).take(ROWS)


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "f.parquet")
    first = RowGroups(path, COLUMNS, WINDOW_MB).fingerprint()
    assert RowGroups(path, COLUMNS, WINDOW_MB).fingerprint() == first
    write(path, [record(number if number != 30 else 31) for number in range(ROWS)])
    assert RowGroups(path, COLUMNS, WINDOW_MB).fingerprint() != first
