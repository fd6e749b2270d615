"""Published questions about images, all the way: prepared, read as prompts of a model that sees, and judged."""

from __future__ import annotations

import io
import json
from pathlib import Path

import published
import pyarrow as pa
import pytest
from PIL import Image as Picture
from pyarrow import parquet

from megatron_opd.config import ColumnsConfig, ImagesConfig, PrepareConfig, VerifierConfig
from megatron_opd.data.images import open_store
from megatron_opd.data.reading import ImageReading, PromptReader, read_prompts
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.prepare.command import prepare
from megatron_opd.prepare.console import PrepareConsole
from megatron_opd.records import Outcome, Prompt
from megatron_opd.verifiers.pool import VerifierPool
from tests.support.vision_models import make_vision_model

PLACEHOLDER = 514
CASES = {  # format: record, verifier, a right response, a wrong one
    "chartqa": (published.CHARTQA, "chartqa", r"I count \boxed{14.5}", r"\boxed{16}"),
    "infographicvqa": (published.INFOGRAPHIC, "anls", "<answer>Linkedin</answer>", "<answer>a bar chart</answer>"),
    "openmmreasoner": (
        published.OPENMM | {"reward_model": {"ground_truth": "B"}},
        "choice",
        "So <answer>B</answer>",
        "<answer>C</answer>",
    ),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vision_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def png() -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", (100, 60), (9, 90, 200)).save(buffer, "PNG")
    return buffer.getvalue()


def written(name: str, png: bytes, folder: Path) -> Path:
    """The record of a format in a file of its own, with an image that can be opened."""
    record, source = CASES[name][0], folder / f"{name}.parquet"
    if name == "infographicvqa":
        (folder / record["image_local_name"]).write_bytes(png)
    else:
        column = "image" if "image" in record else "images"
        image = {"bytes": png, "path": "1.png"}
        record = record | {column: image if column == "image" else [image]}
    parquet.write_table(pa.Table.from_pylist([record]), source)
    return source


def prompt_of(file: Path, model: Path, domain: str) -> Prompt:
    store = open_store(model, file.parent / "images", ImagesConfig(), "images")
    columns = ColumnsConfig(id="id", images="images")
    images = ImageReading(store, frozenset({domain}))
    (prompt,) = read_prompts(PromptReader(file, columns, None, {domain}, load_tokenizer(model), 500, images=images))
    return prompt


@pytest.mark.parametrize("name", list(CASES))
async def test_a_question_about_an_image_is_prepared_asked_and_judged(
    name: str, png: bytes, model: Path, tmp_path: Path
) -> None:
    _, verifier, right, wrong = CASES[name]
    out = tmp_path / "out.jsonl"
    prepare(name, [written(name, png, tmp_path)], out, PrepareConfig(domain="seen"), PrepareConsole())
    assert len(json.loads(out.read_text())["images"]) == 1
    prompt = prompt_of(out, model, "seen")
    (image,) = prompt.images
    assert prompt.token_ids.count(PLACEHOLDER) == image.tokens == 2 * 3
    pool = VerifierPool(VerifierConfig(kinds={"seen": verifier}))
    try:
        verdicts = [await pool.verify(prompt, response) for response in (right, wrong)]
    finally:
        await pool.close()
    assert [verdict.outcome for verdict in verdicts] == [Outcome.CORRECT, Outcome.INCORRECT]
