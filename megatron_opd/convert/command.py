"""``megatron-opd convert to-megatron`` and ``convert to-hf``.

The result is made under another name beside its own and gets its own in one rename, when it is complete.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_opd.convert.checks import check_to_hf, check_to_megatron
from megatron_opd.convert.console import ConversionConsole
from megatron_opd.convert.ranks import Converted, run_ranks
from megatron_opd.errors import ProcessError
from megatron_opd.runtime.checkpoints import RELEASE, point_tracker, write_manifest
from megatron_opd.runtime.conversion import ConversionJob
from megatron_opd.runtime.supervision import signals_raise


def to_megatron(source: Path, out: Path, options: list[str], console: ConversionConsole) -> Converted:
    """Write the weights of a Hugging Face folder as a Megatron checkpoint, which any layout can load.

    options: ``key=value`` of ToMegatronConfig. However it ends, no process and no half of ``out`` is left. Raises
    OpdError or StoppedBySignal.
    """
    with signals_raise():
        console.checking()
        plan = check_to_megatron(source, out, options)
        with _making(out) as partial, _scratch() as scratch:
            folder = partial / RELEASE
            folder.mkdir()
            student = plan.config.student(source.absolute(), plan.dtype)
            job = ConversionJob(to="megatron", student=student, target=folder, events=scratch / "events.jsonl")
            console.converting(job, source, scratch / "log")
            converted = run_ranks(job, scratch / "log")
            write_manifest(folder, "converted", 0, converted.layout)
            point_tracker(partial, RELEASE)
    console.result(out, converted)
    return converted


def to_hf(checkpoint: Path, out: Path, options: list[str], console: ConversionConsole) -> Converted:
    """Write the weights of a Megatron checkpoint as a Hugging Face folder.

    checkpoint: its folder, or the one with the tracker; options: ``key=value`` of ToHfConfig. As ``to_megatron``.
    """
    with signals_raise():
        console.checking()
        plan = check_to_hf(checkpoint, out, options)
        with _making(out) as partial, _scratch() as scratch:
            job = ConversionJob(
                to="hf",
                student=plan.config.student(plan.source.absolute(), "float32"),  # the ranks see the checkpoint's dtype
                checkpoint=plan.checkpoint,
                saved_tensor_parallel=plan.manifest.layout["tensor"],
                target=partial,
                shard_bytes=int(plan.config.shard_gb * 2**30),
                events=scratch / "events.jsonl",
            )
            console.converting(job, plan.checkpoint, scratch / "log")
            converted = run_ranks(job, scratch / "log")
    console.result(out, converted)
    return converted


@contextmanager
def _making(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` at the end, or goes away."""
    partial = out.absolute().with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder for the log, which stays only when an error shows it."""
    folder = Path(tempfile.mkdtemp(prefix="megatron-opd-convert-"))
    try:
        yield folder
    except ProcessError:
        raise
    except BaseException:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
