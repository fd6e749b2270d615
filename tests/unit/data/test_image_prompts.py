"""Prompts with images: marks, placeholders, limits, and which domains may have any."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as Picture

from megatron_opd.config import Config, parse_config
from megatron_opd.data.image_tokens import expand
from megatron_opd.data.images import Kept
from megatron_opd.data.inputs import check_inputs, image_domains, open_stream, read_training
from megatron_opd.data.rows import Flaw
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import DataError, OpdError
from megatron_opd.records import Image
from megatron_opd.runtime.vision import image_file, read_vision
from tests.support.vision_models import TEXT_TOKENIZER, make_vision_model

START, END, PLACEHOLDER = 512, 513, 514


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def config(model: Path, tmp_path: Path):
    """Config of a run whose teacher of ``vision`` sees and whose teacher of ``code`` does not."""
    for number, size in enumerate([(64, 64), (96, 64), (64, 128)]):
        Picture.new("RGB", size, (number, 90, 90)).save(tmp_path / f"{number}.png")

    def write(records: list[dict], **data: object) -> Config:
        (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return parse_config(
            {
                "name": "images",
                "output": str(tmp_path / "runs"),
                "steps": 1,
                "student": {"model": str(model)},
                "teachers": {"vision": {"model": str(model)}, "code": {"model": str(TEXT_TOKENIZER)}},
                "verifiers": {"kinds": {"vision": "math", "code": "code"}},
                "data": {"train": str(tmp_path / "train.jsonl"), "columns": {"images": "images"}, **data},
            },
            where=tmp_path,
        )

    return write


def record(prompt: object, images: object = None, domain: str = "vision") -> dict:
    return {"prompt": prompt, "answer": "1", "domain": domain, "images": images}


def read(config: Config) -> list:
    return read_training(config, load_tokenizer(config.student.model))


def test_each_mark_becomes_as_many_placeholders_as_the_image_has_tokens(config, tmp_path: Path) -> None:
    made = config([record("a <image> b <image>", ["0.png", "1.png"])])
    (prompt,) = read(made)
    first, second = prompt.images
    assert [(image.rows, image.columns) for image in prompt.images] == [(2, 2), (2, 3)]
    ids = list(prompt.token_ids)
    assert ids.count(PLACEHOLDER) == first.tokens + second.tokens == 10
    for image in prompt.images:
        end = image.start + image.tokens
        assert ids[image.start - 1 : end + 1] == [START, *[PLACEHOLDER] * image.tokens, END]
        assert image_file(made.images_folder, image.hash).is_file()
    tokenizer = load_tokenizer(made.student.model)
    marks = "<|vision_start|><|image_pad|><|vision_end|>"
    text = f"<|im_start|>user\na {marks} b {marks}<|im_end|>\n<|im_start|>assistant\n"
    assert [i for n, i in enumerate(ids) if i != PLACEHOLDER or ids[n - 1] != PLACEHOLDER] == tokenizer.encode(text)


def test_without_a_mark_images_come_first_in_the_last_message(config) -> None:
    history = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "which?"}]
    marked, plain, listed = read(
        config(
            [
                record([*history, {"role": "user", "content": "<image><image>which?"}], ["0.png", "1.png"]),
                record([*history, {"role": "user", "content": "which?"}], ["0.png", "1.png"]),
                record([*history, {"role": "user", "content": parts}], ["0.png", "1.png"]),
            ]
        )
    )
    assert marked.token_ids == plain.token_ids == listed.token_ids
    assert marked.images == plain.images == listed.images


def test_text_prompts_stay_as_they_are(config, model: Path) -> None:
    plain, empty, code = read(config([record("1+1?"), record("1+1?", []), record("f", domain="code")]))
    tokenizer = load_tokenizer(model)
    assert plain.images == empty.images == code.images == ()
    assert list(plain.token_ids) == tokenizer.encode("<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (record("<image> and <image>", ["0.png"]), "images: got 1 images, expected 2"),
        (record("a", ["gone.png"]), "images: got no file"),
        (record("a", ["train.jsonl"]), "images: got bytes that are no image"),
        (record("a", ["0.png"] * 17), "images: got 17 images, expected at most 16"),
        (record("a <|image_pad|>", ["0.png"]), "prompt: got 2 image placeholders"),
        (record("a <|image_pad|>"), "prompt: got 1 image placeholders"),
        (record("a", ["0.png"], "code"), "images: got an image in the domain 'code'"),
        (record("a", ["0.png"] * 3), "prompt: got 36 tokens, expected at most 30"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(config, bad: dict, what: str) -> None:
    made = config([record("ok", ["0.png"]), bad, record("a", 5)], max_prompt_tokens=30)
    with pytest.raises(DataError) as caught:
        read(made)
    assert f"train.jsonl:2: {what}" in str(caught.value)
    assert "train.jsonl:3: images: got a number: 5" in str(caught.value)


def test_a_streamed_file_and_a_parquet_file_give_the_same_prompts(config, tmp_path: Path) -> None:
    records = [record("a <image>", ["0.png"]) | {"id": "x"}, record("b", ["2.png", "1.png"]) | {"id": "y"}]
    made = config(records, stream={}, columns={"images": "images", "id": "id"})
    stream, _ = open_stream(made, load_tokenizer(made.student.model))
    drawn = {prompt.id: prompt for prompt in stream.take(2)}
    in_memory = made.model_copy(update={"data": made.data.model_copy(update={"stream": None})})
    assert drawn == {prompt.id: prompt for prompt in read(in_memory)}
    stored = [
        item | {"images": [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in item["images"]]}
        for item in records
    ]
    pq.write_table(pa.Table.from_pylist(stored), tmp_path / "train.parquet")
    data = in_memory.data.model_copy(update={"train": tmp_path / "train.parquet"})
    assert drawn == {prompt.id: prompt for prompt in read(in_memory.model_copy(update={"data": data}))}


def test_a_blind_teacher_may_leave_images_out_and_a_blind_reference_forbids_them(config, model: Path) -> None:
    made = config([record("a", ["0.png"], "code")])
    assert image_domains(made) == {"vision"}
    with pytest.raises(OpdError, match="its teacher reads text only"):
        check_inputs(made, load_tokenizer(model))
    blind = made.teachers["code"].model_copy(update={"images": "leave_out"})
    left_out = made.model_copy(update={"teachers": made.teachers | {"code": blind}})
    assert image_domains(left_out) == {"vision", "code"}
    check_inputs(left_out, load_tokenizer(model))
    assert image_domains(left_out.model_copy(update={"reference": made.teachers["code"]})) == set()


def test_a_blind_student_refuses_a_column_of_images(config, model: Path) -> None:
    made = config([record("a", ["0.png"])])
    student = made.student.model_copy(update={"model": TEXT_TOKENIZER})
    with pytest.raises(OpdError, match="cannot see"):
        check_inputs(made.model_copy(update={"student": student}), load_tokenizer(TEXT_TOKENIZER))


def test_placeholders_of_every_size_stand_where_the_template_put_one(model: Path) -> None:
    vision = read_vision(model)
    kept = [Kept("00", 1, 3), Kept("01", 2, 1)]
    ids, images = expand([7, PLACEHOLDER, 8, PLACEHOLDER], kept, vision, "prompt")
    assert ids == [7, *[PLACEHOLDER] * 3, 8, *[PLACEHOLDER] * 2]
    assert images == [Image("00", 1, 3, 1), Image("01", 2, 1, 5)]
    with pytest.raises(Flaw, match="0 image placeholders"):
        expand([7, 8], kept, vision, "prompt")
