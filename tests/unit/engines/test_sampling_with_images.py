"""Sampling after images: what is sent, and answers about another prompt that are refused. A fake server gives them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from pools import pool_of
from test_sglang_client import GOOD

from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sampling import Generation, Sampling
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Image, Prompt

PAD, SAMPLING = 92, Sampling(16, 1.0, (2,))
IDS = (5, 90, PAD, PAD, 91, 6)
ECHOED = (5, 90, 0, 0, 91, 6)


@pytest.fixture
async def asked(fake, tmp_path: Path):
    """The fake server, with a good answer that a test may spoil, a client that has images, and one of these."""
    server, plain = fake
    rows = [[None if place == 0 else -1.0, token, None] for place, token in enumerate(ECHOED)]
    server.answer = copy.deepcopy(GOOD)
    server.answer["meta_info"] |= {"prompt_tokens": 6, "image_tokens": 2, "input_token_logprobs": rows}
    folder = ImageFolder(tmp_path)
    client = SGLangClient(plain.url, timeout_s=5, max_concurrency=4, images=folder)
    yield server, client, Image(folder.keep(b"png"), 1, 2, start=2)
    await client.close()


async def test_one_placeholder_and_the_file_are_sent_and_the_places_are_checked_once(asked) -> None:
    server, client, image = asked
    for _ in range(2):
        (generation,) = await client.generate(IDS, 1, SAMPLING, 0, (image,))
        assert generation.token_ids.tolist() == [8, 9, 2]
    sampled, checked, again = (body for _, body in server.posts)
    assert sampled == again and sampled["input_ids"] == [5, 90, PAD, 91, 6] and sampled["image_data"] == ["cG5n"]
    prompt = {name: checked[name] for name in ("input_ids", "image_data")}
    assert prompt.items() <= sampled.items() and checked["logprob_start_len"] == 0


async def test_the_images_of_several_responses_are_those_of_a_batch(asked) -> None:
    server, client, image = asked
    with pytest.raises(EngineError, match="number of responses"):  # the fake gives one
        await client.generate(IDS, 2, SAMPLING, 0, (image,))
    assert server.posts[0][1]["image_data"] == [["cG5n"]]


WRONG = {
    "fewer tokens": {"prompt_tokens": 5},
    "another account of image tokens": {"image_tokens": 3},
    "a token too few in the echo": {"input_token_logprobs": [[None, token, None] for token in ECHOED[1:]]},
    "another token after the image": {"input_token_logprobs": [[None, token, None] for token in (5, 90, 0, 0, 6, 91)]},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
async def test_an_engine_that_lays_a_prompt_out_differently_is_an_error(asked, change: dict) -> None:
    server, client, image = asked
    server.answer["meta_info"] |= change
    with pytest.raises(EngineError) as caught:
        await client.generate(IDS, 1, SAMPLING, 0, (image,))
    assert caught.value.kind == "image_layout" and client.url in str(caught.value)


async def test_a_client_without_a_folder_of_images_says_so(fake) -> None:
    _, client = fake
    with pytest.raises(EngineError, match="not known where they are"):
        await client.generate(IDS, 1, SAMPLING, 0, (Image("a" * 64, 1, 2, start=2),))


class Sampler:
    """Remembers what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    async def generate(
        self, prompt: tuple, samples: int, sampling: Sampling, top_ids: int, images: tuple
    ) -> list[Generation]:
        self.asked.append((prompt, images))
        return [Generation(np.array([8]), np.zeros(1, np.float32), np.zeros(1, np.int64), "stop", None)] * samples


class Tokenizer:
    eos_token_id = 2

    def decode(self, token_ids: np.ndarray, skip_special_tokens: bool) -> str:
        return str(token_ids.tolist())


@pytest.mark.parametrize("leave_out", [False, True])
async def test_a_prompt_s_images_are_sent_or_left_out(leave_out: bool) -> None:
    client, image = Sampler(), Image("a" * 64, 1, 2, start=2)
    engine = RolloutEngine(pool_of(client), Tokenizer(), 1, leave_out_images=leave_out)
    (rollout,) = await engine.sample_group(Prompt("p", "math", "", IDS, "", images=(image,)), 0, 1, 8)
    assert client.asked == [((5, 6), ()) if leave_out else (IDS, (image,))]
    assert rollout.prompt.token_ids == IDS
