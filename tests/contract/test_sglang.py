"""The real SGLang keeps the contract that the package relies on: sampling, scoring and its sharp edges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_opd.engines.sglang import Sampling, SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.teachers.scoring import score, score_request

ROOT = Path(__file__).resolve().parents[2]
PROMPT = (1, 270, 300, 40, 41, 42, 60, 2, 1, 280)
VOCAB = 512
TOLERANCE = 1e-4  # float32, and log-probs down to -15


@pytest.fixture(scope="session")
def reference() -> torch.nn.Module:
    """The math teacher in transformers, float32."""
    folder = ROOT / "tools" / "toy" / "models" / "math"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
async def client(servers) -> AsyncIterator[SGLangClient]:
    client = SGLangClient(servers.math, timeout_s=60, max_concurrency=8)
    yield client
    await client.close()


def slow_logprobs(model: torch.nn.Module, token_ids: list[int], temperature: float = 1.0) -> np.ndarray:
    """Log-prob of each token but the first."""
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0, :-1] / temperature
    return logits.log_softmax(-1)[range(len(token_ids) - 1), token_ids[1:]].numpy()


async def test_sampled_log_probs_equal_transformers(client: SGLangClient, reference: torch.nn.Module) -> None:
    generations = await client.generate(PROMPT, 4, Sampling(24, 1.0, (2,)))
    assert len(generations) == 4
    for generation in generations:
        expected = slow_logprobs(reference, [*PROMPT, *generation.token_ids.tolist()])[len(PROMPT) - 1 :]
        assert np.abs(generation.logprobs - expected).max() <= TOLERANCE
        assert (generation.versions == -1).all() and len(generation.versions) == len(generation.token_ids)
        stopped = generation.finish_reason == "stop"
        assert (generation.token_ids[-1] == 2) == stopped and (generation.token_ids[:-1] != 2).all()
        assert stopped or len(generation.token_ids) == 24


@pytest.mark.parametrize("length", [1, 2, 57])
async def test_scores_equal_transformers_cold_and_warm(client, reference, length: int) -> None:
    rng = np.random.default_rng(length)
    prompt, response = np.array(PROMPT), rng.integers(0, VOCAB, length)
    response[-1] = VOCAB - 1  # SGLang echoes the vocabulary's last id as 0
    expected = slow_logprobs(reference, [*prompt.tolist(), *response.tolist()])[len(prompt) - 1 :]
    for _ in range(3):  # the prefix cache must change nothing
        values = (await score(client, score_request(prompt, response, VOCAB, 0))).logprobs
        assert values.shape == (length,) and np.abs(values - expected).max() <= TOLERANCE


async def test_the_prefix_cache_serves_the_prompt_of_a_group(client: SGLangClient) -> None:
    prompt = [301, *range(100, 180)]  # no other test's begins like this
    cached = []
    for response in ([200, 201], [210, 211], [220, 221]):
        reply = await client.prompt_logprobs([*prompt, *response], start=len(prompt) - 1)
        cached.append(reply["meta_info"]["cached_tokens"])
    assert cached[0] == 0 and cached[1] == cached[2] == len(prompt) - 1


async def test_prompt_log_probs_ignore_the_temperature_and_sampled_ones_do_not(client, reference) -> None:
    (generation,) = await client.generate(PROMPT, 1, Sampling(8, 2.0, (2,)))
    token_ids = [*PROMPT, *generation.token_ids.tolist()]
    scaled = slow_logprobs(reference, token_ids, temperature=2.0)[len(PROMPT) - 1 :]
    assert np.abs(generation.logprobs - scaled).max() <= TOLERANCE
    plain = slow_logprobs(reference, token_ids)[len(PROMPT) - 1 :]
    scores = await score(client, score_request(np.array(PROMPT), generation.token_ids, VOCAB, 0))
    assert np.abs(scores.logprobs - plain).max() <= TOLERANCE


async def test_a_request_that_the_server_refuses_is_an_engine_error_with_its_words(client: SGLangClient) -> None:
    with pytest.raises(EngineError) as caught:
        await client.generate(tuple(range(3, 500)) * 10, 1, Sampling(4, 1.0, (2,)))  # longer than the context
    assert client.url in str(caught.value) and "40" in str(caught.value)


async def test_a_server_that_is_not_there_is_an_engine_error() -> None:
    client = SGLangClient("http://127.0.0.1:9", timeout_s=5, max_concurrency=1)
    with pytest.raises(EngineError, match="did not answer"):
        await client.server_info()
    await client.close()
