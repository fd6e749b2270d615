"""Questions with a short answer."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.config import PrepareConfig
from megatron_opd.data.rows import Flaw, show
from megatron_opd.prepare.drafts import Draft, Skip, answer_of, first_of, look_up, text_of
from megatron_opd.prepare.templates import bare


class GSM8K:
    """``{"question": ..., "answer": "a worked solution\\n#### 1,234"}``: the answer is what follows the last ####."""

    columns = ("question", "answer")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain or "math"

    def draft(self, record: dict, folder: Path) -> Draft:
        solution = text_of(record, "answer")
        _, mark, answer = solution.rpartition("####")
        answer = answer.strip().replace(",", "")
        if not mark or not answer:
            raise Flaw("answer", show(solution[-40:]), "a solution that ends with #### and the answer", "add it")
        return Draft(bare(text_of(record, "question")), answer, self._domain, "math")


class DeepMath:
    """``{"question": ..., "final_answer": "0", "difficulty": 6.5, ...}``: its long solutions are not read."""

    columns = ("question", "final_answer", "difficulty")

    def __init__(self, options: PrepareConfig) -> None:
        self._domain, self._least = options.domain or "math", options.min_difficulty

    def draft(self, record: dict, folder: Path) -> Draft:
        draft = Draft(bare(text_of(record, "question")), answer_of(record, "final_answer"), self._domain, "math")
        if self._least is not None:
            difficulty = look_up(record, "difficulty")
            if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
                raise Flaw("difficulty", show(difficulty), "a number", "add it, or leave min_difficulty out")
            if difficulty < self._least:
                raise Skip(f"difficulty below {self._least:g}")
        return draft


class Competition:
    """AIME and HMMT: ``{"problem": ..., "answer": "204"}``, or ``question``; the answer may be a number."""

    columns = None

    def __init__(self, options: PrepareConfig) -> None:
        self._domain = options.domain or "math"

    def draft(self, record: dict, folder: Path) -> Draft:
        question = text_of(record, first_of(record, "problem", "question"))
        return Draft(bare(question), answer_of(record, "answer"), self._domain, "math")
