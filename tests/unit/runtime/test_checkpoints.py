"""Checkpoints on disk: complete or not there, the newest whole one is found, and the rest is kept as told."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.errors import CheckpointError
from megatron_opd.runtime.checkpoints import MANIFEST, TRACKER, CheckpointFolder, FileDigest, digest

LAYOUT = {"tensor": 2, "data": 1}


def save(folder: CheckpointFolder, step: int) -> None:
    unfinished = folder.begin(step)
    (unfinished / "coordinator").mkdir()
    (unfinished / "__0_0.distcp").write_bytes(bytes(range(256)) * 20)
    (unfinished / "coordinator" / "state.json").write_text(f"{step}")
    folder.commit(step, "run", LAYOUT, {})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """With checkpoints of steps 5 and 10."""
    made = CheckpointFolder(tmp_path / "checkpoints")
    save(made, 5)
    save(made, 10)
    return made


def test_the_layout_is_megatrons(folder: CheckpointFolder) -> None:
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"iter_0000005", "iter_0000010", "latest_checkpointed_iteration.txt"}
    assert (folder.path / TRACKER).read_text() == "10\n"
    manifest, damaged = folder.newest_whole()
    assert (manifest.run, manifest.step, manifest.layout, damaged) == ("run", 10, LAYOUT, [])
    assert set(manifest.files) == {"__0_0.distcp", "coordinator/state.json"} and manifest.bytes == 5122


def test_until_it_is_committed_there_is_no_checkpoint(folder: CheckpointFolder) -> None:
    (folder.begin(15) / "__0_0.distcp").write_bytes(b"half")
    assert folder.steps() == [5, 10] and (folder.path / TRACKER).read_text() == "10\n"
    assert list(folder.begin(15).iterdir()) == []  # another try starts from nothing
    folder.coordinator_state(15).mkdir()
    folder.abandon(15)
    assert {path.name for path in folder.path.iterdir()} == {"iter_0000005", "iter_0000010", TRACKER}


def test_a_death_between_name_and_tracker_loses_nothing(folder: CheckpointFolder, monkeypatch) -> None:
    monkeypatch.setattr(CheckpointFolder, "point_to", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(folder, 15)
    assert (folder.path / TRACKER).read_text() == "10\n" and folder.newest_whole()[0].step == 15


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda path: (path / "__0_0.distcp").write_bytes(b"short"), "5 bytes"),
        (lambda path: (path / "__0_0.distcp").write_bytes(bytes(5120)), "sha256"),  # same length
        (lambda path: (path / "coordinator" / "state.json").unlink(), "no such file"),
        (lambda path: (path / MANIFEST).unlink(), "No such file"),
        (lambda path: (path / MANIFEST).write_text('{"format": 1, "step": 10'), "Expecting"),
        (lambda path: (path / MANIFEST).write_text('{"format": 9}'), "format 9 instead of 1"),
        (lambda path: (path / MANIFEST).write_bytes((path.parent / "iter_0000005" / MANIFEST).read_bytes()), "got:"),
    ],
)
def test_a_damaged_one_is_passed_over_and_told(folder: CheckpointFolder, spoil, told: str) -> None:
    spoil(folder.folder(10))
    manifest, (error,) = folder.newest_whole()
    assert manifest.step == 5 and told in str(error) and "iter_0000010" in str(error)
    spoil(folder.folder(5)) if told != "got:" else (folder.folder(5) / MANIFEST).unlink()
    manifest, damaged = folder.newest_whole()
    assert manifest is None and len(damaged) == 2


def test_every_single_changed_byte_is_found(folder: CheckpointFolder) -> None:
    file = folder.folder(10) / "__0_0.distcp"
    good = file.read_bytes()
    for position in (0, 2500, len(good) - 1):
        file.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(CheckpointError, match="damaged"):
            folder.check(10)
    file.write_bytes(good)
    assert folder.check(10).step == 10


def test_digests_that_are_known_are_not_computed_again(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    (folder.begin(1) / "a").write_bytes(b"abc")
    known = FileDigest(3, "0" * 64)
    assert folder.commit(1, "run", LAYOUT, {"a": known}).files == {"a": known}
    assert digest(folder.folder(1) / "a").sha256.startswith("ba7816bf")


@pytest.mark.parametrize(
    ("last", "every", "kept"),
    [(1, 0, [10]), (2, 0, [9, 10]), (3, 0, [8, 9, 10]), (1, 4, [4, 8, 10]), (2, 3, [3, 6, 9, 10]), (20, 0, None)],
)
def test_which_are_kept(tmp_path: Path, last: int, every: int, kept: list[int] | None) -> None:
    folder = CheckpointFolder(tmp_path)
    everything = list(range(1, 11))
    for step in everything:
        save(folder, step)
    gone = folder.prune(last, every)
    assert folder.steps() == (kept or everything) and sorted(gone + folder.steps()) == everything
    assert not [path for path in folder.path.iterdir() if path.name.startswith(".")]
