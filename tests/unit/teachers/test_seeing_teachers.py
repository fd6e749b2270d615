"""Teachers and images: layouts that differ, the handshake's image, and teachers that see none."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_scorer import FakeScorer, good_reply
from PIL import Image as Picture
from pools import pool_of
from seeing_scorer import VISION, SeeingScorer

from megatron_opd.config import ServerConfig
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Image, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.runtime.vision import image_file
from megatron_opd.teachers.handshake import Expected, check_again, shake_hands
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.teachers.probes import smallest_size

VOCAB = 512
ATTACHED = ServerConfig(urls=["http://fake"])


@pytest.fixture
async def scorer(tmp_path: Path) -> AsyncIterator[tuple[SeeingScorer, SGLangClient, ImageFolder]]:
    server, folder = SeeingScorer(), ImageFolder(tmp_path)
    async with server.running() as url:
        client = SGLangClient(url, timeout_s=10, max_concurrency=4, images=folder)
        yield server, client, folder
        await client.close()


def verified(folder: Path, rows: int = 2, columns: int = 3, response: tuple[int, ...] = (8, 9, 2)) -> Verified:
    """A rollout whose prompt shows a grey image."""
    buffer = io.BytesIO()
    Picture.new("RGB", (columns * 32, rows * 32), (rows, columns, 9)).save(buffer, "PNG")
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    image_file(folder, digest).parent.mkdir(exist_ok=True)
    image_file(folder, digest).write_bytes(buffer.getvalue())
    image = Image(digest, rows, columns, start=3)
    ids = (5, 6, VISION.start_token, *[VISION.image_token] * image.tokens, VISION.end_token, 7)
    ids_, zeros = np.array(response), np.zeros(len(response))
    prompt = Prompt("p1", "math", "?", ids, "1", images=(image,))
    rollout = Rollout(prompt, 0, ids_, zeros.astype(np.float32), zeros.astype(np.int64), "stop", "")
    return Verified(rollout, Outcome.CORRECT, "equal")


def pool(client: object, **facts: object) -> TeacherPool:
    teacher = Teacher("math", pool_of(client), VOCAB, {}, **facts)
    return TeacherPool([teacher], 1, reference=None, top_k=0, student_vocab_size=VOCAB)


async def test_the_places_of_a_new_size_are_checked_once(scorer, tmp_path: Path) -> None:
    server, client, _ = scorer
    teachers = pool(client)
    same = await asyncio.gather(*(teachers.score(verified(tmp_path, response=(8, n, 2))) for n in range(3)))
    assert all(isinstance(scored, Scored) for scored in same)
    starts = [body["logprob_start_len"] for body in server.requests]
    assert sorted(starts) == [0, 10, 10, 10]  # P is 11, and its placeholders count
    assert all(body["input_ids"].count(VISION.image_token) == 1 for body in server.requests)
    await teachers.score(verified(tmp_path, rows=4))
    assert [body["logprob_start_len"] for body in server.requests[4:]] == [16, 0]


FAULTS = {
    "another size": ({"wider": 1}, "11"),
    "another place": ({"late": True}, "at position"),
    "another account": ({"told_more": 1}, "7 of images"),
}


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS.keys())
async def test_a_teacher_that_lays_an_image_out_differently_is_a_typed_drop(scorer, tmp_path, fault, words) -> None:
    server, client, _ = scorer
    vars(server).update(fault)
    dropped = await pool(client).score(verified(tmp_path))
    assert isinstance(dropped, Dropped) and dropped.kind == "image_layout" and words in dropped.reason
    again = await pool(client).score(verified(tmp_path))  # what has failed once is not taken for proven
    assert isinstance(again, Dropped)


def expected(folder: ImageFolder) -> Expected:
    return Expected("teachers.math", Path("models/math"), ATTACHED, VOCAB, 2048, 3, 1e-3, VISION, folder)


async def test_a_model_that_sees_is_tried_with_an_image(scorer) -> None:
    server, client, folder = scorer
    proven, mistakes = await shake_hands(expected(folder), [client])
    assert mistakes == []
    seen = [body for body in server.requests if "image_data" in body]
    start = 16 + 1 + 6 + 1  # random ids, start token, two rows of three placeholders, end token
    asked = [(body["logprob_start_len"], body.get("top_logprobs_num", 0)) for body in seen]
    assert asked == [(start, 3), (0, 0), (start, 0), (start + 15, 0), (start + 31, 0)]  # cold, places, warm, parts
    before = len(server.requests)
    await check_again(expected(folder), client, proven[client.url])
    assert len(server.requests) == before + 2


@pytest.mark.parametrize(("fault", "words"), FAULTS.values(), ids=FAULTS.keys())
async def test_a_server_that_lays_images_out_differently_does_not_start(scorer, fault, words: str) -> None:
    server, client, folder = scorer
    vars(server).update(fault)
    proven, (mistake,) = await shake_hands(expected(folder), [client])
    assert proven == {} and isinstance(mistake, EngineError) and mistake.kind == "image_layout"


@pytest.mark.parametrize("placeholder", [502, 503])
async def test_a_placeholder_in_a_response_is_not_sent_beside_an_image(scorer, tmp_path, placeholder: int) -> None:
    server, client, _ = scorer
    item = verified(tmp_path, response=(8, placeholder, 2))
    dropped = await pool(client, placeholders=frozenset({502, 503})).score(item)
    assert isinstance(dropped, Dropped) and dropped.kind == "image_layout" and str(placeholder) in dropped.reason
    dropped = await pool(client).score(verified(tmp_path, response=(8, 502, 2)))  # whoever asks: nor does the client
    assert isinstance(dropped, Dropped) and dropped.kind == "image_layout" and server.requests == []


async def test_a_teacher_without_vision_scores_the_response_after_the_text_alone(tmp_path: Path) -> None:
    rows = [[None, 7, None], [-0.5, 8, None], [-1.0, 9, None], [-0.25, 2, None]]
    client = FakeScorer(good_reply(input_token_logprobs=rows, prompt_tokens=6))
    scored = await pool(client, leaves_out_images=True).score(verified(tmp_path))
    assert client.requests == [([5, 6, 7, 8, 9, 2], 2, 0)] and client.images == [()]
    assert scored.teacher_logprobs.tolist() == [-0.5, -1.0, -0.25]


async def test_a_token_that_a_teacher_s_tokenizer_lacks_is_a_typed_drop(tmp_path: Path) -> None:
    client, item = FakeScorer(), verified(tmp_path, response=(8, VISION.end_token, 2))
    dropped = await pool(client, leaves_out_images=True, lacking=frozenset({500, 501, 502})).score(item)
    assert dropped.kind == "vocabulary" and "501" in dropped.reason and client.requests == []


@pytest.mark.parametrize(("tokens", "size"), [(1, (1, 2)), (4, (2, 3)), (6, (2, 3)), (64, (8, 9))])
def test_the_probe_s_image_is_the_smallest_that_is_not_square(tokens: int, size: tuple[int, int]) -> None:
    vision = replace(VISION, min_pixels=tokens * 1024)
    assert smallest_size(vision) == size
