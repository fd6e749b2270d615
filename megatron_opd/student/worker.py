"""One rank of the student: the training loop."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import AsyncExitStack
from dataclasses import asdict

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_opd.config import Config
from megatron_opd.engines.connect import key_of
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.weights import WeightClient
from megatron_opd.observe.role import run_role
from megatron_opd.runtime.env import rank
from megatron_opd.runtime.http import wait_until_ready
from megatron_opd.runtime.messages import RefreshReport, TrainerInfo
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.checkpoint import Saver, load_student
from megatron_opd.student.coordinator_client import CoordinatorClient
from megatron_opd.student.export import export_hf
from megatron_opd.student.refresh import Refreshed, WeightRefresh
from megatron_opd.student.step import StepMetrics, train_step
from megatron_opd.student.transports import Place

logger = logging.getLogger("megatron_opd.student")  # not __name__, which is __main__ here

METRIC_NAMES = {
    "loss": "loss/policy",
    "grad_norm": "loss/grad_norm",
    "learning_rate": "loss/learning_rate",
    "advantage": "opd/advantage",
    "abs_advantage": "opd/abs_advantage",
    "clipped_share": "opd/clipped",
    "forward_kl": "opd/forward_kl",
    "abs_logprob_change": "opd/engine_trainer_difference",  # of tokens of the current weights: should be one policy
    "stale_share": "opd/stale_tokens",
    "importance_weight": "opd/importance_weight",
    "truncated_share": "opd/importance_truncated",
}


async def train(run: RunDirectory) -> None:
    """Train to the last step; the rollout engines have the weights of every step before the next one begins."""
    config, endpoints, start = run.config(), run.endpoints(), run.start_step()
    init_distributed(config.student, config.seed)
    student = build_student(config)
    if start:
        checkpoints = run.checkpoints
        load_student(student, checkpoints.folder(start), start, checkpoints.manifest(start).layout)
    saver = Saver(config.checkpoint, run, student)
    data_rank = parallel_state.get_data_parallel_rank()
    async with AsyncExitStack() as stack:
        coordinator = CoordinatorClient(endpoints.coordinator)
        stack.push_async_callback(coordinator.close)
        refresh = await _connect(stack, config, run, endpoints, student)
        refreshed = await refresh.push(student, version=start)
        await _report(coordinator, _report_of(refreshed, start, info=_info(student, config)))
        step, paused = start, False

        async def send_again(number: int) -> None:
            again = await refresh.push(student, version=step)
            await _report(coordinator, _report_of(again, step, resend=number))

        while True:
            waiting = time.monotonic()
            batch = await coordinator.batch(step, data_rank, send_again)
            if batch is None:
                break
            saver.poll()  # what was written while the rollouts were sampled
            training = time.monotonic()
            metrics = train_step(student, batch, config.loss)
            trained = time.monotonic()
            refreshed = await refresh.push(student, version=step + 1)
            times = {"time/wait_s": training - waiting, "time/train_s": trained - training}
            await _report(coordinator, _report_of(refreshed, step + 1, training=named_metrics(metrics) | times))
            step, paused = step + 1, batch.paused
            if config.checkpoint.due(step, last=batch.last):
                saver.begin(step)  # while the next step's rollouts are sampled
            if batch.last:  # the evaluation is still to come, in which the weights may have to be sent again
                saver.finish()
        saver.finish()
        await refresh.close()
    if not paused:
        export_hf(student, config.student.model, run.export)
    dist.destroy_process_group()


async def _connect(
    stack: AsyncExitStack, config: Config, run: RunDirectory, endpoints: Endpoints, student: Student
) -> WeightRefresh:
    urls, key = (endpoints.rollout, key_of(config.rollout.server)) if rank() == 0 else ([], None)
    await asyncio.gather(*(wait_until_ready(f"{url}/ready", config.engine.start_timeout_s) for url in urls))
    settings = {"timeout_s": config.refresh.timeout_s, "max_concurrency": 4, "api_key": key}
    engines = [WeightClient(url, images=ImageFolder(config.images_folder), **settings) for url in urls]
    for engine in engines:
        stack.push_async_callback(engine.close)
    shared = config.refresh.folder
    folder = shared / run.identity() if shared else run.weights
    place = Place(endpoints.weights_host, endpoints.weights_port, folder)
    return WeightRefresh.connect(config.refresh, engines, place, student.bridge.vocab_size, student.images)


def named_metrics(metrics: StepMetrics) -> dict[str, float]:
    """The step's numbers under the names of metrics.jsonl."""
    return {METRIC_NAMES[name]: value for name, value in asdict(metrics).items() if value is not None}


async def _report(coordinator: CoordinatorClient, report: RefreshReport) -> None:
    if rank() == 0:
        await coordinator.refreshed(report)
        logger.info("weights %d are live: %s", report.version, report.model_dump_json(exclude={"version"}))


def _report_of(
    refreshed: Refreshed,
    version: int,
    *,
    info: TrainerInfo | None = None,
    training: dict[str, float] | None = None,
    resend: int = 0,
) -> RefreshReport:
    return RefreshReport(
        version=version,
        resend=resend,
        refresh_s=refreshed.seconds,
        refresh_bytes=refreshed.bytes,
        probe_difference=refreshed.probe_difference,
        live=list(refreshed.live),
        out=refreshed.out,
        info=info,
        training=training or {},
    )


def _info(student: Student, config: Config) -> TrainerInfo:
    return TrainerInfo(
        tensor_parallel=config.student.tensor_parallel,
        pipeline_parallel=config.student.pipeline_parallel,
        virtual_pipeline=config.student.virtual_pipeline,
        context_parallel=config.student.context_parallel,
        data_parallel=config.student.data_parallel,
        expert_parallel=config.student.expert_parallel,
        backend=student.backend,
        backend_reason=student.reason,
        dtype=config.student.dtype,
        device=student.device.type,
    )


if __name__ == "__main__":
    run_role("student", train)
