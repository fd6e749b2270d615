"""Ways to make processes of a real run die at a chosen moment, and the proof that nothing was lost or done twice."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from faulty_server import FaultyServer

from megatron_opd.config import load_config
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.stream import PromptStream
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.observe.activity import read_activity
from megatron_opd.observe.trajectories import read_trajectories

from runs import START_LIMIT_S, TOY, Run

GROUPS, SAMPLES = 8, 4
SMALL = [
    *("student.tensor_parallel=1", "data.eval=null", "checkpoint.every_steps=1"),
    *(f"rollout.prompts_per_step={GROUPS}", f"rollout.samples_per_prompt={SAMPLES}"),
]
ROLLOUT, MATH = "models/student", "models/math"  # what tells a server's command line
COORDINATOR, STUDENT = "megatron_opd.coordinator", "megatron_opd.student.worker"


def kill(run: Run, part: str, number: signal.Signals = signal.SIGKILL) -> None:
    """kill -9 for the process of the run whose command line has ``part``; of a server the one that started the rest.

    With SIGSTOP as ``number`` it hangs instead: it keeps its port and its connections, and answers nothing.
    """
    found = [process for name, process in run.family().items() if part in name and "srun" not in name]
    assert found, (part, list(run.family()))
    min(found, key=lambda process: process.create_time()).send_signal(number)


def until(run: Run, seen: Callable[[], bool], limit_s: float = START_LIMIT_S) -> None:
    """Wait until something is seen; the run must go on meanwhile."""
    deadline = time.monotonic() + limit_s
    while not seen():
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.002)


def await_doing(run: Run, what: str) -> None:
    """Wait until the run says that it does ``what``, such as "step 2: rollouts"."""

    def seen() -> bool:
        doing = read_activity(run.folder / "activity.json")
        return doing is not None and doing.what == what

    until(run, seen)


def await_log(run: Run, role: str, text: str, past: int) -> None:
    """Wait until the log of ``role`` has ``text`` after its first ``past`` characters."""
    until(run, lambda: text in (run.folder / "logs" / f"{role}.log").read_text(errors="replace")[past:])


def log_length(run: Run, role: str) -> int:
    """Characters in a log."""
    return len((run.folder / "logs" / f"{role}.log").read_text(errors="replace"))


def lost_and_repeated(run: Run, steps: int, overrides: Sequence[str]) -> tuple[int, int]:
    """Prompts of the first ``steps`` steps of the epoch that were not trained, and those trained more than once."""
    table = read_trajectories(run.folder / "trajectories")
    config = load_config(TOY, list(overrides))
    prompts, _ = read_inputs(config, load_tokenizer(config.student.model))
    expected = Counter(prompt.id for prompt in PromptStream(prompts, config.seed).take(GROUPS * steps))
    groups = dict(zip(table.column("group").to_pylist(), table.column("prompt_id").to_pylist(), strict=True))
    found = Counter(groups.values())
    rows = np.unique(table.column("group").to_numpy(), return_counts=True)[1]
    assert (rows == SAMPLES).all() and run.steps() == list(range(1, steps + 1))
    return (expected - found).total(), (found - expected).total()


@contextmanager
def proxied(upstream: str, other: str) -> Iterator[tuple[FaultyServer, str]]:
    """A server before ``upstream`` that can spoil its replies, in a thread, and its URL.

    ``other``: server of another model.
    """
    faulty, started = FaultyServer(upstream, other_url=other), threading.Event()
    found: dict[str, object] = {}

    async def serve() -> None:
        async with faulty.running() as found["url"]:
            found["loop"], found["end"] = asyncio.get_running_loop(), asyncio.Event()
            started.set()
            await found["end"].wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield faulty, found["url"]
    finally:
        found["loop"].call_soon_threadsafe(found["end"].set)
        thread.join(20)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of that size at ``folder``. Only root can mount one."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def wrong_numbers(run: Run, teacher: str, url: str, overrides: Sequence[str], tolerance: float = 1e-3) -> int:
    """Rollouts of a run that have other log-probs of ``teacher`` than the server at ``url`` gives now."""
    config = load_config(TOY, list(overrides))
    prompts, _ = read_inputs(config, load_tokenizer(config.student.model))
    ids_of = {prompt.id: list(prompt.token_ids) for prompt in prompts}
    rows = read_trajectories(run.folder / "trajectories").to_pylist()
    rows = [row for row in rows if row["teacher"] == teacher]
    assert rows

    async def rescore() -> list[float]:
        client = SGLangClient(url, timeout_s=300, max_concurrency=8)

        async def difference(row: dict) -> float:
            prompt, response = ids_of[row["prompt_id"]], row["token_ids"]
            reply = await client.prompt_logprobs(prompt + response, start=len(prompt) - 1)
            true = split_rows(reply["meta_info"]["input_token_logprobs"])[0][1:]
            return float(np.abs(true - np.array(row["teacher_logprobs"])).max())

        try:
            return await asyncio.gather(*map(difference, rows))
        finally:
            await client.close()

    return sum(not found <= tolerance for found in asyncio.run(rescore()))
