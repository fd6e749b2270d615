"""The layout of verl, which G-OPD publishes its training files in, and the layout that ``prepare`` itself writes."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.config import PrepareConfig
from megatron_opd.data.rows import MISSING, Flaw
from megatron_opd.data.templates import TEMPLATES, template_of
from megatron_opd.prepare.code_sets import tests_reference
from megatron_opd.prepare.drafts import Draft, answer_of, look_up, messages_of, text_of
from megatron_opd.prepare.images import images_of
from megatron_opd.prepare.templates import bare

KINDS = {"math": "math", "code": "code", "coding": "code"}  # ability in small letters, to the name of a template


class Verl:
    """``{"data_source", "prompt": [messages], "ability", "reward_model": {"style", "ground_truth"}, "extra_info"}``."""

    columns = ("prompt", "ability", "reward_model")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain

    def draft(self, record: dict, folder: Path) -> Draft:
        ability = text_of(record, "ability")
        kind = KINDS.get(ability.lower())
        if kind is None:
            known = f"one of {', '.join(sorted(KINDS))}"
            raise Flaw("ability", repr(ability), known, "remove the record, or convert it to another format")
        field = "reward_model.ground_truth"
        *context, last = messages_of(record, "prompt")
        if kind == "code":
            value = look_up(record, field)
            answer = tests_reference(field, text_of(record, field) if value is MISSING or value is None else value)
        else:
            answer = answer_of(record, field)
        return Draft(bare(last["content"]), answer, self._domain or kind, kind, context=context)


class Canonical:
    """What ``prepare`` wrote: to put several files together, or to filter one again.

    The template of a record is the one that it names, else that of its prompt; one without any gets none.
    """

    columns = None

    def __init__(self, options: PrepareConfig) -> None:
        self._domain, self._images = options.domain, options.images

    def draft(self, record: dict, folder: Path) -> Draft:
        *context, last = messages_of(record, "prompt")
        question = bare(last["content"])
        found = (name for name in TEMPLATES if last["content"].endswith(_end(name)))  # the last one always fits
        name = template_of(record) or next(found)
        images = images_of(record, "images", self._images or folder) if record.get("images") else []
        answer, own = text_of(record, "answer"), text_of(record, "id")
        return Draft(question, answer, self._domain or text_of(record, "domain"), name, own, images, context)


def _end(name: str) -> str:
    return TEMPLATES[name].removeprefix("{question}")
