"""CPU time and memory of the coordinator, a step at a time, at the paper's scale and above.

    python tools/bench_coordinator.py [PROMPTSxSAMPLESxTOKENSxSTEPS ...] [--profile]

The whole coordinator is real: loop, buffer (max_staleness 1), HTTP client and its parsing, text decoding, the pipe to
a verifier process (of kind "none"), recipe, packing, parquet of all rollouts, HTTP server. Engine, teacher and student
are one other process that sends answers made beforehand over real sockets (``tools/fake_cluster.py``). Each size runs
in a process of its own: CPU seconds of all its threads, without its children, and its largest resident size.
Exits with 1 when the paper's size takes more than 6 CPU seconds a step.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web
from fake_cluster import PROMPT

from megatron_opd.config import Config, load_config
from megatron_opd.coordinator.app import BatchBoard, make_app
from megatron_opd.coordinator.loop import Loop
from megatron_opd.coordinator.stages import Stages
from megatron_opd.data.stream import PromptStream
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.connect import new_pool
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.prometheus import Exposition
from megatron_opd.observe.recorder import Recorder
from megatron_opd.records import Prompt
from megatron_opd.runtime.env import TOKEN, token
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.verifiers.pool import VerifierPool

ROOT = Path(__file__).resolve().parents[1]
PAPER = "64x16x8192x10"
SIZES = [PAPER, "64x16x1024x4", "256x16x1024x4", "1024x16x1024x2"]
TARGET_CPU_S = 6.0
RANKS = 8


@dataclass(frozen=True)
class Size:
    """Of one run."""

    prompts: int
    samples: int
    tokens: int
    steps: int

    @property
    def step_tokens(self) -> int:
        return self.prompts * self.samples * self.tokens


def config_of(size: Size, folder: Path) -> Config:
    """The toy run at another size, one step ahead."""
    changes = [
        *("conf/recipe/opd.yaml", f"output={folder}", "name=bench", "checkpoint.every_steps=0", f"steps={size.steps}"),
        *(f"rollout.prompts_per_step={size.prompts}", f"rollout.samples_per_prompt={size.samples}"),
        *(f"rollout.max_new_tokens={size.tokens}", "rollout.max_staleness=1", "refresh.pause=retract"),
        *(f"student.data_parallel={RANKS}", "student.row_tokens=16384", "data.eval=null"),
        *("verifiers.kinds.math=none", "verifiers.kinds.code=none", "verifiers.workers=1", "verifiers.timeout_s=600"),
        *("engine.request_timeout_s=600", "engine.max_concurrency=8"),
    ]
    return load_config(ROOT / "conf" / "toy.yaml", changes)


async def drive(size: Size, folder: Path) -> dict[str, float]:
    """One run; what a step of it cost."""
    config, board = config_of(size, folder), BatchBoard()
    run = RunDirectory.create(config, Endpoints("", [], {}, [], "", 0))
    tokenizer = load_tokenizer(config.student.model)
    prompts = [Prompt(f"p{i}", "math", "?", PROMPT, "1") for i in range(size.prompts * size.steps)]
    own, other = free_port(), free_port()
    async with AsyncExitStack() as stack:
        runner = web.AppRunner(make_app(board, token(), Exposition()), access_log=None)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", own).start()
        pool = new_pool(stack, "both", config.engine, config.rollout.server, [f"http://127.0.0.1:{other}"])
        verifiers = VerifierPool(config.verifiers)
        stack.push_async_callback(verifiers.close)
        vocabulary = len(tokenizer)
        teachers = TeacherPool(
            [Teacher("math", pool, vocabulary, {})], 1, reference=None, top_k=0, student_vocab_size=vocabulary
        )
        engine = RolloutEngine(pool, tokenizer, 1)
        loop = Loop(
            config=config,
            stages=Stages(engine, verifiers, teachers, config.rollout, config.balance, config.seed),
            student_sampler=engine,
            teacher_samplers={},
            attention_length=1000.0,
            stream=PromptStream(prompts, 0),
            held_out=[],
            board=board,
            recorder=Recorder(run.events, run.metrics),
            activity=Activity(run.activity),
            run_directory=run,
            prompts="",
        )
        numbers = map(str, (other, f"http://127.0.0.1:{own}", size.tokens, size.samples, vocabulary, RANKS))
        cluster = await asyncio.create_subprocess_exec(
            sys.executable, str(ROOT / "tools" / "fake_cluster.py"), *numbers, stdout=subprocess.PIPE
        )
        assert await cluster.stdout.readline() == b"ready\n"
        wall, cpu = time.monotonic(), time.process_time()
        await loop.run()
        found = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall}
        await board.end(RANKS)
        assert await cluster.wait() == 0
    return {name: value / size.steps for name, value in found.items()}


def measure(size: Size, profile: bool) -> None:
    """Run one size in this process and print what it cost as JSON."""
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        if profile:
            profiler.enable()
        found = asyncio.run(drive(size, Path(folder)))
        profiler.disable()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(35)
    print(json.dumps(found | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def main() -> int:
    """Print the table; 1 when the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=SIZES)
    parser.add_argument("--profile", action="store_true", help="where the time of this thread goes, to standard error")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = {name: Size(*map(int, name.split("x"))) for name in arguments.sizes}
    if arguments.here:
        measure(*sizes.values(), arguments.profile)
        return 0
    missed = False
    print(f"{'prompts x samples x tokens x steps':36} tokens/step  CPU s/step  us/token  wall s/step  peak MB")
    for name, size in sizes.items():
        command = [sys.executable, __file__, name, "--here", *(["--profile"] if arguments.profile else [])]
        environment = os.environ | {TOKEN: "benchmark"}
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, cwd=ROOT).stdout
        found = json.loads(output)
        share = found["cpu_s"] / size.step_tokens * 1e6
        print(
            f"{name:36} {size.step_tokens:11,} {found['cpu_s']:11.2f} {share:9.3f} {found['wall_s']:12.2f} "
            f"{found['peak_mb']:8.0f}",
            flush=True,
        )
        missed |= name == PAPER and found["cpu_s"] > TARGET_CPU_S
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
