"""What is asked of the student besides the question: the paper's instructions, which its evaluation uses too.

Files of others often end a question with such an instruction already. It is removed before ours is added, so that a
question looks the same whichever file it comes from.
"""

from __future__ import annotations

import re

MATH = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE = (
    "{question}\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\n"
    "at the end.\nYou need to think first then write the Python code."
)
TEMPLATES = {"math": MATH, "code": CODE, "none": "{question}"}

# The instructions of Uni-OPD and G-OPD (with and without the last sentence) and of Eurus-2-RL.
KNOWN_ENDS = (
    "Please reason step by step, and put your final answer within \\boxed{}.",
    "You need to think first then write the Python code.",
    "Write Python code to solve the problem. Present the code in ```python Your code ``` at the end.",
    "Present the answer in LaTex format: \\boxed{Your answer}",
)
_ENDS = [re.compile(r"\s+".join(map(re.escape, end.split())) + r"\Z") for end in KNOWN_ENDS]
_LONGEST = 2 * max(map(len, KNOWN_ENDS))  # of an end, blanks included


def with_template(question: str, name: str) -> str:
    """The user's turn. Texts with braces stay as they are."""
    return TEMPLATES[name].replace("{question}", question, 1)


def bare(text: str) -> str:
    """The question without the known instructions at its end, and without blanks around it."""
    text = text.strip()
    while True:
        head, tail = text[:-_LONGEST], text[-_LONGEST:]
        found = next((match for end in _ENDS if (match := end.search(tail))), None)
        if found is None:
            return text
        text = (head + tail[: found.start()]).rstrip()
