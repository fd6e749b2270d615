"""Questions about images. The paper's instruction for them is not published; the mathematical one asks for a box, which
every verifier reads."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_opd.config import PrepareConfig
from megatron_opd.data.image_tokens import flat_content
from megatron_opd.prepare.drafts import Draft, Skip, answer_of, first_of, look_up, messages_of, text_of, texts_of
from megatron_opd.prepare.images import images_of
from megatron_opd.prepare.templates import bare


class OpenMMReasoner:
    """The RL set, in verl's layout with ``images``; a message's content may be a list of image and text parts."""

    columns = ("prompt", "reward_model", "images")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain, self._images = options.domain or "visual_math", options.images

    def draft(self, record: dict, folder: Path) -> Draft:
        *context, last = messages_of({"prompt": _flat(look_up(record, "prompt"))}, "prompt")
        answer = answer_of(record, "reward_model.ground_truth")
        images = images_of(record, "images", self._images or folder)
        return Draft(bare(last["content"]), answer, self._domain, "math", images=images, context=context)


def _flat(prompt: object) -> object:
    """Messages whose content is a text; anything else as it is, for others to complain about."""
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        return prompt
    return [message | {"content": flat_content(message.get("content"))} for message in prompt]


class ChartQA:
    """``{"image", "query", "label": ["14"], "human_or_machine": 0}``; the authors have ``imgname`` for ``image``.

    The reference is the JSON list of labels, for the verifier ``chartqa``.
    """

    columns = None

    def __init__(self, options: PrepareConfig) -> None:
        self._domain, self._images = options.domain or "chart", options.images

    def draft(self, record: dict, folder: Path) -> Draft:
        answers = json.dumps(texts_of(record, "label"), ensure_ascii=False)
        images = images_of(record, first_of(record, "image", "imgname"), self._images or folder)
        return Draft(bare(text_of(record, "query")), answers, self._domain, "math", images=images)


class InfographicVQA:
    """``{"questionId", "question", "answers": [...], "image_local_name"}``, under "data" in the authors' file, or
    ``image`` as it is found elsewhere. The test part has no answers.

    The reference is the JSON list of answers, for the verifier ``anls``.
    """

    columns = None

    def __init__(self, options: PrepareConfig) -> None:
        self._domain, self._images = options.domain or "document", options.images

    def draft(self, record: dict, folder: Path) -> Draft:
        if record.get("data_split") == "test":
            raise Skip("no answers in the test part")
        answers = json.dumps(texts_of(record, "answers"), ensure_ascii=False)
        images = images_of(record, first_of(record, "image", "image_local_name"), self._images or folder)
        return Draft(bare(text_of(record, "question")), answers, self._domain, "math", images=images)
