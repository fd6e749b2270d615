"""From prompt files to Prompts: chat template, checks, and errors that name the line.

A line of a file with the default columns, and the Prompt it becomes:

    {"prompt": "Compute 2 + 3.", "answer": 5, "domain": "math"}
    Prompt(id="train.jsonl:1", domain="math", text="Compute 2 + 3.", token_ids=(1, 92, ...), answer="5")

``prompt`` is the user's text, or a list of chat messages that ends with the user's. ``answer`` is a string, a number,
or an object, which becomes its JSON text (``{"fn_name": "f", "inputs": ..., "outputs": ...}`` for code). A file that
``megatron-opd difficulty`` wrote also says how often a record appears in one epoch: ``columns.repeats``. Images of a
record (``columns.images``) take the places that ``<image>`` marks in its texts, or come first (docs/multimodal.md).

The whole file is checked before an error is raised, and the first ten flaws are told:

    2 of 500 records cannot be used
      where:    train.jsonl
      got:
        train.jsonl:17: answer: got nothing, expected a string, a number or an object
        train.jsonl:80: domain: got 'maths', expected one of code, math
      fix:      add the value, or set data.columns to the names in the file
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import ColumnsConfig
from megatron_opd.data.image_sources import image_sources
from megatron_opd.data.image_tokens import expand, flat_content, with_parts
from megatron_opd.data.images import ImageStore, Kept
from megatron_opd.data.rows import MISSING, Flaw, Row, flaws_error, read_rows, show
from megatron_opd.errors import DataError
from megatron_opd.records import Image, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENAME = "add the value, or set data.columns to the names in the file"
RETYPE = "convert the value"
AT_ONCE = 64  # rows with images whose bytes are in memory


@dataclass(frozen=True, slots=True)
class ImageReading:
    """What a reader needs for prompts with images."""

    store: ImageStore
    domains: frozenset[str]  # those whose teacher can be asked about an image, or leaves it out


def read_prompts(reader: PromptReader, limit: int | None = None) -> list[Prompt]:
    """Prompts of the reader's .jsonl, .jsonl.gz or .parquet file, in its order: all, or the first ``limit``.

    Raises DataError.
    """
    path, columns = reader.path, reader.columns
    wanted = [columns.prompt, columns.answer, columns.domain, columns.id, columns.repeats, columns.images]
    prompts: list[Prompt] = []
    numbers: dict[str, int] = {}  # of the row that has the id
    flaws: list[tuple[int, Flaw]] = []
    rows = islice(read_rows(path, [column for column in wanted if column is not None]), limit)
    for number, found in reader.read(rows):
        if isinstance(found, Flaw):
            flaws.append((number, found))
        elif found.id in numbers:
            expected = f"an id of its own; row {numbers[found.id]} has it too"
            flaw = Flaw(columns.id or "id", repr(found.id), expected, "rename or remove one of the two")
            flaws.append((number, flaw))
        else:
            prompts.append(found)
            numbers[found.id] = number
    if flaws:
        raise flaws_error([(path, *flaw) for flaw in flaws], path, total=len(prompts) + len(flaws))
    if not prompts:
        raise DataError("The prompt file is empty", where=path, got="no records", expected="at least one")
    return prompts


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns one row into a prompt. Its methods raise Flaw.

    template: the text that is asked, with the record's in the place of ``{prompt}``; None asks the record's alone.
    """

    path: Path
    columns: ColumnsConfig
    default_domain: str | None
    domains: set[str]
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    template: str | None = None
    images: ImageReading | None = None  # of a model that sees; None for one that does not

    def read(self, rows: Iterator[Row]) -> Iterator[tuple[int, Prompt | Flaw]]:
        """Number of each row and its prompt, or what is wrong with it. Images are decoded by several threads."""
        with ExitStack() as stack:
            threads = self.images is not None and self.columns.images is not None
            pool = stack.enter_context(ThreadPoolExecutor()) if threads else None
            while some := list(islice(rows, AT_ONCE)):
                found = pool.map(self._prompt_or_flaw, some) if pool else map(self._prompt_or_flaw, some)
                yield from zip([row.number for row in some], found, strict=True)

    def _prompt_or_flaw(self, row: Row) -> Prompt | Flaw:
        try:
            return self.prompt(row)
        except Flaw as flaw:
            return flaw

    def prompt(self, row: Row) -> Prompt:
        """The prompt of a row."""
        record = row.record()
        messages = self._asked(_messages(self.columns.prompt, record.get(self.columns.prompt, MISSING)))
        domain = self.domain(record)
        token_ids, images = self._token_ids(messages, record, domain)
        return Prompt(
            id=self._id(record, row.number),
            domain=domain,
            text=messages[-1]["content"],
            token_ids=token_ids,
            answer=_answer(self.columns.answer, record.get(self.columns.answer, MISSING)),
            repeats=self.repeats(record),
            images=images,
        )

    def _asked(self, messages: list[dict]) -> list[dict]:
        """The messages with the template around the last one."""
        if self.template is None:
            return messages
        *earlier, last = messages
        around = [part.strip() for part in self.template.split("{prompt}") if part.strip()]
        if around and all(part in last["content"] for part in around):
            fix = "set the template to null for this file"
            raise Flaw(self.columns.prompt, "a question that is in the template already", "the question alone", fix)
        return [*earlier, last | {"content": self.template.replace("{prompt}", last["content"])}]

    def _id(self, record: dict, number: int) -> str:
        column = self.columns.id
        if column is None:
            return f"{self.path.name}:{number}"
        value = record.get(column, MISSING)
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise Flaw(column, show(value), "a string or a whole number", RENAME)
        return str(value)

    def domain(self, record: dict) -> str:
        """The domain of a record."""
        column = self.columns.domain
        value = MISSING if column is None else record.get(column, MISSING)
        if value is MISSING or value is None:
            if self.default_domain is None:
                raise Flaw(column or "domain", show(value), "a domain", "add it, or set data.default_domain")
            value = self.default_domain
        if not isinstance(value, str) or value not in self.domains:
            known = f"one of {', '.join(sorted(self.domains))}"
            raise Flaw(column or "domain", show(value), known, "correct the name, or add a teacher for the domain")
        return value

    def repeats(self, record: dict) -> int:
        """How often the record appears in one epoch."""
        column = self.columns.repeats
        value = 1 if column is None else record.get(column, MISSING)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise Flaw(column, show(value), "a whole number >= 1", RENAME if value is MISSING else RETYPE)
        return value

    def _token_ids(self, messages: list[dict], record: dict, domain: str) -> tuple[tuple[int, ...], tuple[Image, ...]]:
        column = self.columns.prompt
        images: list[Image] = []
        if self.images is None:
            token_ids = chat_tokens(column, messages, self.tokenizer)
        else:
            kept = self._kept(record, domain, self.images)
            token_ids = chat_tokens(column, with_parts(messages, len(kept), self.columns.images or ""), self.tokenizer)
            token_ids, images = expand(token_ids, kept, self.images.store.vision, column)
        if len(token_ids) > self.max_prompt_tokens:
            got, expected = f"{len(token_ids)} tokens", f"at most {self.max_prompt_tokens}"
            raise Flaw(column, got, expected, "raise data.max_prompt_tokens, or remove the record")
        return tuple(token_ids), tuple(images)

    def _kept(self, record: dict, domain: str, images: ImageReading) -> list[Kept]:
        """The record's images, resized and kept."""
        column = self.columns.images
        if column is None:
            return []
        sources = image_sources(column, record.get(column, MISSING), self.path.parent)
        most = images.store.limits.max_per_prompt
        if len(sources) > most:
            fix = "remove some, or raise data.images.max_per_prompt"
            raise Flaw(column, f"{len(sources)} images", f"at most {most}", fix)
        if sources and domain not in images.domains:
            fix = f"correct the domain, or set teachers.{domain}.images=leave_out"
            raise Flaw(column, f"an image in the domain {domain!r}", "none: its teacher reads text only", fix)
        return [images.store.add(column, source) for source in sources]


