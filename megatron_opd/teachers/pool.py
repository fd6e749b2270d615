"""Domain to teacher: routes each verified rollout to the expert of its domain, and to the free reference."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Rollout, Scored, Verified
from megatron_opd.runtime.http import with_retries
from megatron_opd.teachers.scoring import Scores, score


@dataclass(frozen=True)
class Teacher:
    """One frozen model behind one server."""

    domain: str  # that it is the expert of; of the free reference only a name
    client: SGLangClient
    vocab_size: int


class TeacherPool:
    """All frozen models of a run.

    ``reference`` scores every rollout as well, whatever its domain; None without one. ``top_k``: most likely tokens
    that are fetched of a teacher at each position, never of the reference; 0 fetches none.
    """

    def __init__(self, teachers: list[Teacher], attempts: int, *, reference: Teacher | None, top_k: int) -> None:
        self.teachers = {teacher.domain: teacher for teacher in teachers}
        self.reference = reference
        self._attempts = attempts
        self._top_k = top_k

    async def score(self, verified: Verified) -> Scored | Dropped:
        """The rollout with its log-probs, or why one of them is missing. Never a number in their place."""
        rollout = verified.rollout
        teacher = self.teachers[rollout.prompt.domain]
        calls = [self._ask(teacher, rollout, self._top_k)]
        if self.reference is not None:
            calls.append(self._ask(self.reference, rollout, 0))
        answers = await asyncio.gather(*calls)
        for answer in answers:
            if isinstance(answer, Dropped):
                return answer
        reference_logprobs = None if self.reference is None else answers[1].logprobs
        return Scored(verified, teacher.domain, answers[0].logprobs, reference_logprobs, answers[0].top)

    async def _ask(self, teacher: Teacher, rollout: Rollout, top_k: int) -> Scores | Dropped:
        prompt_ids = np.array(rollout.prompt.token_ids, dtype=np.int64)
        try:
            return await with_retries(
                self._attempts,
                lambda: score(teacher.client, prompt_ids, rollout.token_ids, teacher.vocab_size, top_k),
            )
        except EngineError as error:
            return Dropped(rollout.prompt.id, rollout.prompt.domain, "score", f"{teacher.domain}: {error}")
