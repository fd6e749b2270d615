"""The model that is evaluated: a Hugging Face folder, the result of a run, or a Megatron checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.convert.checks import find_checkpoint, find_source
from megatron_opd.convert.command import to_hf
from megatron_opd.convert.console import ConversionConsole
from megatron_opd.errors import ModelError
from megatron_opd.runtime.checkpoints import MANIFEST, TRACKER
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.sampling.identity import file_digest, model_digest
from megatron_opd.train.preflight import check_model


@dataclass(frozen=True)
class Model:
    """``folder`` has config and tokenizer, and the weights too unless they are in ``checkpoint``."""

    given: Path  # as the user named it
    folder: Path
    checkpoint: Path | None

    def digest(self) -> str:
        """SHA-256 that tells it from other models. Cost: reads some megabytes."""
        weights = "" if self.checkpoint is None else f" {file_digest(self.checkpoint / MANIFEST)}"
        return f"sha256 {model_digest(self.folder)}{weights}"

    @contextmanager
    def servable(self, scratch: Path) -> Iterator[Path]:
        """A Hugging Face folder with the weights; a checkpoint is converted to ``scratch``, which goes away."""
        if self.checkpoint is None:
            yield self.folder
            return
        shutil.rmtree(scratch, ignore_errors=True)  # left by an evaluation that was killed
        try:
            with ConversionConsole() as console:
                to_hf(self.checkpoint, scratch, [f"source={self.folder}"], console)
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def find_model(given: Path, source: Path | None) -> Model:
    """What ``given`` is. ``source``: config and tokenizer of a checkpoint, else its run's. Raises OpdError."""
    if (given / "config.json").is_file():
        check_model("the model", given)
        return Model(given, given, None)
    run = RunDirectory(given)
    if run.config_file.is_file() and run.export.is_dir():
        check_model("the run's result", run.export)
        return Model(given, run.export, None)
    place = run.checkpoints.path if run.config_file.is_file() else given
    if not (place / MANIFEST).is_file() and not (place / TRACKER).is_file():
        raise ModelError(
            "No such model folder" if not given.is_dir() else "The folder holds no model",
            where=given.absolute(),
            expected="config.json of a Hugging Face folder, a run with student_hf or checkpoints, "
            f"or {MANIFEST} or {TRACKER} of a Megatron checkpoint",
        )
    checkpoint = find_checkpoint(place)
    return Model(given, find_source(checkpoint, source), checkpoint)
