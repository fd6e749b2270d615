"""Domain to teacher: routes each verified rollout to the expert of its domain, and to the free reference."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Rollout, Scored, Verified
from megatron_opd.runtime.http import with_retries
from megatron_opd.teachers.scoring import Scores, ScoringError, score


@dataclass(frozen=True)
class Teacher:
    """One frozen model behind one server."""

    domain: str  # that it is the expert of; of the free reference only a name
    client: SGLangClient
    vocab_size: int


class TeacherPool:
    """All frozen models of a run.

    ``reference`` scores every rollout as well, whatever its domain; None without one. ``top_k``: most likely tokens
    that are fetched of a teacher at each position, never of the reference; 0 fetches none. ``student_vocab_size``: a
    teacher of the same family may have more padding ids than the student; a rollout with such an id in its rows is
    dropped, because the student gives it no probability.
    """

    def __init__(
        self,
        teachers: list[Teacher],
        attempts: int,
        *,
        reference: Teacher | None,
        top_k: int,
        student_vocab_size: int,
    ) -> None:
        self.teachers = {teacher.domain: teacher for teacher in teachers}
        self.reference = reference
        self._attempts = attempts
        self._top_k = top_k
        self._student_vocab_size = student_vocab_size

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
            scores = await with_retries(
                self._attempts,
                lambda: score(teacher.client, prompt_ids, rollout.token_ids, teacher.vocab_size, top_k),
            )
            self._check_top_ids(teacher, scores)
            return scores
        except EngineError as error:
            return Dropped(rollout.prompt.id, rollout.prompt.domain, "score", f"{teacher.domain}: {error}")

    def _check_top_ids(self, teacher: Teacher, scores: Scores) -> None:
        largest = -1 if scores.top is None else int(scores.top.ids.max())
        if largest >= self._student_vocab_size:
            expected = f"0..{self._student_vocab_size - 1}"
            raise ScoringError(
                "A likely token of the teacher is not in the student's vocabulary",
                where=teacher.client.url,
                got=largest,
                expected=expected,
            )
