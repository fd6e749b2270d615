"""Images in a conversation: from marks in its text to the placeholder tokens that a model reads.

text          "Which bar is highest? <image>"
parts         [{"type": "text", "text": "Which bar is highest? "}, {"type": "image"}]
from template [.., start, image, end, ..]
expanded      [.., start, image, image, image, image, end, ..]     for an image of 2 rows and 2 columns
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_opd.data.images import Kept
from megatron_opd.data.rows import Flaw
from megatron_opd.records import Image
from megatron_opd.runtime.vision import Vision

MARK = "<image>"  # where an image belongs in a text; published data sets write it so


def flat_content(content: object) -> object:
    """A message's content as a text with marks; what is no list of image and text parts stays as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    texts = [MARK if part.get("type") in ("image", "image_url") else part.get("text") for part in content]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else content


def with_parts(messages: list[dict], images: int, field: str) -> list[dict]:
    """Messages whose texts become parts where they have images; without any mark, these come first in the last one.

    field: the record's, for errors. Raises Flaw when the marks are not as many as the images.
    """
    if images == 0:
        return messages
    marks = sum(message["content"].count(MARK) for message in messages)
    if marks == 0:
        *earlier, last = messages
        return with_parts([*earlier, last | {"content": MARK * images + last["content"]}], images, field)
    if marks != images:
        raise Flaw(field, f"{images} images", f"{marks}, one for each {MARK} of the prompt", "correct one of the two")
    return [message | {"content": _parts(message["content"])} for message in messages]


def expand(token_ids: Sequence[int], kept: Sequence[Kept], vision: Vision, field: str) -> tuple[list[int], list[Image]]:
    """Put as many placeholders as the model reads in the place of each that the chat template wrote. Raises Flaw.

    A user's text may contain a placeholder too: then there are more of them than images, which is a flaw.
    """
    found = [place for place, token in enumerate(token_ids) if token == vision.image_token]
    if len(found) != len(kept):
        got, expected = f"{len(found)} image placeholders after the chat template", f"{len(kept)}, one for each image"
        raise Flaw(field, got, expected, "take the placeholder out of the text, or the model's own chat template")
    expanded: list[int] = []
    images: list[Image] = []
    begin = 0
    for place, image in zip(found, kept, strict=True):
        expanded += token_ids[begin:place]
        images.append(Image(image.hash, image.rows, image.columns, start=len(expanded)))
        expanded += [vision.image_token] * images[-1].tokens
        begin = place + 1
    return [*expanded, *token_ids[begin:]], images


def _parts(text: str) -> str | list[dict]:
    if MARK not in text:
        return text
    parts: list[dict] = []
    for number, piece in enumerate(text.split(MARK)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts
