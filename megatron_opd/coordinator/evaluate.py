"""Accuracy on held-out prompts, by domain."""

from __future__ import annotations

import asyncio
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


async def evaluate(
    engine: RolloutEngine, verifiers: VerifierPool, prompts: list[Prompt], config: Config
) -> dict[str, Accuracy]:
    """Accuracy of the model behind ``engine`` on ``prompts``, by domain. Raises EngineError when it does not answer."""
    settings = config.evaluation

    async def grade(prompt: Prompt) -> tuple[str, list[Outcome], int]:
        rollouts = await engine.sample_group(
            prompt, 0, settings.samples_per_prompt, config.rollout.max_new_tokens, settings.temperature
        )
        verdicts = await asyncio.gather(*(verifiers.verify(prompt.domain, r.text, prompt.answer) for r in rollouts))
        return prompt.domain, [verdict.outcome for verdict in verdicts], sum(len(r.token_ids) for r in rollouts)

    graded = await asyncio.gather(*(grade(prompt) for prompt in prompts))
    return {
        domain: _accuracy([row for row in graded if row[0] == domain]) for domain in sorted({p.domain for p in prompts})
    }


def _accuracy(rows: list[tuple[str, list[Outcome], int]]) -> Accuracy:
    outcomes = [outcome for _, outcomes, _ in rows for outcome in outcomes]
    correct, unknown = outcomes.count(Outcome.CORRECT), outcomes.count(Outcome.UNKNOWN)
    return Accuracy(correct, len(outcomes) - unknown, unknown, sum(tokens for _, _, tokens in rows))


def first_of_each_domain(prompts: list[Prompt], limit: int | None) -> list[Prompt]:
    """The first ``limit`` prompts of each domain, in file order; all when it is None."""
    kept: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        kept[prompt.domain] = kept.get(prompt.domain, 0) + 1
        if limit is None or kept[prompt.domain] <= limit:
            chosen.append(prompt)
    return chosen
