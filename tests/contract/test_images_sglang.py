"""A real SGLang sees what transformers sees, counts the tokens that we count, and encodes a group's image once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pools import pool_of
from real_servers import running
from transformers import AutoModelForCausalLM
from vision_models import FAMILIES, make_vision_model
from vision_reference import VisionReference, image_prompt

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.data.tokenizer import lacking_tokens, load_tokenizer
from megatron_opd.engines.connect import new_client
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sampling import Sampling
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Outcome, Rollout, Verified
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.vision import Vision, read_vision
from megatron_opd.teachers.handshake import Expected, check_again, shake_hands
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.teachers.scoring import score, score_request
from megatron_opd.train.roles import replica_roles

from runs import ROOT

VOCAB = 516
TOLERANCE = 1e-4
SIZES = {"none": [], "one": [(2, 4)], "two": [(5, 3), (2, 2)], "wide and again": [(2, 12), (2, 4), (8, 8)]}


@dataclass(frozen=True)
class Served:
    url: str
    model: Path
    images: Path
    vision: Vision
    reference: VisionReference


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A tiny model of each family, behind the server that a run would start as its rollout engine."""
    folder = tmp_path_factory.mktemp(request.param)
    images = tmp_path_factory.mktemp("images")
    model = make_vision_model(folder / "model", request.param)
    url = f"http://127.0.0.1:{free_port()}"
    engine = EngineConfig(max_total_tokens=16384)
    with running(replica_roles(engine, 0, 0, "rollout", ServerConfig(), model, [url]), folder):
        yield Served(url, model, images, read_vision(model), VisionReference(model, images))


@pytest.fixture
async def client(served: Served) -> AsyncIterator[SGLangClient]:
    client = new_client(EngineConfig(), ServerConfig(urls=[served.url]), served.url, ImageFolder(served.images))
    yield client
    await client.close()


def response_of(length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 500, length)


async def sample(client: SGLangClient, served: Served, sizes: list, seed: int, samples: int = 4) -> list[Rollout]:
    """Rollouts without marks of images: this model was never trained not to say them."""
    engine = RolloutEngine(pool_of(client), load_tokenizer(served.model), 1)
    prompt = image_prompt(served.images, served.vision, sizes, seed)
    rollouts = await engine.sample_group(prompt, seed, samples, 12)
    return [rollout for rollout in rollouts if rollout.token_ids.max() < served.vision.start_token]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
async def test_scores_after_images_equal_transformers(client, served: Served, sizes: list) -> None:
    prompt, response = image_prompt(served.images, served.vision, sizes, seed=1), response_of(40, seed=2)
    expected = served.reference.logprobs(prompt, response.tolist())
    ids = np.array(prompt.token_ids)
    for _ in range(2):  # the prefix cache must change nothing
        scores = await score(client, score_request(ids, response, VOCAB, 3, images=prompt.images))
        assert np.abs(scores.logprobs - expected).max() <= TOLERANCE
    blank = replace(prompt, images=(), token_ids=tuple(ids[ids < served.vision.start_token].tolist()))
    if sizes:  # the image is seen at all
        assert np.abs(served.reference.logprobs(blank, response.tolist()) - expected).max() > 0.1


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
async def test_a_model_that_teaches_itself_has_no_gap(client, served: Served, sizes: list) -> None:
    """The null test: sampled log-probs, scores and transformers are the same numbers."""
    rollouts = await sample(client, served, sizes, seed=3)
    teacher = Teacher("math", pool_of(client), VOCAB, {})
    pool = TeacherPool([teacher], 1, reference=None, top_k=0, student_vocab_size=VOCAB)
    assert rollouts
    for rollout in rollouts:
        scored = await pool.score(Verified(rollout, Outcome.UNKNOWN, ""))
        assert np.abs(scored.teacher_logprobs - rollout.logprobs).max() <= TOLERANCE
        expected = served.reference.logprobs(rollout.prompt, rollout.token_ids.tolist())
        assert np.abs(rollout.logprobs - expected).max() <= TOLERANCE


async def test_a_text_that_names_an_image_keeps_its_tokens(client, served: Served) -> None:
    """SGLang takes "<image>" in a text for the place of an image, unless it leaves the tokens as they are."""
    tokenizer = load_tokenizer(served.model)
    prompt = image_prompt(served.images, served.vision, [(2, 4)], seed=9)
    response = np.array(tokenizer.encode("see <image> and <image>", add_special_tokens=False))
    scores = await score(client, score_request(np.array(prompt.token_ids), response, VOCAB, 0, images=prompt.images))
    expected = served.reference.logprobs(prompt, response.tolist())
    assert np.abs(scores.logprobs - expected).max() <= TOLERANCE


