"""Sampling and judging every prompt that the journal lacks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import Config
from megatron_opd.difficulty.console import DifficultyConsole
from megatron_opd.difficulty.journal import Journal, Sampled
from megatron_opd.engines.connect import new_pool
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Outcome, Prompt
from megatron_opd.runtime.process import Child
from megatron_opd.runtime.supervision import POLL_S, death, signals_cancel
from megatron_opd.verifiers.pool import VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


async def sample_all(
    config: Config,
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    urls: list[str],
    servers: list[Child],
    journal: Journal,
    console: DifficultyConsole,
) -> None:
    """Put every prompt that is not in ``journal`` into it, ``difficulty.concurrency`` of them under way at once.

    servers: the engines at ``urls`` where this run started them. Raises ProcessError when one dies, EngineError when
    all fail for good or their weights change, StoppedBySignal.
    """
    with signals_cancel():
        async with AsyncExitStack() as stack:
            pool = new_pool(stack, "rollout", config.engine, config.rollout.server, urls)
            verifiers = VerifierPool(config.verifiers)
            stack.push_async_callback(verifiers.close)
            for client in [] if servers else pool.clients:
                console.attached(client.url)
                await client.wait_until_ready(config.engine.start_timeout_s)
                await _note_another_model(client, config, console)
            engine = RolloutEngine(pool, tokenizer, config.scoring.attempts, seed=config.sampling_seed)
            todo = iter([prompt for prompt in prompts if prompt.id not in journal.done])
            jobs = [
                _work(config, todo, engine, verifiers, journal, console) for _ in range(config.difficulty.concurrency)
            ]
            console.sampling(len(journal.done), len(prompts))
            await _all_or_first_failure(jobs, _until_death(servers))
    if journal.weights != -1:
        console.note(
            f"{pool.where} has refreshed weights (version {journal.weights}), not those of {config.student.model}"
        )


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
    config: Config,
    todo: Iterator[Prompt],
    engine: RolloutEngine,
    verifiers: VerifierPool,
    journal: Journal,
    console: DifficultyConsole,
) -> None:
    """One prompt after another, until there are no more."""
    for prompt in todo:
        journal.add(await _sample(config, prompt, engine, verifiers), engine.replicas.where)
        console.sampled()


async def _sample(config: Config, prompt: Prompt, engine: RolloutEngine, verifiers: VerifierPool) -> Sampled:
    options = config.difficulty
    rollouts = await engine.sample_group(
        prompt,
        0,
        options.samples,
        config.rollout.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
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
        tokens=sum(len(rollout.token_ids) for rollout in rollouts),
        cut=sum(rollout.finish_reason == "length" for rollout in rollouts),
        weights=versions.pop(),
        unknown=[verdict.reason for verdict in verdicts if verdict.outcome == Outcome.UNKNOWN],
    )


async def _note_another_model(client: SGLangClient, config: Config, console: DifficultyConsole) -> None:
    """An attached server may hold another model, or the same under another path: only the user can tell."""
    served = (await client.server_info()).get("model_path")
    if served is not None and Path(served).absolute() != config.student.model.absolute():
        console.note(f"{client.url} serves {served}; the samples are stored as those of {config.student.model}")
