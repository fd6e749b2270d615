"""Instructions at the end of published questions.

They are removed before ours is added (``data.templates``), so that a question looks the same whichever file it comes
from.
"""

from __future__ import annotations

import re

# The instructions of Uni-OPD and G-OPD (with and without the last sentence) and of Eurus-2-RL.
KNOWN_ENDS = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "You need to think first then write the Python code.",
    "Write Python code to solve the problem. Present the code in ```python Your code ``` at the end.",
    "Present the answer in LaTex format: \\boxed{Your answer}",
)
_ENDS = [re.compile(r"\s+".join(map(re.escape, end.split())) + r"\Z") for end in KNOWN_ENDS]
_LONGEST = 2 * max(map(len, KNOWN_ENDS))  # of an end, blanks included


def bare(text: str) -> str:
    """The question without the known instructions at its end, and without blanks around it."""
    text = text.strip()
    while True:
        head, tail = text[:-_LONGEST], text[-_LONGEST:]
        found = next((match for end in _ENDS if (match := end.search(tail))), None)
        if found is None:
            return text
        text = (head + tail[: found.start()]).rstrip()
