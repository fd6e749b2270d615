r"""The final answer of a response, for verifiers that compare a short text.

"... so \boxed{18}."                 -> "18"
"... <answer> B </answer>"           -> "B"
"Some words.\nThe answer is 7 cm."   -> "7 cm"
"Because of that,\n42"               -> "42"
"""

from __future__ import annotations

import json
import re

from megatron_opd.verifiers.base import clip
from megatron_opd.verifiers.math import BOX, last_box

TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
PHRASE = re.compile(r"(?:final answer|answer)\s*(?:is|:)\s*:?[ \t]*(?=\S)([^\n]+)|####[ \t]*([^\n]+)", re.IGNORECASE)
WRAPPING = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
LONGEST_ANSWER = 2000  # characters


def final_answer(response: str) -> str:
    r"""The last box or ``<answer>`` tag; else what follows the last "answer is", "answer:" or "####"; else the end.

    The end is the last line. "" if the response is empty, or if the marker that counts has nothing in it.
    """
    tags, box = list(TAG.finditer(response)), response.rfind(BOX)
    if box >= 0 and not (tags and tags[-1].end() > box):
        return tidy(last_box(response) or "")
    if tags:
        inside = tags[-1].group(1)
        return tidy(last_box(inside) or inside)
    phrases = list(PHRASE.finditer(response))
    if phrases:
        return tidy(phrases[-1].group(1) or phrases[-1].group(2))
    lines = response.strip().splitlines()
    return tidy(lines[-1]) if lines else ""


def tidy(text: str) -> str:
    r"""On one line, without ``\text{}``, markdown emphasis, quotes, dollar signs and the full stop around it."""
    text = WRAPPING.sub(r"\1", text)
    return " ".join(text.split()).strip("*_`\"' ").rstrip(".").strip("$*_`\"' ")


def references(reference: str) -> list[str]:
    """The accepted answers: the texts of a JSON list, or the reference itself."""
    if reference.lstrip().startswith("["):
        try:
            plain = json.loads(reference)
        except (ValueError, RecursionError):
            return [reference]
        if isinstance(plain, list) and plain and all(isinstance(item, str) for item in plain):
            return plain
    return [reference]


def differ(answer: str, reference: str) -> str:
    """The reason of an incorrect answer."""
    return f"got {clip(answer, 60) or 'nothing'}, expected {clip(reference, 60)}"
