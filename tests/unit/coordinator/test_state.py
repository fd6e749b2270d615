"""What the coordinator remembers comes back, and a stream goes on as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_opd.config import LazyConfig
from megatron_opd.coordinator.evaluate import Accuracy
from megatron_opd.coordinator.state import STATE, STREAM, Progress, Refreshes, Totals, read, write
from megatron_opd.data.stream import LazyStream, PromptStream, fingerprint
from megatron_opd.errors import CheckpointError, DataError
from megatron_opd.records import Outcome, Prompt
from megatron_opd.runtime.messages import RefreshReport

PROMPTS = [Prompt(f"p{i}", "math", "?", (5, i), str(i), repeats=1 + i % 2) for i in range(7)]
COUNTED = fingerprint(PROMPTS)
PROGRESS = Progress(
    step=3,
    groups=24,
    totals=Totals(40, 30, 20, 10),
    refreshes=Refreshes(4, 1.25, 1e-6),
    evaluations={"before": {"math": Accuracy(3, 10, 1, 99), "code": Accuracy(0, 0, 5, 7)}, "teacher": {}},
    wall_s=12.5,
)


def streams() -> list[PromptStream]:
    return [PromptStream(PROMPTS, 5), LazyStream(PROMPTS, 5, LazyConfig(), None)]


@pytest.mark.parametrize("kind", [0, 1], ids=["shuffled", "lazy"])
def test_the_cursor_and_the_pass_rates_go_on(tmp_path: Path, kind: int) -> None:
    stream, other = streams()[kind], streams()[kind]
    random = np.random.default_rng(0)

    def draw(source: PromptStream, outcomes: np.random.Generator) -> list[str]:
        names = [prompt.id for prompt in source.take(4)]
        source.observe([(name, Outcome(int(outcomes.integers(-1, 2)))) for name in names])
        return names

    for _ in range(5):
        draw(stream, random)
    write(tmp_path / "state", PROGRESS, stream.state(), COUNTED)
    expected = [draw(stream, np.random.default_rng(step)) for step in range(6)]
    progress, state = read(tmp_path / "state", COUNTED)
    other.restore(state)
    assert progress == PROGRESS
    assert [draw(other, np.random.default_rng(step)) for step in range(6)] == expected


def test_it_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    write(folder, PROGRESS, streams()[0].state(), COUNTED)
    write(folder, Progress(step=4), streams()[0].state(), COUNTED)  # a run that was wound back comes here again
    assert read(folder, COUNTED)[0] == Progress(step=4)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_other_prompts_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "state", PROGRESS, streams()[0].state(), COUNTED)
    for others in (PROMPTS[:-1], PROMPTS[::-1], [*PROMPTS[:-1], Prompt("p6", "math", "?", (5, 7), "6")]):
        with pytest.raises(DataError, match="not those that the checkpoint was made with"):
            read(tmp_path / "state", fingerprint(others))


@pytest.mark.parametrize("name", [STATE, STREAM])
@pytest.mark.parametrize("body", [None, b"", b'{"step": 3}'], ids=["gone", "empty", "other"])
def test_a_state_that_cannot_be_read(tmp_path: Path, name: str, body: bytes | None) -> None:
    write(tmp_path / "state", PROGRESS, streams()[0].state(), COUNTED)
    file = tmp_path / "state" / name
    file.unlink() if body is None else file.write_bytes(body)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read(tmp_path / "state", COUNTED)


def test_refreshes_are_counted() -> None:
    found = Refreshes()
    for seconds, difference in ((1.0, 2e-6), (3.0, 1e-6)):
        found.add(RefreshReport(version=0, refresh_s=seconds, refresh_bytes=1, probe_difference=difference))
    assert found == Refreshes(2, 4.0, 2e-6)
