"""One scoring contract, both real engines: SGLang and vLLM give the log-probs of transformers, and say whose they are.

The vLLM half needs vLLM's environment, `make .venv-vllm`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.engines.client import EngineClient
from megatron_opd.engines.connect import new_client
from megatron_opd.engines.sampling import Sampling
from megatron_opd.errors import EngineError
from megatron_opd.teachers.handshake import Expected, check_again, shake_hands
from megatron_opd.teachers.scoring import ScoringError, score, score_request

from runs import ROOT

MODEL = ROOT / "tools" / "toy" / "models" / "math"
VOCAB, TOP_K = 512, 5
TOLERANCE = 1e-4  # float32, and log-probs down to -15
PROMPT = np.array([1, 270, 300, 40, 41, 42, 60, 2, 1, 280])


@pytest.fixture(params=["sglang", "vllm"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[EngineClient]:
    """A client of either engine, as a run makes it."""
    sglang = request.param == "sglang"
    url = request.getfixturevalue("servers").math if sglang else request.getfixturevalue("vllm_url")
    client = new_client(EngineConfig(), ServerConfig(engine=request.param, urls=[url]), url)
    yield client
    await client.close()


@pytest.fixture(scope="session")
def model() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def expected(client: EngineClient, **changes: object) -> Expected:
    values = {
        "role": "teachers.math",
        "model": MODEL,
        "server": ServerConfig(urls=[client.url]),
        "vocab_size": VOCAB,
        "longest": 2048,
        "top_k": TOP_K,
        "tolerance": 1e-3,
    }
    return Expected(**(values | changes))


def all_logprobs(model: torch.nn.Module, prompt: np.ndarray, response: np.ndarray) -> np.ndarray:
    """[R, vocabulary], in the place of each token of the response."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt.tolist(), *response.tolist()]])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].numpy()


def response_of(length: int) -> np.ndarray:
    response = np.random.default_rng(length).integers(0, VOCAB, length)
    response[-1] = VOCAB - 1  # SGLang echoes the vocabulary's last id as 0
    return response


@pytest.mark.parametrize("top_k", [0, TOP_K])
@pytest.mark.parametrize("length", [1, 2, 57, 300])
async def test_scores_and_rows_equal_transformers_cold_and_warm(client, model, length: int, top_k: int) -> None:
    response = response_of(length)
    table, served = all_logprobs(model, PROMPT, response), await client.served()
    for _ in range(2):
        scores = await score(client, score_request(PROMPT, response, VOCAB, top_k), served)
        assert np.abs(scores.logprobs - table[range(length), response]).max() <= TOLERANCE
        assert 0 < scores.prefilled <= len(PROMPT) + length
        if top_k:
            largest = -np.sort(-table, axis=1)[:, :top_k]
            assert np.abs(scores.top.logprobs - largest).max() <= TOLERANCE
            assert np.abs(np.take_along_axis(table, scores.top.ids, axis=1) - largest).max() <= TOLERANCE


async def test_answers_to_many_requests_at_once_do_not_mix(client, model) -> None:
    jobs = [(response_of(length), k) for length in (3, 8, 21) for k in (0, TOP_K)]
    answers = await asyncio.gather(*(score(client, score_request(PROMPT, ids, VOCAB, k)) for ids, k in jobs))
    for (ids, k), scores in zip(jobs, answers, strict=True):
        table = all_logprobs(model, PROMPT, ids)
        assert np.abs(scores.logprobs - table[range(len(ids)), ids]).max() <= TOLERANCE
        assert (scores.top is None) == (k == 0)


async def test_a_server_proves_itself_and_may_come_back(client) -> None:
    proven, mistakes = await shake_hands(expected(client), [client])
    assert mistakes == []
    await check_again(expected(client), client, proven[client.url])


async def test_the_model_and_the_longest_request_are_told(client) -> None:
    _, mistakes = await shake_hands(expected(client, model=Path("/models/other"), longest=10**6), [client])
    assert [mistake.kind for mistake in mistakes] == ["model", "too_long"]
    served = await client.served()
    longest = np.full(served.longest - 1, 7)
    await score(client, score_request(longest, np.array([8]), VOCAB, 0), served)  # it takes what it says it takes


async def test_an_answer_names_its_model(client) -> None:
    served = await client.served()
    assert str(MODEL.name) in str(served.reply_model or served.weight_version)
    other = type(served)(
        served.model,
        served.weight_version and "models/code",
        served.longest,
        served.reply_model and "models/code",
    )
    with pytest.raises(ScoringError) as caught:
        await score(client, score_request(PROMPT, response_of(3), VOCAB, 0), other)
    assert caught.value.kind in ("model", "weights")


async def test_a_request_that_is_too_long_is_refused_in_words_and_the_server_lives(client) -> None:
    with pytest.raises(EngineError) as caught:
        await client.prompt_logprobs([7] * 5000, start=0)
    assert caught.value.kind == "refused" and "4096" in str(caught.value)
    await client.check_ready()


async def test_sampled_tokens_score_as_they_were_sampled_at_temperature_1(client) -> None:
    generations = await client.generate(tuple(PROMPT.tolist()), 4, Sampling(16, 1.0, (2,)))
    assert len(generations) == 4
    for generation in generations:
        assert (generation.versions == -1).all()
        scores = await score(client, score_request(PROMPT, generation.token_ids, VOCAB, 0))
        assert np.abs(scores.logprobs - generation.logprobs).max() <= TOLERANCE
