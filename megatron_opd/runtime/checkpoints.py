"""Checkpoints on disk: where they lie, whether they are whole, and which are kept. Needs no torch.

    checkpoints/
      iter_0000010/                       one checkpoint: what Megatron's dist_checkpointing writes, and beside it
        coordinator/                      the coordinator's state
        manifest.json                     sizes and checksums of all other files, written last
      latest_checkpointed_iteration.txt   the newest one's number, for Megatron's own tools

A folder gets its name in one rename when everything is in it, and only then the number is changed: whatever dies, and
whenever, the newest ``iter_*`` that agrees with its manifest is a state that the run was in.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import CheckpointError

TRACKER = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
COORDINATOR = "coordinator"  # folder within a checkpoint
RELEASE = "release"  # what Megatron's tools call a checkpoint of weights alone, of no step
FORMAT = 1
_NAME = re.compile(r"iter_(\d{7,})")


@dataclass(frozen=True)
class FileDigest:
    """What a file must be like."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself."""

    run: str  # id of the run that wrote it
    step: int  # optimizer steps behind it
    layout: dict[str, int]  # parallel sizes of the ranks that wrote it
    files: dict[str, FileDigest]  # all but the manifest, by path within the folder

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.bytes for file in self.files.values())


def digest(path: Path) -> FileDigest:
    """Size and checksum of a file. Cost: reads all of it, and lets other threads run meanwhile."""
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
    return FileDigest(path.stat().st_size, checksum)


def write_manifest(
    folder: Path, run: str, step: int, layout: dict[str, int], known: Mapping[str, FileDigest] | None = None
) -> Manifest:
    """Complete the checkpoint in ``folder``.

    known: digests that were computed already, by path within the folder; those of other files are computed here.
    """
    known = known or {}
    paths = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    files = {name: known[name] if name in known else digest(folder / name) for name in paths}
    manifest = Manifest(run, step, layout, files)
    _write(folder / MANIFEST, _encode(manifest))
    _sync_folder(folder)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """What the checkpoint in ``folder`` should be. Raises CheckpointError when that cannot be read."""
    path = folder / MANIFEST
    try:
        return _decode(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("The manifest cannot be read", where=path, got=error) from error


def check_files(folder: Path) -> Manifest:
    """Compare all files with the manifest. Raises CheckpointError that names the first difference.

    Cost: reads the whole checkpoint once, several files at a time.
    """
    manifest = read_manifest(folder)
    for name, file in manifest.files.items():  # sizes first: they cost nothing
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != file.bytes:
            got = "no such file" if size is None else f"{size} bytes"
            raise CheckpointError("A file is damaged", where=folder / name, got=got, expected=f"{file.bytes} bytes")
    with ThreadPoolExecutor(max_workers=8) as pool:
        found = pool.map(lambda name: digest(folder / name).sha256, manifest.files)
        for (name, file), checksum in zip(manifest.files.items(), found, strict=True):
            if checksum != file.sha256:
                got, expected = f"sha256 {checksum[:16]}...", f"{file.sha256[:16]}..."
                raise CheckpointError("A file is damaged", where=folder / name, got=got, expected=expected)
    return manifest


def point_tracker(path: Path, to: str) -> None:
    """Let the tracker in the folder ``path`` name a checkpoint, in one rename."""
    temporary = path / f".{TRACKER}"
    _write(temporary, f"{to}\n")
    temporary.rename(path / TRACKER)
    _sync_folder(path)


class CheckpointFolder:
    """``checkpoints/`` of one run. One process at a time writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def folder(self, step: int) -> Path:
        """The checkpoint of that step."""
        return self.path / f"iter_{step:07d}"

    def unfinished(self, step: int) -> Path:
        """Where that checkpoint is written."""
        return self.path / f".unfinished_iter_{step:07d}"

    def coordinator_state(self, step: int) -> Path:
        """Where the coordinator leaves its state of that step for the one who writes the checkpoint."""
        return self.path / f".coordinator_{step:07d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints, oldest first, whole or not."""
        names = [_NAME.fullmatch(path.name) for path in self.path.glob("iter_*") if path.is_dir()]
        return sorted(int(name[1]) for name in names if name)

    # ------------------------------------------------------------------ writing

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of ``step`` to."""
        folder = self.unfinished(step)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def commit(self, step: int, run: str, layout: dict[str, int], known: Mapping[str, FileDigest]) -> Manifest:
        """Give the complete folder of ``step`` its name and move the tracker.

        known: digests that were computed already, by path within the folder; those of other files are computed here.
        """
        folder, target = self.unfinished(step), self.folder(step)
        manifest = write_manifest(folder, run, step, layout, known)
        if target.exists():  # a run that was wound back comes here again
            self._remove(target)
        folder.rename(target)
        _sync_folder(self.path)
        self.point_to(step)
        return manifest

    def abandon(self, step: int) -> None:
        """Forget what was written of ``step`` so far."""
        shutil.rmtree(self.unfinished(step), ignore_errors=True)
        shutil.rmtree(self.coordinator_state(step), ignore_errors=True)

    def point_to(self, step: int) -> None:
        """Set the tracker."""
        point_tracker(self.path, str(step))

    def prune(self, keep_last: int, keep_every: int) -> list[int]:
        """Remove all but the newest ``keep_last`` and those of every ``keep_every`` steps (0: none). Returns them."""
        gone = [step for step in self.steps()[:-keep_last] if not keep_every or step % keep_every]
        for step in gone:
            self._remove(self.folder(step))
        return gone

    def _remove(self, folder: Path) -> None:
        doomed = folder.with_name(f".removed_{folder.name}")  # half of a checkpoint must not look like one
        shutil.rmtree(doomed, ignore_errors=True)
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    # ------------------------------------------------------------------ reading

    def manifest(self, step: int) -> Manifest:
        """What the checkpoint of ``step`` should be. Raises CheckpointError when that cannot be read."""
        return read_manifest(self.folder(step))

    def check(self, step: int) -> Manifest:
        """``check_files`` of the checkpoint of ``step``."""
        folder = self.folder(step)
        manifest = self.manifest(step)
        if manifest.step != step:
            raise CheckpointError("The manifest is another step's", where=folder, got=manifest.step, expected=step)
        return check_files(folder)

    def newest_whole(self) -> tuple[Manifest | None, list[CheckpointError]]:
        """The newest checkpoint that is whole, or None; and what is wrong with each newer one, newest first."""
        damaged: list[CheckpointError] = []
        for step in reversed(self.steps()):
            try:
                return self.check(step), damaged
            except CheckpointError as error:
                damaged.append(error)
        return None, damaged


def _encode(manifest: Manifest) -> str:
    files = {name: [file.bytes, file.sha256] for name, file in manifest.files.items()}
    plain = {"format": FORMAT, "run": manifest.run, "step": manifest.step, "layout": manifest.layout, "files": files}
    return json.dumps(plain, indent=1) + "\n"


def _decode(text: str) -> Manifest:
    plain = json.loads(text)
    if plain["format"] != FORMAT:
        raise ValueError(f"format {plain['format']} instead of {FORMAT}")
    files = {name: FileDigest(int(size), str(checksum)) for name, (size, checksum) in plain["files"].items()}
    return Manifest(str(plain["run"]), int(plain["step"]), dict(plain["layout"]), files)


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
