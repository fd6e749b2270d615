"""What a converter makes of one record of a published data set, and the line that is written for it.

    {"id": "gsm8k-0f4f2c...", "prompt": "...", "answer": "18", "domain": "math", "template": "math"}

``answer`` is a reference of docs/verifiers.md: a text, or the JSON of tests or of accepted answers. ``images``, where
there are some, is a list of ``{"path": ...}`` and ``{"base64": ...}``, in the order of the ``<image>`` marks of the
prompt, or all before it where it has none. ``template`` says what is around the question: ``data.templates``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.data.rows import MISSING, Flaw, show, type_name
from megatron_opd.data.templates import BARE, COLUMN, with_template

RENAME = "check that the file is of this format"


class Skip(Exception):
    """A sound record that is not in the wanted part of its data set; says why."""


@dataclass(frozen=True, slots=True)
class Draft:
    """One question, before its template."""

    question: str
    answer: str  # reference of the verifier
    domain: str
    template: str  # name in data.templates.TEMPLATES
    own_id: str | None = None  # unique over all files of the data set; null: a hash of the content
    images: list[dict[str, str]] = field(default_factory=list)
    context: list[dict[str, str]] = field(default_factory=list)  # chat messages before the question

    def key(self) -> bytes:
        """The question without regard to case and blanks, with its images: records with equal keys are duplicates."""
        return _digest([" ".join(self.question.lower().split()), self._pictures(), self.context])

    def record(self, name: str, *, templated: bool) -> dict[str, object]:
        """The canonical record. ``name``: of the format, for the id."""
        template = self.template if templated else BARE
        text = with_template(self.question, template)
        prompt = [*self.context, {"role": "user", "content": text}] if self.context else text
        own = self.own_id or f"{name}-{_digest([self.question, self.answer, self._pictures(), self.context]).hex()}"
        plain = {"id": own, "prompt": prompt, "answer": self.answer, "domain": self.domain, COLUMN: template}
        return plain | ({"images": self.images} if self.images else {})

    def _pictures(self) -> list[str]:
        """What stands for the images: their content, or the names of their files wherever these are."""
        return [image.get("base64") or Path(image["path"]).name for image in self.images]


def _digest(parts: list) -> bytes:
    """8 bytes that stand for JSON values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).digest()


def look_up(record: dict, name: str) -> object:
    """The value of a field, of a nested one as ``reward_model.ground_truth``; MISSING if there is none."""
    value: object = record
    for part in name.split("."):
        if not isinstance(value, dict):
            return MISSING
        value = value.get(part, MISSING)
    return value


def text_of(record: dict, name: str) -> str:
    """A text that is not blank. Raises Flaw."""
    value = look_up(record, name)
    if not isinstance(value, str) or not value.strip():
        raise Flaw(name, show(value), "a text", RENAME if value is MISSING else "repair or remove the record")
    if not is_unicode(value):
        raise Flaw(name, "half of a surrogate pair", "Unicode text", "repair or remove the record")
    return value


def first_of(record: dict, *names: str) -> str:
    """The name that is there, of fields that were published under several. Raises Flaw when none is."""
    found = next((name for name in names if look_up(record, name) is not MISSING), None)
    if found is None:
        raise Flaw(names[0], "nothing", f"one of {', '.join(names)}", RENAME)
    return found


def answer_of(record: dict, name: str) -> str:
    """A short answer: text, number, or a list with one of them. Raises Flaw."""
    value = look_up(record, name)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(int(value)) if value == int(value) else str(value)
    if not isinstance(value, str):
        raise Flaw(name, show(value), "a text or a number", RENAME if value is MISSING else "convert the value")
    if not value.strip() or not is_unicode(value):
        raise Flaw(name, show(value), "a text or a number", "repair or remove the record")
    return value.strip()


def texts_of(record: dict, name: str) -> list[str]:
    """A list of texts, at least one. Raises Flaw."""
    value = look_up(record, name)
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(item, str) and item.strip() for item in texts):
        raise Flaw(name, show(value), "a list of texts", RENAME if value is MISSING else "repair or remove the record")
    if not all(map(is_unicode, texts)):
        raise Flaw(name, "half of a surrogate pair", "Unicode text", "repair or remove the record")
    return texts


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON may hold half of a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def messages_of(record: dict, name: str) -> list[dict[str, str]]:
    """Chat messages that end with the user's; a text is the user's. Raises Flaw."""
    value = look_up(record, name)
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list) or not messages:
        raise Flaw(name, show(value), "a text or chat messages", RENAME if value is MISSING else "convert the value")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Flaw(name, type_name(message), "messages with role and content", "convert the value")
        text_of(message, "content")
    if messages[-1]["role"] != "user":
        raise Flaw(name, f"a last message of {messages[-1]['role']!r}", "one of 'user'", "remove what follows it")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
