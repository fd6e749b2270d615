"""Whether the run's images reach every model as the pixels and the tokens that the student reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.data.images import pixel_range
from megatron_opd.errors import ConfigError, OpdError
from megatron_opd.runtime.vision import PROCESSOR, Vision, read_vision

# What must be the same, by the words that an error uses.
SAME = {
    "image_token": "id of an image's placeholder",
    "start_token": "id of the token before an image",
    "end_token": "id of the token after an image",
    "patch_size": "patch size",
    "merge_size": "merge size",
    "temporal_size": "temporal patch size",
    "mean": "image mean",
    "std": "image standard deviation",
}


def vision_mistakes(config: Config, frozen: dict[str, TeacherConfig]) -> Iterator[OpdError]:
    """What is wrong with the models that prompts' images are sent to; the models are all there. May raise ModelError.

    frozen: by key. A model without vision is none of them: which prompts may have images is told for each record
    (``data.inputs.image_domains``).
    """
    student = read_vision(config.student.model) if config.data.has_images else None
    if student is None:
        return
    sizes = pixel_range(student, config.data.images)
    yield from _size_mistakes("student.model", config.student.model, student, sizes)
    for key, teacher in frozen.items():
        vision = read_vision(teacher.model) if teacher.images == "send" else None
        if vision is None:
            continue
        if teacher.server.engine == "vllm":
            yield ConfigError(
                "vLLM takes no images beside token ids",
                where=f"{key}.server.engine",
                got="vllm",
                expected="sglang, for a model that is to see the images of its prompts",
                fix=f"set {key}.server.engine=sglang; or {key}.images=leave_out, which costs nothing where no prompt "
                "has an image",
            )
        yield from _setting_mistakes(key, teacher.model, vision, student)
        yield from _size_mistakes(f"{key}.model", teacher.model, vision, sizes)


def _setting_mistakes(key: str, model: Path, vision: Vision, student: Vision) -> Iterator[OpdError]:
    for name, words in SAME.items():
        theirs, ours = getattr(vision, name), getattr(student, name)
        if theirs != ours:
            yield ConfigError(
                f"A teacher reads images differently: {words}",
                where=f"{key}.model, config.json or {PROCESSOR} of {model}",
                got=theirs,
                expected=f"{ours}, as the student has it",
                fix=f"take a teacher of the student's family, or set {key}.images=leave_out",
            )


def _size_mistakes(where: str, model: Path, vision: Vision, sizes: tuple[int, int]) -> Iterator[OpdError]:
    """A server would resize an image outside its own limits, and count other tokens than we do."""
    if not (vision.min_pixels <= sizes[0] and sizes[1] <= vision.max_pixels):
        yield ConfigError(
            "A model's server would resize images again",
            where=f"{where}, {PROCESSOR} of {model}",
            got=f"it takes {vision.min_pixels} to {vision.max_pixels} pixels as they are",
            expected=f"{sizes[0]} to {sizes[1]}, the sizes of the run's images",
            fix="set data.images.min_pixels and data.images.max_pixels to what all models take as it is",
        )