async def test_marks_of_images_in_a_text_without_any_are_plain_tokens(client, served: Served) -> None:
    prompt = image_prompt(served.images, served.vision, [], seed=10)
    response = np.array([7, 512, 514, 514, 513, 8, 515, 9])
    for _ in range(2):
        scores = await score(client, score_request(np.array(prompt.token_ids), response, VOCAB, 0))
        expected = served.reference.logprobs(prompt, response.tolist())
        assert np.abs(scores.logprobs - expected).max() <= TOLERANCE


async def test_marks_around_nothing_in_a_response_are_plain_tokens(client, served: Served) -> None:
    prompt, response = image_prompt(served.images, served.vision, [(2, 4)], seed=12), np.array([7, 512, 8, 512, 513, 9])
    scores = await score(client, score_request(np.array(prompt.token_ids), response, VOCAB, 0, images=prompt.images))
    expected = served.reference.logprobs(prompt, response.tolist())
    assert np.abs(scores.logprobs - expected).max() <= TOLERANCE


async def test_a_teacher_without_vision_scores_what_a_model_that_sees_has_said(client, served: Served, servers) -> None:
    """The toy world's math teacher, which has the same text tokens."""
    model = ROOT / "tools" / "toy" / "models" / "math"
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    blind = new_client(EngineConfig(), ServerConfig(urls=[servers.math]), servers.math)
    lacking = frozenset(lacking_tokens(served.model, model))
    teacher = Teacher("math", pool_of(blind), 512, {}, leaves_out_images=True, lacking=lacking)
    pool = TeacherPool([teacher], 1, reference=None, top_k=0, student_vocab_size=VOCAB)
    for rollout in await sample(client, served, SIZES["two"], seed=11):
        scored = await pool.score(Verified(rollout, Outcome.UNKNOWN, ""))
        text = [token for token in rollout.prompt.token_ids if token < served.vision.start_token]
        ids = torch.tensor([[*text, *rollout.token_ids.tolist()]])
        with torch.no_grad():
            table = reference(ids).logits[0, len(text) - 1 : -1].log_softmax(-1).numpy()
        expected = table[range(len(rollout.token_ids)), rollout.token_ids]
        assert np.abs(scored.teacher_logprobs - expected).max() <= TOLERANCE
    await blind.close()


async def test_a_group_s_image_is_encoded_once(client, served: Served) -> None:
    prompt = image_prompt(served.images, served.vision, [(8, 8)], seed=5)
    response, ids = response_of(8, seed=6), np.array(prompt.token_ids)
    cached = []
    for token in range(4):
        reply = await client.prompt_logprobs([*ids, token, *response], len(ids) - 1, images=prompt.images)
        cached.append(reply["meta_info"]["cached_tokens"])
    assert cached[0] == 0 and set(cached[1:]) == {len(ids) - 1} and cached[1] > prompt.images[0].tokens


async def test_the_handshake_tries_an_image(client, served: Served) -> None:
    folder = ImageFolder(served.images)
    client = new_client(EngineConfig(), ServerConfig(urls=[served.url]), served.url, folder)
    server = ServerConfig(urls=[served.url])
    expected = Expected("teachers.math", served.model, server, VOCAB, 1000, 3, 1e-3, served.vision, folder)
    proven, mistakes = await shake_hands(expected, [client])
    assert mistakes == [] and len(proven[client.url].probes[1].images) == 1
    await check_again(expected, client, proven[client.url])
    await client.close()


@pytest.mark.parametrize("mark", ["image_token", "video_token"])
async def test_a_placeholder_in_a_response_is_dropped_and_the_server_lives(client, served: Served, mark: str) -> None:
    prompt = image_prompt(served.images, served.vision, [(2, 4)], seed=7)
    response = np.array([5, getattr(served.vision, mark), 6])
    rollout = Rollout(prompt, 0, response, np.zeros(3, np.float32), np.zeros(3, np.int64), "stop", "")
    teacher = Teacher("math", pool_of(client), VOCAB, {}, placeholders=served.vision.placeholders)
    pool = TeacherPool([teacher], 1, reference=None, top_k=0, student_vocab_size=VOCAB)
    dropped = await pool.score(Verified(rollout, Outcome.UNKNOWN, ""))
    assert isinstance(dropped, Dropped) and dropped.kind == "image_layout"
    await client.check_ready()


async def test_an_image_that_the_server_would_resize_is_told(client, served: Served) -> None:
    prompt = image_prompt(served.images, served.vision, [(1, 2)], seed=8)  # below the smallest size
    with pytest.raises(EngineError) as caught:
        await client.generate(prompt.token_ids, 1, Sampling(4, 1.0, (2,)), 0, prompt.images)
    assert caught.value.kind == "image_layout" and client.url in str(caught.value)
