"""Token heat-maps: which tokens the teacher prefers, before and after calibration (figure 6 of Uni-OPD).

The colour of a value grows with its square root, so that a shift of 0.2 nats can be seen beside a gap of 4:
level = round(10 sqrt(|value| / limit)), at most 10. Red: the teacher prefers the token; blue: the student does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.errors import ModelError
from megatron_opd.runtime import env

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEVELS = 10
SHOWN = (700, 300)  # tokens of a long response that are shown: the first and the last
_LIMITS = (0.5, 1.0, 2.0, 4.0, 8.0)
# Letters that would not be seen, or would change the direction of what follows, and their marks.
_MARKS = {chr(code): chr(0x2400 + code) for code in range(32)} | {chr(0x7F): "\u2421"}
_MARKS |= {"\n": "\u21b5\n", "\t": "\u2192\t"}
_MARKS |= {chr(code): "\u2426" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0x80, 0xA0))}


@dataclass(frozen=True, slots=True)
class Token:
    """One token of a heat-map; ``before`` and ``after`` are CSS classes."""

    text: str
    hint: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Heat:
    """A response; ``tail`` is what follows after ``left_out`` tokens that are not shown."""

    head: list[Token]
    left_out: int
    tail: list[Token]


class TokenTexts:
    """Texts of token ids, each decoded once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @classmethod
    def load(cls, folder: Path) -> TokenTexts:
        """From the tokenizer that a run keeps. Raises ModelError when it is missing or broken."""
        if not folder.is_dir():
            raise ModelError(
                "The run's tokenizer is missing",
                where=folder,
                expected="the folder with the student's tokenizer that a run copies",
                fix="copy tokenizer.json, tokenizer_config.json and chat_template.jinja of the student's model there",
            )
        env.quiet_transformers()
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        except Exception as error:  # transformers and its parsers raise anything for a broken folder
            got = f"{type(error).__name__}: {error}"
            raise ModelError("The run's tokenizer cannot be loaded", where=folder, got=got) from error
        return cls(tokenizer)

    def __call__(self, token_id: int) -> str:
        if token_id not in self._known:
            self._known[token_id] = visible(self._decode(token_id))
        return self._known[token_id]

    def _decode(self, token_id: int) -> str:
        text = self._tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        # A decoder of SentencePiece drops the space before a first word.
        lost = not text.startswith(" ") and str(self._tokenizer.convert_ids_to_tokens(token_id)).startswith("\u2581")
        return " " + text if lost else text


def visible(text: str) -> str:
    """Untrusted text with marks for what would not be seen or would disturb: line breaks, controls, text direction."""
    return "".join(_MARKS.get(letter, letter) for letter in text)


def advantages(row: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gap of each token before and after the outcome entered, and the mask; all [R], from a row of trajectories."""
    before = np.array(row["gaps"], dtype=np.float64)
    return before, before + row["offset"] + row["outcome_term"], np.array(row["mask"], dtype=bool)


def colour_limit(rows: Sequence[dict]) -> float:
    """One scale for all heat-maps: the smallest round number that at most 2 % of the values exceed."""
    values = [np.abs(gaps[mask]) for row in rows for gaps, mask in _both(row)]
    high = float(np.quantile(np.concatenate(values), 0.98)) if values and sum(map(len, values)) else 0.0
    return next((limit for limit in _LIMITS if limit >= high), _LIMITS[-1])


def heat(row: dict, texts: TokenTexts, limit: float, most: tuple[int, int] = SHOWN) -> Heat:
    """The heat-map of one rollout, a row of trajectories that was scored; of a longer one the first and last tokens."""
    before, after, mask = advantages(row)
    count = len(before)
    head, tail = (count, 0) if count <= sum(most) else most
    shown = [*range(head), *range(count - tail, count)]
    tokens = [
        Token(
            text=texts(row["token_ids"][i]),
            hint=_hint(row, i, after[i], bool(mask[i])),
            before=shade(before[i], bool(mask[i]), limit),
            after=shade(after[i], bool(mask[i]), limit),
        )
        for i in shown
    ]
    return Heat(tokens[:head], count - head - tail, tokens[head:])


def shade(value: float, kept: bool, limit: float) -> str:
    """CSS class of a value: t1 .. t10 where the teacher prefers the token, s1 .. s10 the student, x masked, "" zero."""
    if not kept:
        return "x"
    level = round(LEVELS * min(abs(value) / limit, 1.0) ** 0.5)
    return "" if level == 0 else f"{'t' if value > 0 else 's'}{level}"


def _both(row: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    before, after, mask = advantages(row)
    return [(before, mask), (after, mask)]


def _hint(row: dict, i: int, after: float, kept: bool) -> str:
    parts = [
        f"token {i + 1}, id {row['token_ids'][i]}",
        f"student {row['student_logprobs'][i]:.3f}",
        f"teacher {row['teacher_logprobs'][i]:.3f}",
        f"gap {row['gaps'][i]:+.3f}",
        f"after {after:+.3f}" if kept else "masked: not trained on",
    ]
    return " | ".join(parts)
