"""Optional copies of the metrics elsewhere: wandb, TensorBoard. They cannot stop a run, nor slow it down.

Each sink lives on a thread of its own behind a bounded queue. One that raises, or that has not taken a step for
``sinks.patience_s``, is told once, with the reason, and left. Nothing is lost: ``metrics.jsonl`` has every number.
"""

from __future__ import annotations

import atexit
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Protocol

from megatron_opd.config import Config, SinksConfig
from megatron_opd.errors import ConfigError
from megatron_opd.observe.recorder import Recorder
from megatron_opd.runtime import env
from megatron_opd.runtime.rundir import RunDirectory

logger = logging.getLogger(__name__)

WAITING_STEPS = 256  # most steps that wait for a sink


class Sink(Protocol):
    """Where numbers go. Its methods may take long and raise anything."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the numbers of a step."""

    def close(self) -> None:
        """Write what is still held back."""


class SinkThread:
    """A sink on a thread of its own: a listener of the recorder that returns at once and never raises."""

    def __init__(self, name: str, make: Callable[[], Sink], tell: Callable[[str], None], patience_s: float) -> None:
        """make: opens the sink, on the thread; tell: takes the reason when the sink is left, at most once."""
        self._name, self._make, self._tell, self._patience_s = name, make, tell, patience_s
        self._waiting: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(WAITING_STEPS)
        self._busy_since: float | None = time.monotonic()
        self._left = False
        self._thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self._thread.start()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Pass on the numbers of a step, unless the sink was left."""
        busy = self._busy_since
        if busy is not None and time.monotonic() - busy > self._patience_s:
            self._leave(f"it has not answered for {self._patience_s:g} s")
        self._put((step, metrics))

    def close(self) -> bool:
        """Give the sink ``patience_s`` to write what it holds; whether its thread has ended."""
        self._put(None)
        self._thread.join(0.0 if self._left else self._patience_s)
        if self._thread.is_alive():
            self._leave(f"it did not end within {self._patience_s:g} s")
        return not self._thread.is_alive()

    def _put(self, item: tuple[int, dict[str, float]] | None) -> None:
        if self._left:
            return
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            self._leave(f"{WAITING_STEPS} steps wait for it")

    def _work(self) -> None:
        try:
            sink = self._make()
            while not self._left and (item := self._next()) is not None:
                sink.step(*item)
            sink.close()
        except Exception as error:  # whatever a library raises, the run goes on
            logger.exception("the sink %s failed", self._name)
            self._leave(f"{type(error).__name__}: {error}")

    def _next(self) -> tuple[int, dict[str, float]] | None:
        self._busy_since = None
        item = self._waiting.get()
        self._busy_since = time.monotonic()
        return item

    def _leave(self, reason: str) -> None:
        if not self._left:
            self._left = True
            self._tell(reason)


class TensorBoard:
    """Event files for ``tensorboard --logdir``."""

    def __init__(self, run: RunDirectory) -> None:
        from torch.utils.tensorboard import SummaryWriter

        start = run.start_step()  # steps after it, of an earlier start, are not shown any more
        self._writer = SummaryWriter(str(run.tensorboard), purge_step=start + 1 if start else None)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the numbers of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """End the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases with the run's own id, so that a resumed run goes on in the same curves."""

    def __init__(self, run: RunDirectory, config: Config) -> None:
        import wandb

        self._run = wandb.init(
            project=config.sinks.wandb_project,
            entity=config.sinks.wandb_entity,
            id=run.identity(),
            name=config.name,
            dir=str(run.path),
            config=config.model_dump(mode="json"),
            resume="allow",
            mode=env.wandb_mode(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # Not wandb's own step, which cannot go back: a resumed run may repeat some.
        self._run.define_metric("*", step_metric="step")

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Take the numbers of a step."""
        self._run.log({"step": step} | metrics)

    def close(self) -> None:
        """Wait until everything is sent, or written where offline."""
        self._run.finish()


def check_sinks(config: SinksConfig) -> None:
    """Raise ConfigError when the library of a sink that is asked for is not installed."""
    wanted = {"wandb": config.wandb, "tensorboard": config.tensorboard}
    missing = [name for name, on in wanted.items() if on and find_spec(name) is None]
    if missing:
        raise ConfigError(
            "The library of a sink is not installed",
            where=", ".join(f"sinks.{name}" for name in missing),
            fix=f"pip install {' '.join(missing)} into .venv, or switch it off: metrics.jsonl has every number",
        )


@contextmanager
def open_sinks(config: Config, run: RunDirectory, recorder: Recorder) -> Iterator[None]:
    """The sinks that ``config`` asks for get every step of ``recorder`` inside the block."""
    makers: dict[str, Callable[[], Sink]] = {}
    if config.sinks.tensorboard:
        makers["tensorboard"] = lambda: TensorBoard(run)
    if config.sinks.wandb:
        makers["wandb"] = lambda: Wandb(run, config)
    threads = [
        SinkThread(name, make, lambda why, name=name: recorder.event("sink_left", sink=name, reason=why), patience)
        for patience in [config.sinks.patience_s]
        for name, make in makers.items()
    ]
    for thread in threads:
        recorder.listen(thread)
    code = 1
    try:
        yield
        code = 0
    finally:
        ended = [thread.close() for thread in threads]
        if not all(ended):
            # A library that hangs would hang again in its own exit handler, which this one, as the newest, precedes.
            atexit.register(os._exit, code)
