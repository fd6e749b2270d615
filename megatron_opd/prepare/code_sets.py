"""Questions with tests. A reference that the verifier cannot read is a flaw of the record."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_opd.config import PrepareConfig
from megatron_opd.data.rows import Flaw, show
from megatron_opd.prepare.drafts import Draft, Skip, first_of, is_unicode, look_up, messages_of, text_of, texts_of
from megatron_opd.prepare.templates import bare
from megatron_opd.verifiers.code_tests import parse_tests


def tests_reference(field: str, value: object) -> str:
    """``value``, the JSON text of tests or what it stands for, as a reference. Raises Flaw with the field's name."""
    try:
        reference = value if isinstance(value, str) else json.dumps(value)
        parse_tests(reference)
    except (ValueError, TypeError) as error:
        raise Flaw(field, error, "tests that the verifier can read", "repair or remove the record") from error
    if not is_unicode(reference):
        raise Flaw(field, "half of a surrogate pair", "Unicode text", "repair or remove the record")
    return reference


class EurusCode:
    """The code part of Eurus-2-RL: ``ability`` is "code", ``reward_model.ground_truth`` the JSON of its tests.

    Its system message, which asks for a form of reasoning of its own, is left out, as the paper does.
    """

    columns = ("prompt", "ability", "reward_model")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain or "code"

    def draft(self, record: dict, folder: Path) -> Draft:
        ability = text_of(record, "ability")
        if ability != "code":
            raise Skip(f"ability {ability}")
        field = "reward_model.ground_truth"
        reference = tests_reference(field, text_of(record, field))
        question = bare(messages_of(record, "prompt")[-1]["content"])
        return Draft(question, reference, self._domain, "code")


class HumanEval:
    """HumanEval and HumanEval+: ``task_id``, ``prompt``, ``entry_point``, ``test`` (a function ``check``)."""

    columns = ("task_id", "prompt", "entry_point", "test")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain or "code"

    def draft(self, record: dict, folder: Path) -> Draft:
        plain = {name: text_of(record, name) for name in ("prompt", "test", "entry_point")}
        reference = tests_reference("test", plain)
        return Draft(plain["prompt"].strip(), reference, self._domain, "code", own_id=text_of(record, "task_id"))


class MBPP:
    """MBPP, its sanitized form (``prompt`` for ``text``, ``test_imports`` for ``test_setup_code``), and MBPP+.

    MBPP+ as ``test`` (all tests), or as EvalPlus' own file, whose ``assertion`` holds the tests of MBPP alone. The
    first assertion of a problem is part of the question: it is the only place that names the function.
    """

    columns = None
    parts = ("test_list", "test_setup_code", "test_imports")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain or "code"

    def draft(self, record: dict, folder: Path) -> Draft:
        task = look_up(record, "task_id")
        if isinstance(task, bool) or not isinstance(task, int | str) or task == "":
            raise Flaw("task_id", show(task), "a number or a text", "check that the file is of this format")
        question = text_of(record, first_of(record, "prompt", "text")).strip()
        if question.startswith('"""') and question.endswith('"""'):  # EvalPlus: a docstring with an assertion in it
            question = question[3:-3].strip()
        name, plain = self._tests(record)
        reference = tests_reference(name, plain)
        if "assert " not in question:
            question += f"\n\nYour code should pass this test:\n\n{self._example(record)}"
        number = str(task).rpartition("/")[2]
        return Draft(question, reference, self._domain, "code", own_id=f"Mbpp/{number}")

    def _tests(self, record: dict) -> tuple[str, dict]:
        """The field that holds the tests, and the object that the verifier reads."""
        name = first_of(record, "test", "assertion", "test_list")
        if name == "test_list":
            return name, {part: record[part] for part in self.parts if record.get(part)}
        return name, {"test": text_of(record, name)}

    @staticmethod
    def _example(record: dict) -> str:
        name = first_of(record, "test_list", "assertion")
        return texts_of(record, name)[0].strip().splitlines()[0]
