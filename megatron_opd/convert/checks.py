"""Everything about a conversion that can be known to be wrong before a process is started, told at once."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_opd.config import ConversionConfig, ToHfConfig, ToMegatronConfig, load_options
from megatron_opd.errors import CheckpointError, ConfigError, ModelError, OpdError, raise_together
from megatron_opd.runtime.checkpoints import MANIFEST, RELEASE, TRACKER, Manifest, check_files
from megatron_opd.runtime.conversion import SIDE_FILES
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.student.hf_weights import expected_shapes, weight_mistakes, weights_dtype
from megatron_opd.student.sizes import read_hf_config, student_mistakes

Result = TypeVar("Result")
BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class ToMegatron:
    """A good conversion to Megatron."""

    config: ToMegatronConfig
    dtype: str  # of the checkpoint


@dataclass(frozen=True)
class ToHf:
    """A good conversion to Hugging Face."""

    config: ToHfConfig
    checkpoint: Path
    manifest: Manifest
    source: Path  # folder with config and tokenizer


class _Mistakes:
    """Collects what is wrong."""

    def __init__(self) -> None:
        self.found: list[OpdError] = []

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """What ``check`` returns, or None when it raises a mistake, which is kept."""
        try:
            return check()
        except OpdError as error:
            self.found.append(error)
            return None


def check_to_megatron(source: Path, out: Path, options: list[str]) -> ToMegatron:
    """Raises OpdError: the one mistake, or a list of all."""
    mistakes = _Mistakes()
    mistakes.attempt(lambda: _check_out(out))
    config = mistakes.attempt(lambda: load_options(ToMegatronConfig, options, "convert to-megatron"))
    hf_config = mistakes.attempt(lambda: read_hf_config(source))
    dtype = None
    if hf_config is not None and _check_model(mistakes, config, source, hf_config):
        weights = weight_mistakes(source, hf_config)
        mistakes.found += weights
        if not weights:
            wanted = config.dtype if config else None
            dtype = wanted or mistakes.attempt(lambda: weights_dtype(source))
    if dtype is not None:
        mistakes.attempt(lambda: _check_space(out, expected_shapes(source, hf_config), dtype))
    raise_together(mistakes.found)
    return ToMegatron(config, dtype)


def check_to_hf(checkpoint: Path, out: Path, options: list[str]) -> ToHf:
    """Raises OpdError: the one mistake, or a list of all. Reads the whole checkpoint to compare its checksums."""
    mistakes = _Mistakes()
    mistakes.attempt(lambda: _check_out(out))
    config = mistakes.attempt(lambda: load_options(ToHfConfig, options, "convert to-hf"))
    folder = mistakes.attempt(lambda: find_checkpoint(checkpoint))
    source = manifest = hf_config = None
    if folder is not None:
        source = mistakes.attempt(lambda: find_source(folder, config.source if config else None))
        manifest = mistakes.attempt(lambda: check_files(folder))
    if source is not None:
        hf_config = mistakes.attempt(lambda: read_hf_config(source))
    if hf_config is not None and _check_model(mistakes, config, source, hf_config):
        mistakes.attempt(lambda: _check_space(out, expected_shapes(source, hf_config), "bfloat16"))  # at least
    raise_together(mistakes.found)
    return ToHf(config, folder, manifest, source)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint ``path``, or the one that the tracker in the folder ``path`` names. Raises CheckpointError."""
    if (path / MANIFEST).is_file():
        return path.resolve()
    tracker = path / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            "There is no complete Megatron checkpoint" if path.is_dir() else "The checkpoint's folder does not exist",
            where=path.absolute(),
            expected=f"{MANIFEST}, as in checkpoints/iter_0000010, or {TRACKER}, as in checkpoints",
        )
    named = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if named != RELEASE and not named.isdecimal():
        raise CheckpointError("The tracker names no checkpoint", where=tracker.absolute(), got=repr(named))
    folder = path / (RELEASE if named == RELEASE else f"iter_{int(named):07d}")
    if not (folder / MANIFEST).is_file():
        fix = "name one of the others"
        raise CheckpointError("The checkpoint that the tracker names is not there", where=folder.absolute(), fix=fix)
    return folder.resolve()


def find_source(checkpoint: Path, given: Path | None) -> Path:
    """Folder with config and tokenizer of a checkpoint. Raises ModelError when none is known."""
    fix = "name the Hugging Face folder that the model came from: source=..."
    if given is not None:
        return given
    if (checkpoint / SIDE_FILES).is_dir():
        return checkpoint / SIDE_FILES
    run = RunDirectory(checkpoint.parent.parent)  # runs/NAME of runs/NAME/checkpoints/iter_0000010
    if not run.config_file.is_file():
        raise ModelError("It is not known which model the checkpoint is of", where=checkpoint, fix=fix)
    model = run.config().student.model
    if not model.is_dir():
        what = "The folder of the model that the run started from is not there"
        raise ModelError(what, where=f"{run.config_file}: student.model", got=model.absolute(), fix=fix)
    return model


def _check_out(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise ConfigError("The folder to write exists already", where=out.absolute(), fix="name a new folder")
    above = _existing(out)
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError("The folder cannot be made", where=out.absolute(), got=f"{above} is not a folder to write in")


def _check_model(mistakes: _Mistakes, config: ConversionConfig | None, source: Path, hf_config: dict[str, Any]) -> bool:
    """Whether the model is one that can be built, however it is spread."""
    student = (config or ConversionConfig()).student(source, "float32")
    found = student_mistakes(student, hf_config)
    models = [error for error in found if isinstance(error, ModelError)]
    mistakes.found += models or [_as_typed(error) for error in found]
    return not models


def _check_space(out: Path, shapes: dict[str, tuple[int, ...]], dtype: str) -> None:
    needed = BYTES[dtype] * sum(map(math.prod, shapes.values()))
    free = shutil.disk_usage(_existing(out)).free
    if free < needed:
        raise ConfigError(
            "The disk has too little room",
            where=out.absolute(),
            got=f"{free / 1e9:.1f} GB free",
            expected=f"at least {needed / 1e9:.1f} GB",
        )


def _existing(path: Path) -> Path:
    """The nearest folder above ``path`` that there is."""
    return next(above for above in path.absolute().parents if above.exists())


def _as_typed(error: OpdError) -> OpdError:
    """The error of a size, with the key that was given: the options have no section."""
    texts = {name: getattr(error, name) for name in ("where", "got", "expected", "fix")}
    plain = {name: None if text is None else str(text).replace("student.", "") for name, text in texts.items()}
    return type(error)(error.what, **plain)
