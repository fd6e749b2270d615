"""Rollouts of given numbers, for tests of the recipe."""

from __future__ import annotations

import numpy as np

from megatron_opd.config import Config, load_config
from megatron_opd.records import Outcome, Prompt, Rollout, Scored, TopRows, Verified

from runs import TOY


def rollout(
    student: list[float], *, outcome: int = 1, group: int = 0, domain: str = "math", finish: str = "stop"
) -> Verified:
    """A verified rollout whose tokens are 10, 11, ... and have these log-probs."""
    prompt = Prompt(f"p{group}", domain, "?", (5, 6), "1")
    ids, versions = np.arange(10, 10 + len(student)), np.zeros(len(student), np.int64)
    sampled = Rollout(prompt, group, ids, np.array(student, np.float32), versions, finish, "", None)
    return Verified(sampled, Outcome(outcome), "because")


def scored(
    student: list[float],
    teacher: list[float],
    *,
    reference: list[float] | None = None,
    top: TopRows | None = None,
    **facts: object,
) -> Scored:
    """The same, scored."""
    free = None if reference is None else np.array(reference, np.float32)
    verified = rollout(student, **facts)
    return Scored(verified, verified.rollout.prompt.domain, np.array(teacher, np.float32), free, top)


def recipe(*overrides: str) -> Config:
    """The toy config as plain distillation, with ``overrides``."""
    return load_config(TOY, ["conf/recipe/opd.yaml", *overrides])
