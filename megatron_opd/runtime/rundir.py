"""The folder of one run: resolved config, logs, events, metrics, results."""

from __future__ import annotations

import fcntl
import json
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from omegaconf import OmegaConf

from megatron_opd.config import Config, parse_config
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.checkpoints import CheckpointFolder


@dataclass(frozen=True)
class Endpoints:
    """Addresses of the run's servers, fixed before anything starts."""

    coordinator: str
    rollout: list[str]  # URLs of all replicas, as in the next two
    teachers: dict[str, list[str]]  # by domain
    reference: list[str]  # the free reference; empty without one
    weights_host: str  # address at which the trainer's rank 0 opens the broadcast group
    weights_port: int


class RunDirectory:
    """Paths below ``runs/<name>``. Processes of a run share nothing but this folder and HTTP."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def events(self) -> Path:
        """What happened, a JSON object a line, for the console and for later reading."""
        return self.path / "events.jsonl"

    @property
    def metrics(self) -> Path:
        """Numbers of each step, a JSON object a line."""
        return self.path / "metrics.jsonl"

    @property
    def activity(self) -> Path:
        """What the run does right now, one line that is replaced."""
        return self.path / "activity.json"

    @property
    def tensorboard(self) -> Path:
        """Event files for TensorBoard, with ``sinks.tensorboard``."""
        return self.path / "tensorboard"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def trajectories(self) -> Path:
        """A parquet file of rollouts for each recorded step."""
        return self.path / "trajectories"

    @property
    def tokenizer(self) -> Path:
        """A copy of the student's tokenizer, so that the folder can be read on its own."""
        return self.path / "tokenizer"

    @property
    def pass_rates(self) -> Path:
        """How often each prompt was solved in training, as ``data.pass_rates`` writes it."""
        return self.path / "pass_rates.parquet"

    def evaluation(self, when: str) -> Path:
        """Passes of each held-out prompt, "before" or "after" training, in the same format."""
        return self.path / f"eval_{when}.parquet"

    @property
    def export(self) -> Path:
        """The trained student as a Hugging Face checkpoint."""
        return self.path / "student_hf"

    @property
    def weights(self) -> Path:
        """Weights on their way to the rollout engines, where they go by files."""
        return self.path / "weights"

    @property
    def checkpoints(self) -> CheckpointFolder:
        return CheckpointFolder(self.path / "checkpoints")

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def pause_wanted(self) -> Path:
        """A file that asks the run to save after the step under way, and to stop; a start of the run removes it."""
        return self.path / "pause"

    @property
    def superseded(self) -> Path:
        """What a resumed run wound back: a folder for each time."""
        return self.path / "superseded"

    @classmethod
    def create(cls, config: Config, endpoints: Endpoints) -> RunDirectory:
        """Make the folder and write the resolved config.

        Raises ConfigError when it exists and ``existing`` is not "archive".
        """
        path = config.run_dir
        if path.exists():
            if config.existing != "archive":
                raise ConfigError(
                    "The run's folder exists already",
                    where=path.absolute(),
                    fix="choose another name=..., existing=archive to move the old one aside, "
                    "or existing=resume to go on where it stopped",
                )
            path.rename(free_name_beside(path))
        run = cls(path)
        path.mkdir(parents=True)
        run.start(config, endpoints, 0)
        return run

    def start(self, config: Config, endpoints: Endpoints, step: int) -> None:
        """Write what the run's processes read: it starts, or goes on, with the weights after ``step`` steps."""
        for folder in (self.logs, self.trajectories, self.checkpoints.path):
            folder.mkdir(exist_ok=True)
        self.events.touch()
        self.pause_wanted.unlink(missing_ok=True)
        self.activity.unlink(missing_ok=True)  # of an earlier start
        if not self._identity.is_file():
            self._replace(self._identity, json.dumps({"id": secrets.token_hex(8), "created": time.time()}))
        self._replace(self.path / "endpoints.json", json.dumps(asdict(endpoints), indent=2))
        self._replace(self.path / "start.json", json.dumps({"step": step}))
        self._replace(self.config_file, OmegaConf.to_yaml(OmegaConf.create(config.model_dump(mode="json"))))

    @contextmanager
    def occupied(self, wait_s: float = 0.0) -> Iterator[None]:
        """Keep the folder to this process and those that it starts, which are ``present``.

        Raises ConfigError when after ``wait_s`` another run's process is still there.
        """
        deadline = time.monotonic() + wait_s
        with self._lock.open("a") as file:
            while not _try_to_lock(file):
                if time.monotonic() > deadline:
                    raise ConfigError(
                        "A process still works in the run's folder",
                        where=self.path.absolute(),
                        fix="stop the run, or wait for its end",
                    )
                time.sleep(0.2)
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def present(self) -> Iterator[None]:
        """What a process of the run does inside this block may touch the folder."""
        with self._lock.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def is_occupied(self) -> bool:
        """Whether a process of the run lives."""
        if not self._lock.is_file():
            return False
        with self._lock.open("a") as file:
            return not _try_to_lock(file)

    def start_step(self) -> int:
        """Optimizer steps behind the weights that the run starts with; 0: those of the model's folder."""
        return json.loads((self.path / "start.json").read_text())["step"]

    def identity(self) -> str:
        """The run's id: made with the folder, the same however often it is resumed."""
        return json.loads(self._identity.read_text())["id"]

    def config(self) -> Config:
        """The resolved config of the run."""
        return parse_config(OmegaConf.to_container(OmegaConf.load(self.config_file)), where=str(self.config_file))

    def endpoints(self) -> Endpoints:
        return Endpoints(**json.loads((self.path / "endpoints.json").read_text()))

    @property
    def _identity(self) -> Path:
        return self.path / "run.json"

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        """Write a file so that a reader sees all of it or the old one."""
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(text.rstrip("\n") + "\n")
        temporary.rename(path)


def _try_to_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def free_name_beside(path: Path) -> Path:
    """A free name beside ``path``: its time of last change, and a number when that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    target, count = path.with_name(f"{path.name}.{stamp}"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.{stamp}.{count}")
    return target
