"""Going on where a run stopped: which checkpoint, what must not have changed, and what is wound back.

Nothing is lost: lines, rollouts and results of steps after the checkpoint move to ``superseded/<time>/``.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.errors import CheckpointError, ConfigError, OpdError
from megatron_opd.runtime.rundir import Endpoints, RunDirectory

# What may differ between the starts of one run: where and how it runs, and when it ends, but not what it computes.
MAY_CHANGE = {
    *("name", "output", "existing", "steps", "max_generated_tokens"),
    *("checkpoint", "evaluation", "data.eval", "data.eval_columns", "record", "sinks", "coordinator"),
    *("cluster", "difficulty", "refresh"),
    *("student.tensor_parallel", "student.data_parallel", "student.pipeline_parallel", "student.context_parallel"),
    *("student.virtual_pipeline", "student.expert_parallel", "student.expert_tensor_parallel", "student.recompute"),
    *("student.overlap_gradients", "student.overlap_parameters"),
    *("student.sequence_parallel", "student.threads_per_rank", "student.row_tokens"),
    *("engine.python", "engine.max_total_tokens", "engine.memory_fraction", "engine.start_timeout_s"),
    *("engine.request_timeout_s", "engine.max_concurrency", "engine.restarts", "engine.routing"),
    *("verifiers.workers", "scoring.attempts", "scoring.max_dropped_share"),
}


@dataclass(frozen=True)
class Resumed:
    """From where a run goes on."""

    step: int  # 0: from the start, since there was no checkpoint yet
    damaged: list[OpdError]  # what is wrong with newer checkpoints, which were set aside
    aside: Path | None  # what was wound back; None when there was nothing
    finished: bool  # there is nothing left to do


def resume(run: RunDirectory, config: Config, endpoints: Endpoints) -> Resumed:
    """Prepare the folder of a run that stopped so that it goes on under ``config``; a finished run is left as it is.

    Raises ConfigError that lists what differs from the run's config, CheckpointError when no checkpoint is whole.
    """
    known = run.config_file.is_file()  # else the run died while its folder was made
    if known:
        check_unchanged(run.config(), config)
    manifest, damaged = run.checkpoints.newest_whole()
    if manifest is None and damaged:
        listing = "".join(f"\n    {error.where}: {error.got}" for error in damaged)
        fix = "bring one of them back, or start anew with existing=archive"
        raise CheckpointError("No checkpoint of the run is whole", where=run.checkpoints.path, got=listing, fix=fix)
    if manifest is not None and manifest.run != run.identity():
        where = run.checkpoints.folder(manifest.step)
        raise CheckpointError(
            "The checkpoint is another run's", where=where, got=f"run {manifest.run}", expected=run.identity()
        )
    step = 0 if manifest is None else manifest.step
    if run.summary.is_file() and step >= config.steps:
        return Resumed(step, damaged, None, finished=True)
    aside = _Aside(run)
    wind_back(run, step, aside)
    if known and run.config() != config:
        aside.copy(run.config_file)
    run.start(config, endpoints, step)
    if step:
        run.checkpoints.point_to(step)
    return Resumed(step, damaged, aside.folder if aside.folder.exists() else None, finished=False)


def check_unchanged(old: Config, new: Config) -> None:
    """Raise ConfigError that lists key, old and new value of each difference that a resumed run may not have."""
    before, after = (_flat(config.model_dump(mode="json")) for config in (old, new))
    changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) != after.get(key)]
    refused = [key for key in changed if not _may_change(key)]
    if refused:
        rows = [f"\n    {key}: was {_shown(before, key)}, is {_shown(after, key)}" for key in refused]
        raise ConfigError(
            "The config is not that of the run",
            where=new.run_dir / "config.yaml",
            got="".join(rows),
            fix="give the run the old values, or start another one with name=... or existing=archive",
        )


def wind_back(run: RunDirectory, step: int, aside: _Aside) -> None:
    """Set aside everything that a run did after ``step``."""
    aside.cut(run.metrics, lambda row: row["step"] <= step)
    aside.cut(run.events, lambda row: True)  # a line that was not finished
    for file in run.trajectories.glob("*"):
        if not (file.suffix == ".parquet" and int(file.stem.removeprefix("step_")) <= step):
            aside.move(file)
    first = [run.evaluation("before"), run.pass_rates] if step == 0 else []
    for path in [run.summary, run.export, run.evaluation("after"), *first]:
        aside.move(path)
    for number in run.checkpoints.steps():
        if number > step:
            aside.move(run.checkpoints.folder(number))
    for path in run.checkpoints.path.glob(".*"):  # begun and not finished
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class _Aside:
    """A folder of its own for what one resumption winds back; made when there is something."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run.path
        stamp, count = time.strftime("%Y%m%d-%H%M%S"), 1
        self.folder = run.superseded / stamp
        while self.folder.exists():
            count += 1
            self.folder = run.superseded / f"{stamp}.{count}"

    def move(self, path: Path) -> None:
        """Move a file or folder of the run, if it is there, to the same place below the folder."""
        if path.exists():
            path.rename(self._place(path))

    def copy(self, path: Path) -> None:
        """Keep a file as it was before the run's next start writes it anew."""
        shutil.copyfile(path, self._place(path))

    def cut(self, path: Path, keep: Callable[[dict], bool]) -> None:
        """Move lines that are no JSON, or that ``keep`` refuses, to a file of the same name."""
        if not path.is_file():
            return
        lines = path.read_text(errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_kept(line, keep)]
        if len(kept) < len(lines):
            self._place(path).write_text("".join(line for line in lines if not _is_kept(line, keep)))
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_text("".join(kept))
            temporary.rename(path)

    def _place(self, path: Path) -> Path:
        place = self.folder / path.relative_to(self._run)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place


def _is_kept(line: str, keep: Callable[[dict], bool]) -> bool:
    try:
        return line.endswith("\n") and keep(json.loads(line))
    except ValueError:
        return False


def _flat(value: object, key: str = "") -> dict[str, object]:
    """Dotted key to value; an empty mapping has no keys."""
    if not isinstance(value, dict):
        return {key: value}
    return {
        name: item
        for part, inner in value.items()
        for name, item in _flat(inner, f"{key}.{part}" if key else part).items()
    }


def _may_change(key: str) -> bool:
    parts = key.split(".")
    prefixes = {".".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return "server" in parts or bool(prefixes & MAY_CHANGE)


def _shown(values: dict[str, object], key: str) -> str:
    return repr(values[key]) if key in values else "not there"
