"""Files of a refresh: whole or not there, and a full disk is told before any engine hears of new weights."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import EngineError, RefreshError
from megatron_opd.student.transports import Place
from megatron_opd.student.transports import disk as transport
from megatron_opd.student.transports.disk import Disk

SIZE = 1 << 20  # of the small file system


class Engine:
    """Takes or refuses; remembers what was there when it was asked."""

    url = "http://engine"

    def __init__(self, *, refuses: bool = False) -> None:
        self.refuses = refuses
        self.loaded: list[tuple[str, int, list[str]]] = []

    async def load_folder(self, folder: Path, *, flush: bool, version: int) -> None:
        self.loaded.append((folder.name, version, sorted(path.name for path in folder.iterdir())))
        if self.refuses:
            raise EngineError("no")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(folder)], check=False, capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip("a file system can only be mounted by root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def disk(folder: Path, bucket_mb: int = 1, recovery_s: float = 0.001) -> Disk:
    config = RefreshConfig(mode="disk", bucket_mb=bucket_mb, recovery_s=recovery_s)
    return Disk(config, Place("127.0.0.1", 1, folder / "weights"))


def tensors(*sizes: int) -> dict[str, torch.Tensor]:
    return {f"part.{number}": torch.rand(size // 4) for number, size in enumerate(sizes)}


async def test_every_version_is_whole_when_engines_hear_of_it_and_old_ones_go(tmp_path: Path) -> None:
    engine, way = Engine(), disk(tmp_path)
    weights = tensors(700_000, 700_000, 2_000_000)
    for version in (1, 2):
        sent = await way.send([engine], iter(weights.items()), version, flush=True)
        assert sent.failed == {} and sent.bytes == sum(tensor.nbytes for tensor in weights.values())
    files = [f"weights-{number:05d}.safetensors" for number in (1, 2, 3)]
    assert engine.loaded == [("version_000001", 1, files), ("version_000002", 2, files)]
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["version_000002"]
    found = {}
    for file in files:
        found |= load_file(tmp_path / "weights" / "version_000002" / file)
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)


async def test_an_old_version_stays_until_all_engines_have_the_new_one(tmp_path: Path) -> None:
    good, bad, way = Engine(), Engine(refuses=True), disk(tmp_path)
    await way.send([good], iter(tensors(8).items()), 1, flush=True)
    sent = await way.send([good, bad], iter(tensors(8).items()), 2, flush=True)
    assert list(sent.failed) == [bad]
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["version_000001", "version_000002"]


async def test_what_a_killed_run_left_is_replaced(tmp_path: Path) -> None:
    for name in ("version_000001", ".version_000001.partial"):
        (tmp_path / "weights" / name).mkdir(parents=True)
        (tmp_path / "weights" / name / "weights-00009.safetensors").touch()
    engine = Engine()
    await disk(tmp_path).send([engine], iter(tensors(8).items()), 1, flush=True)
    assert engine.loaded == [("version_000001", 1, ["weights-00001.safetensors"])]


async def test_weights_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.rand(8)
    await disk(tmp_path).send([], iter({"a": whole[:4], "b": whole[4:], "c": whole}.items()), 1, flush=True)
    found = load_file(tmp_path / "weights" / "version_000001" / "weights-00001.safetensors")
    assert torch.equal(torch.cat([found["a"], found["b"]]), found["c"])


@pytest.mark.parametrize("last", ["more than there is", "all there is"])
async def test_a_full_disk_names_the_place_and_no_engine_is_asked(small_disk: Path, last: str) -> None:
    """Also when only the file's header is too much, which the system tells while it is written."""
    engine, way = Engine(), disk(small_disk)
    await way.send([engine], iter(tensors(8).items()), 1, flush=True)
    free = os.statvfs(small_disk).f_bfree * os.statvfs(small_disk).f_bsize
    size = SIZE + 4096 if last == "more than there is" else free
    with pytest.raises(RefreshError, match="disk is full") as caught:
        await way.send([engine], iter(tensors(size).items()), 2, flush=True)
    said = str(caught.value)
    assert "version_000002" in said and f"{size:,} for the next file" in said and "bytes free" in said
    assert [version for _, version, _ in engine.loaded] == [1]
    assert [path.name for path in (small_disk / "weights").iterdir()] == ["version_000001"]


async def test_a_full_disk_is_waited_for(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, way = Engine(), disk(small_disk, recovery_s=60.0)
    (small_disk / "other").write_bytes(bytes(SIZE // 2))
    monkeypatch.setattr(transport.time, "sleep", lambda _: (small_disk / "other").unlink())
    sent = await way.send([engine], iter(tensors(SIZE * 3 // 4).items()), 1, flush=True)
    assert sent.failed == {} and engine.loaded == [("version_000001", 1, ["weights-00001.safetensors"])]


def test_the_engine_of_this_test_has_the_real_ones_method() -> None:
    assert WeightClient.load_folder.__annotations__ == Engine.load_folder.__annotations__
