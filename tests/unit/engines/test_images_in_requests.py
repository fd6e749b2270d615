"""Images on their way to a server: collapsed, left out, read from their files, and never more than a request holds."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from megatron_opd.engines import images as images_module
from megatron_opd.engines.images import ImageFolder, collapsed, without_images
from megatron_opd.engines.vllm import VLLMClient
from megatron_opd.errors import DataError, EngineError
from megatron_opd.records import Image, Prompt
from megatron_opd.runtime.vision import image_file

START, END, PAD = 90, 91, 92
FIRST, SECOND = Image("a" * 64, 2, 2, start=2), Image("b" * 64, 1, 3, start=8)
IDS = (5, START, PAD, PAD, PAD, PAD, END, START, PAD, PAD, PAD, END, 6, 7)


def store(folder: Path, content: bytes) -> Image:
    digest = hashlib.sha256(content).hexdigest()
    image_file(folder, digest).parent.mkdir(parents=True, exist_ok=True)
    image_file(folder, digest).write_bytes(content)
    return Image(digest, 1, 1, 0)


def test_each_image_is_one_placeholder_in_a_request() -> None:
    assert collapsed([*IDS, 8], (FIRST, SECOND)).tolist() == [5, START, PAD, END, START, PAD, END, 6, 7, 8]
    assert collapsed([5, 6], ()).tolist() == [5, 6]


def test_a_placeholder_without_an_image_is_refused() -> None:
    with pytest.raises(EngineError, match="placeholder") as caught:
        collapsed([*IDS, 8, PAD], (FIRST, SECOND))
    assert caught.value.kind == "image_layout" and "3 placeholders" in str(caught.value.got)


def test_a_model_without_vision_is_asked_without_images_and_their_marks() -> None:
    one = Prompt("p", "math", "", (5, START, PAD, PAD, END, 6), "", images=(Image("a" * 64, 1, 2, start=2),))
    assert without_images(one) == (5, 6)
    assert without_images(Prompt("p", "math", "", (5, 6, 7), "")) == (5, 6, 7)


async def test_an_image_is_its_file_in_base64_and_is_read_once(tmp_path: Path, monkeypatch) -> None:
    image, folder = store(tmp_path, b"png"), ImageFolder(tmp_path)
    reads, read = [], images_module._read

    def counted(path: Path, digest: str) -> str:
        reads.append(path)
        return read(path, digest)

    monkeypatch.setattr(images_module, "_read", counted)
    expected = base64.b64encode(b"png").decode()
    assert await folder.encoded([image, image]) == [expected, expected]
    assert await folder.encoded([image]) == [expected] and len(reads) == 1


async def test_what_is_remembered_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images_module, "REMEMBERED_BYTES", 10)
    folder = ImageFolder(tmp_path)
    for content in (b"first", b"second", b"third"):
        await folder.encoded([store(tmp_path, content)])
    assert list(folder._remembered.values()) == [base64.b64encode(b"third").decode()] and folder._size == 8


async def test_an_image_that_is_only_sent_to_try_a_server_is_in_no_file(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path)
    digest = folder.keep(b"probe")
    assert await folder.encoded([Image(digest, 1, 1, 0)]) == [base64.b64encode(b"probe").decode()]
    assert list(tmp_path.iterdir()) == []


async def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    image, folder = store(tmp_path, b"png"), ImageFolder(tmp_path)
    image_file(tmp_path, image.hash).write_bytes(b"pn")
    with pytest.raises(DataError, match=image.hash) as damaged:
        await folder.encoded([image])
    assert damaged.value.got == "2 bytes"
    image_file(tmp_path, image.hash).unlink()
    with pytest.raises(DataError, match=image.hash):
        await folder.encoded([image])


async def test_a_request_has_a_limit(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images_module, "REQUEST_BYTES", 7)
    folder = ImageFolder(tmp_path)
    await folder.encoded([store(tmp_path, b"png")])
    with pytest.raises(EngineError, match="max_pixels") as caught:
        await folder.encoded([store(tmp_path, b"png"), store(tmp_path, b"abc")])
    assert caught.value.kind == "too_large"


async def test_vllm_is_not_asked_about_images() -> None:
    client = VLLMClient("http://127.0.0.1:9", timeout_s=1, max_concurrency=1)
    with pytest.raises(EngineError, match="only sent to SGLang"):
        await client.prompt_logprobs(IDS, 13, images=(FIRST,))
    await client.close()
