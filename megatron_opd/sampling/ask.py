"""Drawing and judging every response that a journal lacks, with servers that are started for it or attached to."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import EngineConfig, ServerConfig, VerifierConfig
from megatron_opd.engines.connect import new_pool
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Outcome, Prompt
from megatron_opd.runtime.process import Child, adopt_orphans, start, stop_all
from megatron_opd.runtime.supervision import POLL_S, await_ready, death, ignore_signals, signals_cancel
from megatron_opd.sampling.console import SamplingConsole
from megatron_opd.sampling.journal import Journal, Sampled
from megatron_opd.train.roles import replica_roles, server_urls
from megatron_opd.verifiers.pool import VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Draw:
    """How one prompt is answered."""

    samples: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int | None


@dataclass(frozen=True)
class Job:
    """Which model is asked, how, and who judges its responses."""

    model: Path  # Hugging Face folder
    shown: str  # what the model is called to a person
    engine: EngineConfig
    server: ServerConfig
    server_key: str  # of ``server`` in the config
    logs: Path  # folder for those of started servers
    images: Path  # folder of the prompts' resized images
    verifiers: VerifierConfig
    draws: Mapping[str, Draw]  # by domain
    attempts: int  # of one request
    concurrency: int  # prompts under way at once
    seed: int
    keep_texts: bool = False


def sample_missing(
    job: Job,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    journal: Journal,
    console: SamplingConsole,
) -> None:
    """Put every prompt that is not in ``journal`` into it. However it ends, no process is left.

    Afterwards nobody hears signals: enter ``signals_raise`` again. Raises OpdError or StoppedBySignal; what was
    sampled until then is kept.
    """
    if len(journal.done) == len(prompts):
        return
    urls = server_urls(job.server, "rollout", f"{job.server_key}.port")
    adopt_orphans()
    try:
        children = _start_servers(job, urls, console)
        asyncio.run(_sample_all(job, prompts, tokenizer, urls, children, journal, console))
    finally:
        ignore_signals()  # the clean-up is not interrupted
        console.stopping()
        stop_all()
        if len(journal.done) < len(prompts):
            console.kept(len(journal.done), len(prompts))


def _start_servers(job: Job, urls: list[str], console: SamplingConsole) -> list[Child]:
    """The servers of this command, ready; none where it attaches. Raises ProcessError."""
    roles = replica_roles(job.engine, job.seed, 0, "rollout", job.server, job.model, urls)
    children = []
    for role in roles:
        log = job.logs / f"{role.name}.log"
        log.parent.mkdir(exist_ok=True)
        console.starting(log)
        children.append(start(role.name, role.argv, role.environment, log))
    for role, child in zip(roles, children, strict=True):
        console.ready(role.name, await_ready(child, role.ready_url, job.engine.start_timeout_s))
    return children


async def _sample_all(
    job: Job,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    urls: list[str],
    servers: list[Child],
    journal: Journal,
    console: SamplingConsole,
) -> None:
    """``job.concurrency`` prompts under way at once.

    servers: the engines at ``urls`` where this command started them. Raises ProcessError when one dies, EngineError
    when all fail for good or their weights change, StoppedBySignal.
    """
    with signals_cancel():
        async with AsyncExitStack() as stack:
            images = ImageFolder(job.images)
            pool = new_pool(stack, "rollout", job.engine, job.server, urls, images=images)
            verifiers = VerifierPool(job.verifiers)
            stack.push_async_callback(verifiers.close)
            for client in [] if servers else pool.clients:
                console.attached(client.url)
                await client.wait_until_ready(job.engine.start_timeout_s)
                await _note_another_model(client, job, console)
            seed = job.seed if job.engine.deterministic else None
            engine = RolloutEngine(pool, tokenizer, job.attempts, seed=seed)
            todo = iter([prompt for prompt in prompts if prompt.id not in journal.done])
            jobs = [_work(job, todo, engine, verifiers, journal, console) for _ in range(job.concurrency)]
            console.sampling(len(journal.done), len(prompts))
            await _all_or_first_failure(jobs, _until_death(servers))
    if journal.weights != -1:
        console.note(f"{pool.where} has refreshed weights (version {journal.weights}), not those of {job.shown}")


async def _all_or_first_failure(work: Sequence[Coroutine], watch: Coroutine) -> None:
    """Wait for all of ``work``, or raise the first failure of it or of ``watch``; nothing goes on afterwards."""
    tasks, watching = [asyncio.create_task(part) for part in work], asyncio.create_task(watch)
    together = asyncio.gather(*tasks)
    try:
        await asyncio.wait({together, watching}, return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        together.result()
    finally:
        for task in (*tasks, watching):  # not only together: a gathering that has failed no longer cancels its parts
            task.cancel()
        await asyncio.gather(*tasks, watching, together, return_exceptions=True)


async def _until_death(servers: list[Child]) -> None:
    """Raise ProcessError when one of ``servers`` ends; never return."""
    while not (dead := [server for server in servers if server.returncode is not None]):
        await asyncio.sleep(POLL_S)
    raise death(dead[0])


async def _work(
    job: Job,
    todo: Iterator[Prompt],
    engine: RolloutEngine,
    verifiers: VerifierPool,
    journal: Journal,
    console: SamplingConsole,
) -> None:
    """One prompt after another, until there are no more."""
    for prompt in todo:
        journal.add(await _sample(job, prompt, engine, verifiers), engine.replicas.where)
        console.sampled()


async def _sample(job: Job, prompt: Prompt, engine: RolloutEngine, verifiers: VerifierPool) -> Sampled:
    draw = job.draws[prompt.domain]
    rollouts = await engine.sample_group(
        prompt,
        0,
        draw.samples,
        draw.max_new_tokens,
        temperature=draw.temperature,
        top_p=draw.top_p,
        top_k=draw.top_k,
    )
    versions = {int(version) for rollout in rollouts for version in rollout.versions}
    if len(versions) != 1:
        raise EngineError(
            "The server's weights changed while a prompt was sampled",
            where=f"{engine.replicas.where}, prompt {prompt.id}",
            got=f"weight versions {sorted(versions)}",
            expected="one version",
        )
    verdicts = await asyncio.gather(*(verifiers.verify(prompt, r.text) for r in rollouts))
    return Sampled(
        id=prompt.id,
        outcomes=[int(verdict.outcome) for verdict in verdicts],
        lengths=[len(rollout.token_ids) for rollout in rollouts],
        cut=[int(rollout.finish_reason == "length") for rollout in rollouts],
        weights=versions.pop(),
        unknown=[verdict.reason for verdict in verdicts if verdict.outcome == Outcome.UNKNOWN],
        texts=[rollout.text for rollout in rollouts] if job.keep_texts else [],
    )


async def _note_another_model(client: SGLangClient, job: Job, console: SamplingConsole) -> None:
    """An attached server may hold another model, or the same under another path: only the user can tell."""
    served = (await client.server_info()).get("model_path")
    if served is not None and Path(served).absolute() != job.model.absolute():
        console.note(f"{client.url} serves {served}; the responses are stored as those of {job.shown}")
