"""Models, tokenizers and prompt files, as the run would read them."""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

from megatron_opd.config import Config
from megatron_opd.data.images import open_store
from megatron_opd.data.inputs import read_held_out, read_training
from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.doctor.finding import Finding, by_error, by_errors, failed, ok, skipped
from megatron_opd.errors import OpdError
from megatron_opd.records import Prompt
from megatron_opd.runtime.vision import PROCESSOR, read_vision
from megatron_opd.train.preflight import (
    attempt,
    check_model,
    fit_mistakes,
    missing_models,
    model_mistakes,
    models_of,
    tokenizer_mistakes,
)

SHOWN_CHARACTERS = 40
_PIXELS = bytes(range(12))  # of a picture of 2 x 2


def check_models(config: Config) -> Iterator[Finding]:
    """Every folder holds a checkpoint."""
    yield from by_errors("models", missing_models(config), ok("models", f"{len(models_of(config))} checkpoints"))


def check_sizes(config: Config) -> Iterator[Finding]:
    """Divisibility, parallel sizes, schedule, the student's weights, and contexts that are long enough."""
    if _missing(config):
        yield skipped("sizes", "a model is missing")
        return
    student = config.student
    sizes = {"TP": student.tensor_parallel, "PP": student.pipeline_parallel, "CP": student.context_parallel}
    sizes["DP"] = student.data_parallel
    told = " x ".join(f"{name} {count}" for name, count in sizes.items() if count > 1) or "a single rank"
    mistakes = [*model_mistakes(config), *fit_mistakes(config)]
    yield from by_errors("sizes", mistakes, ok("sizes", f"the model fits {told}, its context the longest sequence"))


def check_images(config: Config) -> Iterator[Finding]:
    """The image processors of all models that see are known, and images can be read and written as they have to be."""
    if _missing(config):
        yield skipped("images", "a model is missing")
        return
    blind = [key for key, model in models_of(config).items() if read_vision(model) is None]
    store = open_store(config.student.model, config.images_folder, config.data.images, config.data.columns.images)
    if store is None:
        yield skipped("images", "the student reads none")
        return
    if _copied(_PIXELS) != _PIXELS:
        fix = "install pillow as requirements/trainer-*.txt have it"
        yield failed("images", "Pillow reads other pixels out of a PNG file than it has written", fix=fix)
        return
    side, (smallest, largest) = store.vision.token_pixels, store.pixels
    found = f"{PROCESSOR}: {side} pixels a token, {smallest // side**2} to {largest // side**2} tokens"
    yield ok("images", f"{found}; not seen by {', '.join(blind)}" if blind else found)


def _copied(pixels: bytes) -> bytes:
    """Pixels of 2 x 2 points, written as PNG and read again."""
    file = io.BytesIO()
    Image.frombytes("RGB", (2, 2), pixels).save(file, "PNG")
    with Image.open(file, formats=("PNG",)) as picture:
        return picture.convert("RGB").tobytes()


def check_tokenizers(config: Config) -> Iterator[Finding]:
    """Every teacher has the student's tokenizer and chat template."""
    if _missing(config):
        yield skipped("tokenizers", "a model is missing")
        return
    yield from by_errors("tokenizers", tokenizer_mistakes(config), ok("tokenizers", "all like the student's"))


def check_data(config: Config) -> Iterator[Finding]:
    """Every file is read to its end, as a run does at its start; its first record is shown as the student gets it."""
    if attempt(lambda: check_model("student.model", config.student.model)):
        yield skipped("data", "student.model is missing, which has the tokenizer")
        return
    tokenizer = load_tokenizer(config.student.model)
    for path, read in ((config.data.train, read_training), (config.data.eval, read_held_out)):
        if path is not None:
            try:
                yield ok("data", f"{path.name}: {_told(read(config, tokenizer))}")
            except OpdError as error:
                yield by_error("data", error)
    start = config.data.lazy.start if config.data.lazy else None
    if start is not None:
        yield ok("data", f"{start.name}: {len(read_pass_rates(start))} pass rates")


def _told(prompts: list[Prompt]) -> str:
    first = prompts[0]
    text = " ".join(first.text.split())
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
    return f"{len(prompts):,} records; first: {first.domain}, {len(first.token_ids)} tokens, {shown!r}"


def _missing(config: Config) -> bool:
    return bool(list(missing_models(config)))
