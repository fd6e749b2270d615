"""From prompt files to Prompts: chat template, checks, and errors that name the line.

A line of a file with the default columns, and the Prompt it becomes:

    {"prompt": "Compute 2 + 3.", "answer": 5, "domain": "math"}
    Prompt(id="train.jsonl:1", domain="math", text="Compute 2 + 3.", token_ids=(1, 92, ...), answer="5")

``prompt`` is the user's text, or a list of chat messages that ends with the user's. ``answer`` is a string, a number,
or an object, which becomes its JSON text (``{"fn_name": "f", "inputs": ..., "outputs": ...}`` for code). A file that
``megatron-opd difficulty`` wrote also says how often a record appears in one epoch: ``columns.repeats``.

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
from dataclasses import dataclass
from decimal import Decimal
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import ColumnsConfig
from megatron_opd.config.evaluation import PLACE
from megatron_opd.data.rows import MISSING, Flaw, Row, flaws_error, read_rows, show
from megatron_opd.data.templates import BARE, COLUMN, template_of, with_template
from megatron_opd.errors import DataError
from megatron_opd.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENAME = "add the value, or set data.columns to the names in the file"
RETYPE = "convert the value"


def read_prompts(
    path: Path,
    columns: ColumnsConfig,
    default_domain: str | None,
    domains: set[str],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    limit: int | None = None,
    template: str | None = None,
) -> list[Prompt]:
    """Prompts of a .jsonl, .jsonl.gz or .parquet file, in its order: all, or the first ``limit``. Raises DataError.

    template: the text that is asked, with the record's in the place of ``{prompt}``; None asks the record's alone. A
    record that says to be in this template already is asked as it is, and one in another is refused.
    """
    reader = PromptReader(path, columns, default_domain, domains, tokenizer, max_prompt_tokens, template)
    prompts: list[Prompt] = []
    numbers: dict[str, int] = {}  # of the row that has the id
    flaws: list[tuple[int, Flaw]] = []
    for row in islice(read_rows(path, wanted(columns), optional=(COLUMN,)), limit):
        try:
            prompt = reader.prompt(row)
            if prompt.id in numbers:
                expected = f"an id of its own; row {numbers[prompt.id]} has it too"
                raise Flaw(columns.id or "id", repr(prompt.id), expected, "rename or remove one of the two")
        except Flaw as flaw:
            flaws.append((row.number, flaw))
        else:
            prompts.append(prompt)
            numbers[prompt.id] = row.number
    if flaws:
        raise flaws_error([(path, *flaw) for flaw in flaws], path, total=len(prompts) + len(flaws))
    if not prompts:
        raise DataError("The prompt file is empty", where=path, got="no records", expected="at least one")
    return prompts


def wanted(columns: ColumnsConfig) -> list[str]:
    """The columns that are read."""
    names = [columns.prompt, columns.answer, columns.domain, columns.id, columns.repeats]
    return list(dict.fromkeys(name for name in names if name is not None))


@dataclass(frozen=True, slots=True)
class PromptReader:
    """Turns one row into a prompt. Its methods raise Flaw."""

    path: Path
    columns: ColumnsConfig
    default_domain: str | None
    domains: set[str]
    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int
    template: str | None = None

    def prompt(self, row: Row) -> Prompt:
        """The prompt of a row."""
        record = row.record()
        messages = self._asked(record, _messages(self.columns.prompt, record.get(self.columns.prompt, MISSING)))
        return Prompt(
            id=self._id(record, row.number),
            domain=self.domain(record),
            text=messages[-1]["content"],
            token_ids=self._token_ids(messages),
            answer=_answer(self.columns.answer, record.get(self.columns.answer, MISSING)),
            repeats=self.repeats(record),
        )

    def _asked(self, record: dict, messages: list[dict]) -> list[dict]:
        """The messages with the template around the last one."""
        if self.template is None:
            return messages
        named = template_of(record)
        if named not in (None, BARE):
            if with_template(PLACE, named) == self.template:
                return messages
            fix = f"prepare the file with --set template=false, or set the template to null to ask in {named}'s"
            raise Flaw(COLUMN, repr(named), "the question alone, or in the template that is asked for", fix)
        *earlier, last = messages
        around = [part.strip() for part in self.template.split(PLACE) if part.strip()]
        if around and all(part in last["content"] for part in around):
            fix = "set the template to null for this file"
            raise Flaw(self.columns.prompt, "a question that is in the template already", "the question alone", fix)
        return [*earlier, last | {"content": self.template.replace(PLACE, last["content"])}]

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

    def _token_ids(self, messages: list[dict]) -> tuple[int, ...]:
        column = self.columns.prompt
        token_ids = chat_tokens(column, messages, self.tokenizer)
        if len(token_ids) > self.max_prompt_tokens:
            got, expected = f"{len(token_ids)} tokens", f"at most {self.max_prompt_tokens}"
            raise Flaw(column, got, expected, "raise data.max_prompt_tokens, or remove the record")
        return tuple(token_ids)


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
