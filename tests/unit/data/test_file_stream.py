"""A streamed file: every record once an epoch, wherever blocks end, and on from any place."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.config import ColumnsConfig, StreamConfig
from megatron_opd.data import blocks
from megatron_opd.data.blocks import LineBlocks
from megatron_opd.data.file_stream import FileStream
from megatron_opd.data.mixture import MixedStream
from megatron_opd.data.reading import PromptReader
from megatron_opd.data.stream import PromptStream
from megatron_opd.errors import DataError
from megatron_opd.records import Outcome, Prompt


class LetterTokenizer:
    """A token for each letter: making real ones is not what is tested here."""

    def apply_chat_template(self, messages: list[dict], **_: object) -> list[int]:
        return [ord(letter) for letter in messages[-1]["content"]]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LineBlocks.__init__, "__defaults__", (100,))


def record(number: int, domain: str = "math", **more: object) -> dict:
    return {"id": f"p{number}", "prompt": f"question {number}", "answer": str(number), "domain": domain} | more


def write(path: Path, records: list) -> Path:
    texts = [item if isinstance(item, str) else json.dumps(item) for item in records]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def open_file(path: Path, domain: str | None = None, seed: int = 0, takes_bad: bool = True, **options) -> FileStream:
    columns = ColumnsConfig(id="id", repeats=options.pop("repeats", None))
    reader = PromptReader(path, columns, None, {"math", "code"}, LetterTokenizer(), 100)
    stream = StreamConfig(window_mb=2, **options)  # two blocks of 100 bytes
    return FileStream(LineBlocks(path), reader, seed, stream, domain, takes_bad=takes_bad)


def names(prompts: list[Prompt]) -> list[str]:
    return [prompt.id for prompt in prompts]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=25), st.integers(1, 30), st.booleans())
def test_every_line_is_in_one_block(tmp_path_factory, lengths: list[int], block: int, ends: bool) -> None:
    path = tmp_path_factory.mktemp("blocks") / "f.jsonl"
    lines = [f"{'x' * length}{number}".encode() for number, length in enumerate(lengths)]
    path.write_bytes(b"\n".join(lines) + (b"\n" if ends else b""))
    found = LineBlocks(path, block)
    rows = [row for number in range(len(found)) for row in found.lines(number)]
    assert [row.content.rstrip(b"\n") for row in rows] == lines
    assert [found.line(row.number).content for row in rows] == [row.content for row in rows]
    assert [found.line_number(row.number) for row in rows] == list(range(1, len(lines) + 1))


def test_every_record_once_an_epoch_in_another_order(tmp_path: Path, small_blocks: None) -> None:
    stream = open_file(write(tmp_path / "f.jsonl", [record(number) for number in range(50)]))
    epochs = [names(stream.take(50)) for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [sorted(f"p{number}" for number in range(50))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != [f"p{number}" for number in range(50)]
    other = open_file(tmp_path / "f.jsonl", seed=1)
    assert names(other.take(50)) != epochs[0]


def test_a_prompt_is_that_of_reading_the_whole_file(tmp_path: Path, small_blocks: None) -> None:
    path = write(tmp_path / "f.jsonl", [record(number, answer=number) for number in range(20)])
    (prompt,) = [prompt for prompt in open_file(path).take(20) if prompt.id == "p7"]
    assert prompt == Prompt("p7", "math", "question 7", tuple(map(ord, "question 7")), "7")


def test_repeats(tmp_path: Path, small_blocks: None) -> None:
    path = write(tmp_path / "f.jsonl", [record(number, repeats=1 + number % 3) for number in range(30)])
    stream = open_file(path, repeats="repeats")
    for _ in range(2):
        assert Counter(names(stream.take(60))) == {f"p{number}": 1 + number % 3 for number in range(30)}


@pytest.mark.parametrize("position", [0, 1, 3, 49, 50, 51, 173])
@pytest.mark.parametrize("mixed", [False, True])
def test_it_goes_on_from_any_record(tmp_path: Path, small_blocks: None, position: int, mixed: bool) -> None:
    records = [record(number, "code" if number % 3 == 0 else "math") for number in range(50)]
    path = write(tmp_path / "f.jsonl", records)

    def opened() -> FileStream | MixedStream:
        return mix(path, 0.3, 0.7) if mixed else open_file(path)

    first, second = opened(), opened()
    first.take(position)
    second.restore(first.state())
    drawn = first.draw(120)
    assert second.draw(120) == drawn
    assert [second.find(name) for name, _ in drawn] == [prompt for _, prompt in drawn]
    assert first.state().keys() == second.state().keys()
    assert all((value == second.state()[name]).all() for name, value in first.state().items())


def mix(path: Path, code: float, math: float, **options) -> MixedStream:
    parts = [open_file(path, "code", **options), open_file(path, "math", takes_bad=False, **options)]
    return MixedStream(parts, [code, math])


def test_shares_hold_at_every_place_and_each_domain_has_its_epochs(tmp_path: Path, small_blocks: None) -> None:
    path = write(tmp_path / "f.jsonl", [record(number, "math" if number < 40 else "code") for number in range(50)])
    stream = mix(path, 3, 7)
    drawn = stream.take(400)
    code = np.cumsum([prompt.domain == "code" for prompt in drawn])
    assert np.abs(code - 0.3 * np.arange(1, 401)).max() < 1
    own = [prompt.id for prompt in drawn if prompt.domain == "code"]
    assert [sorted(own[start : start + 10]) for start in range(0, 120, 10)] == [
        [f"p{number}" for number in range(40, 50)]
    ] * 12


def test_prompts_in_memory_are_mixed_and_learned_from(tmp_path: Path) -> None:
    prompts = [Prompt(f"p{number}", "math" if number < 8 else "code", "?", (1,), "1") for number in range(10)]

    def mixed() -> MixedStream:
        return MixedStream([PromptStream(prompts[8:], 0), PromptStream(prompts[:8], 0)], [0.5, 0.5])

    stream = mixed()
    assert [prompt.domain for prompt in stream.take(6)] == ["code", "math"] * 3
    stream.observe([("p9", Outcome.CORRECT), ("p0", Outcome.INCORRECT), ("p0", Outcome.UNKNOWN)])
    known = stream.known()
    assert [prompt.id for prompt in known.prompts][:3] == ["p8", "p9", "p0"]
    assert (known.graded.tolist()[:3], known.passes.tolist()[:3]) == ([0, 1, 1], [0, 1, 0])
    again = mixed()
    again.restore(stream.state())
    assert again.draw(20) == stream.draw(20)
    assert again.known().graded.tolist() == known.graded.tolist()


def test_a_bad_record_is_told_with_its_line_and_ends_the_run(tmp_path: Path, small_blocks: None) -> None:
    path = write(tmp_path / "f.jsonl", [*map(record, range(20)), '{"id": "bad"}', *map(record, range(20, 40))])
    with pytest.raises(DataError, match="A record cannot be used: prompt") as caught:
        open_file(path).take(41)
    assert (caught.value.where, "max_bad_share" in caught.value.fix) == (f"{path}:21", True)


@pytest.mark.parametrize("mixed", [False, True])
def test_bad_records_may_be_passed_over(tmp_path: Path, small_blocks: None, mixed: bool, caplog) -> None:
    records: list = [record(number, "code" if number % 2 else "math") for number in range(40)]
    records[7:7] = ["{broken", record(99, "maths")]
    path = write(tmp_path / "f.jsonl", records)
    stream = mix(path, 1, 1, max_bad_share=0.01) if mixed else open_file(path, max_bad_share=0.01)
    with caplog.at_level(logging.WARNING):
        assert sorted(names(stream.take(40))) == sorted(f"p{number}" for number in range(40))
        stream.take(1)  # the first of the next epoch: the bad ones have been met by then
    told = {text.split(": ")[1] for text in caplog.messages}
    assert told == {f"{path}:8", f"{path}:9"}
    assert not mixed or stream.state()["1.cursor"][-1] == 0  # only one of the two meets them
    with pytest.raises(DataError):
        stream.take(1000)  # 10 of 1000 is the limit


def test_a_domain_without_records(tmp_path: Path, small_blocks: None) -> None:
    path = write(tmp_path / "f.jsonl", [record(number) for number in range(30)])
    with pytest.raises(DataError, match="A domain has no prompts"):
        open_file(path, "code", takes_bad=False).take(1)


def test_another_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [record(number) for number in range(5000)])
    first = LineBlocks(path).fingerprint()
    assert LineBlocks(path).fingerprint() == first
    for changed in (4, 2500, 4999):
        write(path, [record(number if number != changed else 7777) for number in range(5000)])
        assert LineBlocks(path).fingerprint() != first


def test_files_that_cannot_be_streamed(tmp_path: Path) -> None:
    for name in ("f.parquet", "f.jsonl.gz", "missing.jsonl"):
        (tmp_path / name).write_bytes(b"x") if "missing" not in name else None
        with pytest.raises(DataError):
            LineBlocks(tmp_path / name)
    with pytest.raises(DataError, match="empty"):
        LineBlocks(write(tmp_path / "f.jsonl", []))


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [record(number, "code" if number % 2 else "math") for number in range(9)])
    memory = PromptStream([Prompt("a", "math", "?", (1,), "1")], 0)
    kinds = [open_file(path), mix(path, 1, 1), memory]
    for stream in kinds:
        for other in kinds:
            if other is not stream:
                with pytest.raises(DataError, match=r"another (kind|mixture)"):
                    stream.restore(other.state())


def test_a_block_is_a_megabyte() -> None:
    assert blocks.BLOCK == 2**20  # window_mb counts blocks
