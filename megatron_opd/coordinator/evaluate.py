"""Accuracy on held-out prompts, by domain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.records import Outcome, Prompt
from megatron_opd.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class Accuracy:
    """Share of correct responses of one model in one domain; unknown outcomes are in neither part."""

    correct: int
    graded: int
    unknown: int
    tokens: int  # generated for it

    @property
    def value(self) -> float | None:
        """None when nothing could be graded."""
        return self.correct / self.graded if self.graded else None

    @property
    def standard_error(self) -> float | None:
        """Of a binomial share; samples of one prompt are taken as independent."""
        value = self.value
        return None if value is None else (value * (1 - value) / self.graded) ** 0.5


@dataclass(frozen=True)
class Graded:
    """What one model made of one held-out prompt."""

    prompt: Prompt
    outcomes: list[Outcome]
    tokens: int  # generated for it
    versions: tuple[int, int]  # oldest and newest of the weights that drew a token


async def evaluate(
    engine: RolloutEngine,
    verifiers: VerifierPool,
    prompts: Sequence[Prompt],
    config: Config,
    advance: Callable[[], None] = lambda: None,
    most: int | None = None,
) -> list[Graded]:
    """Outcomes of the model behind ``engine`` on each of ``prompts``; ``advance`` is called for each that is graded.

    most: prompts under way at once; None: all. Raises EngineError when it does not answer.
    """
    settings, places = config.evaluation, asyncio.Semaphore(most or max(1, len(prompts)))

    async def grade(prompt: Prompt) -> Graded:
        async with places:
            return await _grade(prompt)

    async def _grade(prompt: Prompt) -> Graded:
        rollouts = await engine.sample_group(
            prompt, 0, settings.samples_per_prompt, config.rollout.max_new_tokens, temperature=settings.temperature
        )
        verdicts = await asyncio.gather(*(verifiers.verify(prompt, r.text) for r in rollouts))
        outcomes = [verdict.outcome for verdict in verdicts]
        advance()
        tokens = sum(len(rollout.token_ids) for rollout in rollouts)
        versions = [version for r in rollouts for version in (int(r.versions.min()), int(r.versions.max()))]
        return Graded(prompt, outcomes, tokens, (min(versions), max(versions)))

    return await asyncio.gather(*(grade(prompt) for prompt in prompts))


def accuracies(graded: Sequence[Graded]) -> dict[str, Accuracy]:
    """Accuracy by domain."""
    domains = sorted({item.prompt.domain for item in graded})
    return {domain: _accuracy([item for item in graded if item.prompt.domain == domain]) for domain in domains}


def _accuracy(graded: Sequence[Graded]) -> Accuracy:
    outcomes = [outcome for item in graded for outcome in item.outcomes]
    correct, unknown = outcomes.count(Outcome.CORRECT), outcomes.count(Outcome.UNKNOWN)
    return Accuracy(correct, len(outcomes) - unknown, unknown, sum(item.tokens for item in graded))


def first_of_each_domain(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first ``limit`` prompts of each domain, in file order; all when it is None."""
    kept: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        kept[prompt.domain] = kept.get(prompt.domain, 0) + 1
        if limit is None or kept[prompt.domain] <= limit:
            chosen.append(prompt)
    return chosen
