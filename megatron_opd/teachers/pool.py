"""Domain to teacher: routes each verified rollout to the expert of its domain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Scored, Verified
from megatron_opd.runtime.http import with_retries
from megatron_opd.teachers.scoring import score


@dataclass(frozen=True)
class Teacher:
    """One frozen expert behind one server."""

    domain: str
    client: SGLangClient
    vocab_size: int


class TeacherPool:
    """All teachers of a run."""

    def __init__(self, teachers: list[Teacher], attempts: int) -> None:
        self.teachers = {teacher.domain: teacher for teacher in teachers}
        self._attempts = attempts

    async def score(self, verified: Verified) -> Scored | Dropped:
        """The rollout with its teacher's log-probs, or why there are none. Never a number in their place."""
        rollout = verified.rollout
        teacher = self.teachers[rollout.prompt.domain]
        prompt_ids = np.array(rollout.prompt.token_ids, dtype=np.int64)
        try:
            logprobs = await with_retries(
                self._attempts, lambda: score(teacher.client, prompt_ids, rollout.token_ids, teacher.vocab_size)
            )
        except EngineError as error:
            return Dropped(rollout.prompt.id, rollout.prompt.domain, "score", str(error))
        return Scored(verified, teacher.domain, logprobs)
