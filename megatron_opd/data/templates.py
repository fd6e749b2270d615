"""What is asked of the student besides the question: the paper's instructions, which its evaluation uses too.

``megatron-opd prepare`` puts one around each question and says in the record which: the column ``template``.
"""

from __future__ import annotations

MATH = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
CODE = (
    "{question}\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\n"
    "at the end.\nYou need to think first then write the Python code."
)
BARE = "none"  # the question alone
TEMPLATES = {"math": MATH, "code": CODE, BARE: "{question}"}
COLUMN = "template"


def with_template(question: str, name: str) -> str:
    """The user's turn. Texts with braces stay as they are."""
    return TEMPLATES[name].replace("{question}", question, 1)


def template_of(record: dict) -> str | None:
    """The name of the template around a record's question; None where the record does not say."""
    name = record.get(COLUMN)
    return name if isinstance(name, str) and name in TEMPLATES else None
