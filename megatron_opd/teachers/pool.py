"""Domain to teacher: routes each verified rollout to the expert of its domain, and to the free reference."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.images import without_images
from megatron_opd.engines.scores import ScoreRequest, ScoringClient, Served
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Rollout, Scored, Verified
from megatron_opd.runtime.replicas import ReplicaPool
from megatron_opd.teachers.scoring import Scores, ScoringError, UnfitRequest, score, score_request


@dataclass(frozen=True)
class Teacher:
    """One frozen model behind one or more servers."""

    domain: str  # that it is the expert of; of the free reference only a name
    replicas: ReplicaPool[ScoringClient]
    vocab_size: int
    served: dict[str, Served]  # URL to what that replica said of itself at the start
    leaves_out_images: bool = False  # of what it is asked, with their tokens
    lacking: frozenset[int] = frozenset()  # the student's ids that its tokenizer does not have
    placeholders: frozenset[int] = frozenset()  # ids at which its servers look for an image or a video


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

    @property
    def pools(self) -> list[ReplicaPool[ScoringClient]]:
        """The replicas of every model."""
        models = [*self.teachers.values(), *filter(None, [self.reference])]
        return [model.replicas for model in models]

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
        own, reference_logprobs = answers[0], None if self.reference is None else answers[1].logprobs
        return Scored(verified, teacher.domain, own.logprobs, reference_logprobs, own.top, own.prefilled)

    async def _ask(self, teacher: Teacher, rollout: Rollout, top_k: int) -> Scores | Dropped:
        try:
            request = _request(teacher, rollout, top_k)

            async def ask(client: ScoringClient) -> Scores:
                scores = await score(client, request, teacher.served.get(client.url))
                self._check_top_ids(client, scores)
                return scores

            # The key keeps the samples of a group together: one replica's cache then holds their prompt.
            return await teacher.replicas.call(rollout.group, len(request.token_ids), self._attempts, ask)
        except EngineError as error:
            prompt = rollout.prompt
            return Dropped(prompt.id, prompt.domain, "score", f"{teacher.domain}: {error}", error.kind)

    def _check_top_ids(self, client: ScoringClient, scores: Scores) -> None:
        largest = -1 if scores.top is None else int(scores.top.ids.max())
        if largest >= self._student_vocab_size:
            expected = f"0..{self._student_vocab_size - 1}"
            raise ScoringError(
                "A likely token of the teacher is not in the student's vocabulary",
                kind="student_vocabulary",
                where=client.url,
                got=largest,
                expected=expected,
            )


def _request(teacher: Teacher, rollout: Rollout, top_k: int) -> ScoreRequest:
    """The rollout as this teacher is asked about it: a response is the same whatever comes before it."""
    prompt = rollout.prompt
    left_out = teacher.leaves_out_images and prompt.images
    found = teacher.placeholders.intersection(rollout.token_ids.tolist()) if prompt.images and not left_out else None
    if found:  # beside an image the server would look for theirs too; in a text without any it does not
        what = "A response contains the placeholder of an image or a video"
        raise UnfitRequest(what, kind="image_layout", got=sorted(found), expected="placeholders in the prompt alone")
    return score_request(
        np.array(without_images(prompt) if left_out else prompt.token_ids, dtype=np.int64),
        rollout.token_ids,
        teacher.vocab_size,
        top_k,
        images=() if left_out else prompt.images,
        lacking=teacher.lacking,
    )