def chat_tokens(column: str, messages: list[dict], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation up to where the assistant begins. Raises Flaw, which names ``column``."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # a template raises what it likes, for roles in an order it refuses
        got = f"{type(error).__name__}: {error}"
        raise Flaw(column, got, "messages that the chat template accepts", "change the messages") from error


def _messages(column: str, value: object) -> list[dict]:
    """The value of the prompt column as chat messages, the last one the user's."""
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if not isinstance(messages, list):
        raise Flaw(column, show(value), "a string or a list of messages", RENAME if value is MISSING else RETYPE)
    messages = [_with_marks(message) for message in messages]
    for message in messages:
        keys = ("role", "content")
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in keys):
            raise Flaw(column, show(message), "messages with role and content, both strings", RETYPE)
    if not messages or messages[-1]["role"] != "user":
        got = "no messages" if not messages else f"a last message of {messages[-1]['role']!r}"
        raise Flaw(column, got, "a last message of 'user'", "end the conversation where the student answers")
    if not messages[-1]["content"].strip():
        raise Flaw(column, "an empty prompt", "some text", "write the question, or remove the record")
    return messages


def _with_marks(message: object) -> object:
    """A message whose content is a text, where it was a list of image and text parts."""
    return message | {"content": flat_content(message.get("content"))} if isinstance(message, dict) else message


def _answer(column: str, value: object) -> str:
    """The value of the answer column as a string; 5 and 5.0 become the same."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(int(value)) if value == int(value) else str(value)
    raise Flaw(column, show(value), "a string, a number or an object", RENAME if value is MISSING else RETYPE)
