"""Weights by files: a folder for each version, complete when it has its name, on a file system that all engines see."""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import RefreshError
from megatron_opd.student.shards import write_safetensors
from megatron_opd.student.transports.base import NamedTensors, Sent, Transport, buckets, each

logger = logging.getLogger(__name__)
PAUSE_S = 1.0  # between two looks at a full disk


class DiskFull(RefreshError):
    """There is no room for the new weights."""


class Disk(Transport):
    """A file for each bucket. A version's folder goes when all engines that could be reached have a newer one."""

    async def send(
        self, engines: Sequence[WeightClient], weights: Iterator[tuple[str, torch.Tensor]], version: int, *, flush: bool
    ) -> Sent:
        folder = self._place.folder.absolute() / f"version_{version:06d}"
        size = self._write(folder, weights)
        failed = await each(engines, lambda engine: engine.load_folder(folder, flush=flush, version=version))
        if not failed:
            for other in folder.parent.glob("version_*"):
                if other != folder:
                    shutil.rmtree(other)
        return Sent(size, failed)

    def _write(self, folder: Path, weights: Iterator[tuple[str, torch.Tensor]]) -> int:
        """Fill the folder, which is there in one rename; its bytes. Raises RefreshError, and leaves nothing behind."""
        partial = folder.with_name(f".{folder.name}.partial")
        for old in (partial, folder):  # of a run that was killed, or of a second attempt
            if old.exists():
                shutil.rmtree(old)
        partial.mkdir(parents=True)
        written = 0
        try:
            for number, (bucket, _) in enumerate(buckets(weights, self._config.bucket_bytes), 1):
                path = partial / f"weights-{number:05d}.safetensors"
                written += _write_when_there_is_room(path, bucket, written, self._config.recovery_s)
        except BaseException:
            shutil.rmtree(partial)
            raise
        partial.rename(folder)
        return written


def _write_when_there_is_room(path: Path, bucket: NamedTensors, before: int, wait_s: float) -> int:
    """The file's bytes. Waits in place, and the other ranks with it: no engine has heard of this version yet."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return _write_bucket(path, bucket, before)
        except DiskFull as error:
            if time.monotonic() >= deadline:
                raise
            logger.warning("%s; waiting for at most %g s", error, wait_s)
            path.unlink(missing_ok=True)
            time.sleep(PAUSE_S)


def _write_bucket(path: Path, bucket: NamedTensors, before: int) -> int:
    size = sum(tensor.nbytes for _, tensor in bucket)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise _full(path, size, free, before)
    try:
        write_safetensors(path, bucket)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise _full(path, size, shutil.disk_usage(path.parent).free, before) from error
        raise RefreshError("The new weights cannot be written", where=path, got=error) from error
    return size


def _full(path: Path, size: int, free: int, before: int) -> DiskFull:
    return DiskFull(
        "The disk is full: the new weights cannot be written, and the engines keep the old ones",
        where=path,
        got=f"{free:,} bytes free after {before:,} bytes of this version",
        expected=f"at least {size:,} for the next file",
        fix="make room, or set refresh.folder to another file system that the engines see",
    )
