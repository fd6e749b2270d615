"""The real SGLang's top-k rows are those of transformers: of a scored response, and of a sampled one."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import pool_of
from transformers import AutoModelForCausalLM

from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import Sampling, SGLangClient
from megatron_opd.records import Outcome, Prompt, TopRows, Verified
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.teachers.scoring import score, score_request

MODELS = Path(__file__).resolve().parents[2] / "tools" / "toy" / "models"
PROMPT = Prompt("p", "math", "?", (1, 270, 300, 40, 41, 42, 60, 2, 1, 280), "1")
VOCAB = 512
TOLERANCE = 1e-4  # float32, and log-probs down to -15


@pytest.fixture(scope="session")
def models() -> dict[str, torch.nn.Module]:
    """The toy models in transformers, float32."""
    return {
        name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
        for name in ("math", "code")
    }


@pytest.fixture
async def clients(servers) -> AsyncIterator[dict[str, SGLangClient]]:
    urls = {"math": servers.math, "code": servers.code}  # frozen: a run trains the model behind servers.rollout
    async with AsyncExitStack() as stack:
        clients = {name: SGLangClient(url, timeout_s=60, max_concurrency=8) for name, url in urls.items()}
        for client in clients.values():
            stack.push_async_callback(client.close)
        yield clients


def response_of(length: int) -> np.ndarray:
    response = np.random.default_rng(length).integers(0, VOCAB, length)
    response[-1] = VOCAB - 1  # SGLang echoes the vocabulary's last id as 0
    return response


def all_logprobs(model: torch.nn.Module, response: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Log-probs [R, vocabulary] in the place of each response token, without any top-k."""
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT.token_ids, *response.tolist()]])).logits[0] / temperature
    return logits.log_softmax(-1)[len(PROMPT.token_ids) - 1 : -1].numpy()


def assert_top(ids: np.ndarray, expected: np.ndarray, k: int) -> None:
    """``ids`` [R, K] are the K largest of ``expected`` [R, V], in order, wherever that has no tie."""
    order = np.argsort(-expected, axis=1, kind="stable")
    ranked = np.take_along_axis(expected, order, axis=1)
    assert ids.shape == (len(expected), k)
    assert np.abs(np.take_along_axis(expected, ids, axis=1) - ranked[:, :k]).max() <= TOLERANCE
    fence = np.full((len(ranked), 1), np.inf)
    apart = np.abs(np.diff(np.c_[fence, ranked, -fence], axis=1)) > TOLERANCE  # of neighbours in the ranking
    untied = (apart[:, :-1] & apart[:, 1:])[:, :k]
    assert untied.mean() > 0.9 and (ids == order[:, :k])[untied].all()


def assert_rows(top: TopRows, expected: np.ndarray, k: int) -> None:
    assert_top(top.ids, expected, k)
    assert np.abs(top.logprobs - np.take_along_axis(expected, top.ids, axis=1)).max() <= TOLERANCE


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("length", [1, 2, 57, 2500])  # SGLang computes at most 2048 rows at once
async def test_scored_rows_equal_transformers_cold_and_warm(clients, models, k: int, length: int) -> None:
    response = response_of(length)
    expected = all_logprobs(models["math"], response)
    for _ in range(3):  # the prefix cache must change nothing
        scores = await score(clients["math"], score_request(np.array(PROMPT.token_ids), response, VOCAB, k))
        assert_rows(scores.top, expected, k)
        assert np.abs(scores.logprobs - expected[range(length), response]).max() <= TOLERANCE


async def test_a_row_of_the_whole_vocabulary_has_every_id_once_and_the_last_one_unclipped(clients, models) -> None:
    response = response_of(9)
    scores = await score(clients["math"], score_request(np.array(PROMPT.token_ids), response, VOCAB, VOCAB))
    assert (np.sort(scores.top.ids, axis=1) == np.arange(VOCAB)).all()
    expected = np.take_along_axis(all_logprobs(models["math"], response), scores.top.ids, axis=1)
    assert np.abs(scores.top.logprobs - expected).max() <= TOLERANCE


async def test_requests_for_different_numbers_of_tokens_do_not_mix(clients, models) -> None:
    jobs = [(length, k) for length in (3, 8, 21) for k in (0, 1, 5, 16)]
    prompt = np.array(PROMPT.token_ids)
    requests = [score_request(prompt, response_of(length), VOCAB, k) for length, k in jobs]
    answers = await asyncio.gather(*(score(clients["math"], request) for request in requests))
    for (length, k), scores in zip(jobs, answers, strict=True):
        assert (scores.top is None) == (k == 0)
        if k:
            assert_rows(scores.top, all_logprobs(models["math"], response_of(length)), k)


async def test_what_the_server_sends_for_a_prompt(clients) -> None:
    reply = await clients["math"].prompt_logprobs(
        [*PROMPT.token_ids, 8, 9, 2], start=len(PROMPT.token_ids) - 1, top_k=5
    )
    meta = reply["meta_info"]
    assert meta["input_top_logprobs_shape"] == [3, 5] and meta["input_top_logprobs_null_prefix"] == 1
    for name, dtype in (("val", "float32"), ("idx", "int32")):
        assert meta[f"input_top_logprobs_{name}_flat_b64_dtype"] == dtype
        assert len(base64.b64decode(meta[f"input_top_logprobs_{name}_flat_b64"])) == 3 * 5 * 4
    assert "input_top_logprobs" not in meta


@pytest.mark.parametrize("k", [1, 5])
async def test_sampled_rows_equal_transformers(clients, models, k: int) -> None:
    engine = RolloutEngine(pool_of(clients["code"]), load_tokenizer(MODELS / "student"), 1, k)
    rollouts = await engine.sample_group(PROMPT, 0, 4, 24)
    assert len(rollouts) == 4
    for rollout in rollouts:
        assert_top(rollout.top_ids, all_logprobs(models["code"], rollout.token_ids), k)


@pytest.mark.parametrize("sampling", [Sampling(8, 0.0, (2,)), Sampling(8, 2.0, (2,)), Sampling(8, 1.0, (2,), 0.5, 2)])
async def test_sampled_rows_are_of_the_whole_distribution_however_it_is_drawn_from(clients, models, sampling) -> None:
    (generation,) = await clients["code"].generate(PROMPT.token_ids, 1, sampling, 5)
    expected = all_logprobs(models["code"], generation.token_ids, sampling.temperature or 1.0)
    assert_top(generation.top_ids, expected, 5)


async def test_teacher_and_free_reference_score_a_rollout_each_with_its_own_model(clients, models) -> None:
    (rollout,) = await RolloutEngine(pool_of(clients["code"]), load_tokenizer(MODELS / "student"), 1).sample_group(
        PROMPT, 0, 1, 24
    )
    reference = Teacher("reference", pool_of(clients["code"]), VOCAB, {})
    pool = TeacherPool(
        [Teacher("math", pool_of(clients["math"]), VOCAB, {})],
        1,
        reference=reference,
        top_k=5,
        student_vocab_size=VOCAB,
    )
    scored = await pool.score(Verified(rollout, Outcome.CORRECT, "equal"))
    places = range(len(rollout.token_ids)), rollout.token_ids
    math, code = (all_logprobs(models[name], rollout.token_ids) for name in ("math", "code"))
    assert np.abs(scored.teacher_logprobs - math[places]).max() <= TOLERANCE
    assert np.abs(scored.reference_logprobs - code[places]).max() <= TOLERANCE
    assert np.abs(math[places] - code[places]).max() > 0.1  # the two differ, so they cannot have been exchanged
    assert_rows(scored.top, math, 5)
