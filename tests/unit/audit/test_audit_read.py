"""Reading trajectories: what stays of them, and what is said of files that cannot be used."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_case import Drawn

from megatron_opd.audit import read
from megatron_opd.audit.read import Rollouts, fetch, read_rollouts, trajectory_files
from megatron_opd.errors import DataError
from megatron_opd.observe.trajectories import SCHEMA, read_trajectories


def same(a: Rollouts, b: Rollouts) -> None:
    for field in fields(Rollouts):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def test_a_row_for_each_rollout_in_the_order_of_the_files(drawn: Drawn) -> None:
    table = read_trajectories(drawn.files[0].parent)
    for name in ("step", "group", "outcome", "state", "domain", "teacher", "reason", "mean_gap", "offset"):
        np.testing.assert_array_equal(getattr(drawn.rollouts, name), table[name].to_numpy(), err_msg=name)
    assert drawn.rollouts.tokens.tolist() == [len(ids) for ids in table["token_ids"].to_pylist()]


@pytest.mark.parametrize("batch", [1, 7, 10_000])
def test_the_size_of_a_batch_changes_nothing(drawn: Drawn, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    monkeypatch.setattr(read, "BATCH", batch)
    same(read_rollouts(drawn.files[:2]), drawn.rollouts.take(drawn.rollouts.file < 2))


def test_fetched_rows_are_the_ones_that_were_asked_for(drawn: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BATCH", 10)
    table = read_trajectories(drawn.files[0].parent).to_pylist()
    chosen = [0, 9, 10, 95, 96, 97, len(table) - 1]
    found = fetch(drawn.files, drawn.rollouts, chosen)
    assert sorted(found) == chosen
    for index in chosen:
        assert str(found[index]) == str(table[index])  # as text: nan equals nan there


def test_an_empty_response_and_an_all_masked_one_can_be_read(drawn: Drawn, tmp_path: Path) -> None:
    row = next(row for row in read_trajectories(drawn.files[0].parent).to_pylist() if row["teacher"])
    nothing = row | {name: [] for name in ("token_ids", "student_logprobs", "teacher_logprobs", "gaps", "mask")}
    masked = row | {"mask": [False] * len(row["mask"]), "mean_gap": float("nan")}
    pq.write_table(pa.Table.from_pylist([nothing, masked, row], schema=SCHEMA), tmp_path / "step_000001.parquet")
    found = read_rollouts(trajectory_files(tmp_path))
    assert found.tokens.tolist() == [0, len(row["mask"]), len(row["mask"])]
    assert found.masked_tokens.tolist()[:2] == [0, len(row["mask"])]
    assert found.depth_counts[:2].sum() == 0 and found.depth_counts[2].sum() == sum(row["mask"])
    assert np.isnan(found.mean_gap[1]) and found.repetition[0] == 0


@pytest.mark.parametrize("folder", ["missing", "there"])
def test_a_run_without_trajectories_is_told(tmp_path: Path, folder: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(DataError) as error:
        trajectory_files(tmp_path / folder)
    assert "record.trajectories_every" in error.value.fix and error.value.where == tmp_path / folder


def test_files_without_a_rollout_are_told(tmp_path: Path) -> None:
    pq.write_table(SCHEMA.empty_table(), tmp_path / "step_000001.parquet")
    with pytest.raises(DataError, match="no rollout"):
        read_rollouts(trajectory_files(tmp_path))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
def test_a_truncated_file_is_told(drawn: Drawn, tmp_path: Path, kept: float) -> None:
    whole = drawn.files[0].read_bytes()
    cut = tmp_path / "step_000001.parquet"
    cut.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(DataError) as error:
        read_rollouts([cut])
    assert error.value.where == cut and error.value.expected and error.value.fix


def test_a_file_with_damage_inside_is_told(drawn: Drawn, tmp_path: Path) -> None:
    damaged = bytearray(drawn.files[0].read_bytes())
    damaged[2000:60_000:50] = b"\xff" * len(damaged[2000:60_000:50])
    path = tmp_path / "step_000001.parquet"
    path.write_bytes(damaged)
    with pytest.raises(DataError) as error:
        read_rollouts([path])
    assert error.value.where == path


def test_a_foreign_parquet_file_is_told(drawn: Drawn, tmp_path: Path) -> None:
    shutil.copy(drawn.files[0], tmp_path)
    table = pq.read_table(drawn.files[0]).drop_columns(["gaps"])
    table = table.set_column(0, "step", pa.array(["1"] * len(table)))
    foreign = tmp_path / "step_000002.parquet"
    pq.write_table(table, foreign)
    with pytest.raises(DataError) as error:
        read_rollouts(trajectory_files(tmp_path))
    assert error.value.where == foreign
    assert error.value.got == "step: string; gaps: missing"
    assert error.value.expected.startswith("step: int32; gaps: list")
