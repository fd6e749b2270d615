"""The pool: a rollout leaves it with every log-prob that was asked for, or as a typed drop."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
from fake_scorer import (
    IDS,
    PROMPT,
    RESPONSE,
    SAMPLED,
    VALUES,
    VOCAB,
    FakeScorer,
    good_reply,
    reply_with_rows,
    rows_with,
)
from pools import pool_of

from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.runtime.http import TransientError
from megatron_opd.teachers.pool import Teacher, TeacherPool


def verified(domain: str = "math") -> Verified:
    prompt = Prompt("p7", domain, "?", tuple(PROMPT.tolist()), "1")
    rollout = Rollout(prompt, 0, RESPONSE, np.zeros(3, np.float32), np.zeros(3, np.int64), "stop", "")
    return Verified(rollout, Outcome.CORRECT, "equal")


def teacher(domain: str, *clients: FakeScorer) -> Teacher:
    return Teacher(domain, pool_of(*clients), VOCAB, {})


def pool(
    client: FakeScorer, reference: FakeScorer | None = None, attempts: int = 2, top_k: int = 0, vocab: int = VOCAB
) -> TeacherPool:
    free = teacher("reference", reference) if reference else None
    return TeacherPool([teacher("math", client)], attempts, reference=free, top_k=top_k, student_vocab_size=vocab)


async def test_a_broken_answer_becomes_a_typed_drop_with_its_reason() -> None:
    result = await pool(FakeScorer(good_reply(prompt_tokens=5)), attempts=3).score(verified())
    assert isinstance(result, Dropped) and (result.prompt_id, result.stage) == ("p7", "score")
    assert "prompt length" in result.reason and result.reason.startswith("math: ")


async def test_a_passing_failure_is_tried_again() -> None:
    client = FakeScorer(TransientError("503"), good_reply())
    result = await pool(client).score(verified())
    assert isinstance(result, Scored) and result.teacher == "math"
    assert result.reference_logprobs is None and result.top is None
    assert len(client.requests) == 2


async def test_a_lasting_failure_is_a_drop_after_the_last_attempt() -> None:
    client = FakeScorer(TransientError("503"), TransientError("503"))
    result = await pool(client).score(verified())
    assert isinstance(result, Dropped) and len(client.requests) == 2


async def test_the_reference_scores_every_domain_and_is_asked_for_no_rows() -> None:
    other = good_reply(input_token_logprobs=rows_with(1, [-2.5, 8, None]))
    math, code, free = FakeScorer(reply_with_rows()), FakeScorer(reply_with_rows()), FakeScorer(other, other)
    teachers = [teacher("math", math), teacher("code", code)]
    both = TeacherPool(teachers, 1, reference=teacher("reference", free), top_k=3, student_vocab_size=VOCAB)
    for domain in ("math", "code"):
        result = await both.score(verified(domain))
        assert result.teacher == domain and result.teacher_logprobs.tolist() == SAMPLED
        assert result.reference_logprobs.tolist() == [-2.5, -1.5, -4.5]
        assert (result.top.ids == IDS).all() and (result.top.logprobs == VALUES).all()
    assert [client.requests[0][2] for client in (math, code)] == [3, 3]
    assert [top_k for _, _, top_k in free.requests] == [0, 0]


async def test_broken_rows_are_a_drop_too() -> None:
    result = await pool(FakeScorer(reply_with_rows(IDS, VALUES[:, ::-1])), top_k=3).score(verified())
    assert isinstance(result, Dropped) and "largest first" in result.reason


async def test_a_failed_reference_is_a_drop_that_names_it() -> None:
    answer = good_reply(input_token_logprobs=rows_with(1, [0.5, 8, None]))
    result = await pool(FakeScorer(good_reply()), FakeScorer(answer)).score(verified())
    assert isinstance(result, Dropped) and result.reason.startswith("reference: ")
    assert "at most 0" in result.reason


async def test_a_failed_teacher_is_a_drop_though_the_reference_answers() -> None:
    client = FakeScorer(TransientError("503"), TransientError("503"))
    result = await pool(client, FakeScorer(good_reply())).score(verified())
    assert isinstance(result, Dropped) and result.reason.startswith("math: 503")


async def test_teacher_and_reference_are_asked_at_the_same_time() -> None:
    started, both = [], asyncio.Event()

    class Waiting(FakeScorer):
        async def prompt_logprobs(self, *arguments: object, **options: object) -> dict:
            started.append(self)
            if len(started) == 2:
                both.set()
            await asyncio.wait_for(both.wait(), 5)
            return await super().prompt_logprobs(*arguments, **options)

    result = await pool(Waiting(good_reply()), Waiting(good_reply())).score(verified())
    assert isinstance(result, Scored) and len(started) == 2


async def test_a_likely_token_that_the_student_does_not_have_is_a_drop() -> None:
    largest = int(IDS.max())
    result = await pool(FakeScorer(reply_with_rows()), top_k=3, vocab=largest).score(verified())
    assert isinstance(result, Dropped) and "not in the student's vocabulary" in result.reason
    assert isinstance(await pool(FakeScorer(reply_with_rows()), top_k=3, vocab=largest + 1).score(verified()), Scored)


class HeldScorer(FakeScorer):
    """Answers when it is let."""

    def __init__(self, *replies: object) -> None:
        super().__init__(*replies)
        self.asked, self.go = 0, asyncio.Event()

    async def prompt_logprobs(self, token_ids: list[int], start: int, top_k: int = 0, images: tuple = ()) -> dict:
        self.asked += 1
        await self.go.wait()
        return await super().prompt_logprobs(token_ids, start, top_k, images)


async def asked_at_first(client: HeldScorer, *groups: int, caches: bool = True, prompt: int = 3) -> tuple[int, list]:
    """Requests of these groups' samples that are sent before the first answer; and what became of all."""
    pool = TeacherPool(
        [Teacher("math", pool_of(client), VOCAB, {}, caches_prompts=caches)],
        1,
        reference=None,
        top_k=0,
        student_vocab_size=VOCAB,
    )
    item = verified()
    item = replace(
        item, rollout=replace(item.rollout, prompt=replace(item.rollout.prompt, token_ids=(5, 6, 7)[-prompt:]))
    )
    items = [replace(item, rollout=replace(item.rollout, group=group)) for group in groups]
    scoring = asyncio.gather(*map(pool.score, items))
    await asyncio.sleep(0.01)
    asked = client.asked
    client.go.set()
    return asked, await asyncio.wait_for(scoring, 10)


async def test_one_sample_of_each_group_goes_first_and_its_failure_holds_nobody_back() -> None:
    client = HeldScorer(TransientError("503"), *[good_reply() for _ in range(4)])
    asked, found = await asked_at_first(client, 1, 2, 1, 2, 1)
    assert asked == 2 and client.asked == 5
    assert [type(one) for one in found] == [Dropped, *[Scored] * 4]


async def test_nothing_is_held_back_where_it_gains_nothing() -> None:
    """A server without a cache of prompts, and a response that is longer than its prompt."""
    replies = [good_reply() for _ in range(3)]
    assert (await asked_at_first(HeldScorer(*replies), 1, 1, 1, caches=False))[0] == 3
    shorter = [good_reply(prompt_tokens=5, cached_tokens=1) for _ in range(3)]
    asked, found = await asked_at_first(HeldScorer(*shorter), 1, 1, 1, prompt=2)
    assert asked == 3 and all(isinstance(one, Scored) for one in found)
