"""The folder of one run: resolved config, logs, events, metrics, results."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import OmegaConf

from megatron_opd.config import Config, parse_config
from megatron_opd.errors import ConfigError


@dataclass(frozen=True)
class Endpoints:
    """Addresses of the run's servers, fixed before anything starts."""

    coordinator: str
    rollout: str
    teachers: dict[str, str]  # domain -> URL
    reference: str | None  # the free reference; None without one
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

    @classmethod
    def create(cls, config: Config, endpoints: Endpoints) -> RunDirectory:
        """Make the folder and write the resolved config.

        Raises ConfigError when it exists and ``existing`` is "refuse".
        """
        path = config.run_dir
        if path.exists():
            if config.existing == "refuse":
                raise ConfigError(
                    "The run's folder exists already",
                    where=path.absolute(),
                    fix="choose another name=..., or existing=archive to move the old one aside",
                )
            path.rename(_aside(path))
        run = cls(path)
        run.logs.mkdir(parents=True)
        run.trajectories.mkdir()
        OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), path / "config.yaml")
        (path / "endpoints.json").write_text(json.dumps(asdict(endpoints), indent=2) + "\n")
        run.events.touch()
        return run

    def config(self) -> Config:
        """The resolved config of the run."""
        file = self.path / "config.yaml"
        return parse_config(OmegaConf.to_container(OmegaConf.load(file)), where=str(file))

    def endpoints(self) -> Endpoints:
        return Endpoints(**json.loads((self.path / "endpoints.json").read_text()))


def _aside(path: Path) -> Path:
    """A free name beside ``path``: its time of last change, and a number when that is taken."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    target, count = path.with_name(f"{path.name}.{stamp}"), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}.{stamp}.{count}")
    return target
