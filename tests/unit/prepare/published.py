"""Records in the layouts of the published data sets, with made-up content."""

from __future__ import annotations

import json

EURUS_END = "\n\nWrite Python code to solve the problem. Present the code in \n```python\nYour code\n```\nat the end."
CODE_END = f"{EURUS_END}\nYou need to think first then write the Python code."
MATH_END = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(200))  # not opened by anything here

GSM8K = {
    "question": "Ann has 1,200 pens and buys 34. How many?",
    "answer": "She has 1200+34 = <<1200+34=1234>>1,234.\n#### 1,234",
}
DEEPMATH = {
    "question": "Evaluate the limit \\( \\lim_{x \\to 0} \\frac{\\sin x}{x} \\).",
    "final_answer": "1",
    "difficulty": 6.0,
    "topic": "Mathematics -> Calculus",
    "r1_solution_1": "...",
    "r1_solution_2": "...",
    "r1_solution_3": "...",
}
PROGRAM_TESTS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]})
CALL_TESTS = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]})


def eurus(question: str, tests: str, ability: str = "code") -> dict:
    return {
        "data_source": "taco",
        "prompt": [
            {"role": "system", "content": "\nWhen tackling complex reasoning tasks, you have access to [ASSESS] ..."},
            {"role": "user", "content": question + EURUS_END},
        ],
        "ability": ability,
        "reward_model": {"ground_truth": tests, "style": "rule"},
        "extra_info": {"index": 0, "split": "train"},
    }


def verl(content: str, truth: object, ability: str) -> dict:
    return {
        "data_source": "zwhe99/DeepMath-103K",
        "prompt": [{"role": "user", "content": content}],
        "ability": ability,
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 5},
    }


MBPP = {
    "task_id": 2,
    "text": "Write a function to find the sum of two numbers.",
    "code": "def total(a, b):\n    return a + b",
    "test_list": ["assert total(1, 2) == 3", "assert total(-1, 1) == 0"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
MBPP_SANITIZED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 3,
    "prompt": "Write a python function to find the square root.",
    "code": "def root(n):\n    return n ** 0.5",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(root(4), 2)"],
}
MBPP_PLUS = {
    "task_id": 4,
    "code": "def double(n):\n    return 2 * n",
    "prompt": "Write a function to double a number.",
    "source_file": "",
    "test_imports": [],
    "test_list": ["assert double(2) == 4"],
    "test": "def assertion(out, exp, atol):\n    assert out == exp\n\ninputs = [[2], [5]]\nresults = [4, 10]\n"
    "for i, (inp, exp) in enumerate(zip(inputs, results)):\n    assertion(double(*inp), exp, 0)\n",
}
EVALPLUS = {
    "task_id": "Mbpp/6",
    "prompt": '"""\nWrite a function to negate a number.\nassert negate(2) == -2\n"""\n',
    "entry_point": "negate",
    "canonical_solution": "\ndef negate(n):\n    return -n\n",
    "base_input": [[2]],
    "plus_input": [[5]],
    "atol": 0,
    "assertion": "\nassert negate(2) == -2\n",
}
OPENMM = {
    "data_source": "mmk12",
    "prompt": [{"role": "user", "content": "<image>How long is the side AB?"}],
    "images": [{"bytes": PNG, "path": None}],
    "reward_model": {"style": "rule", "ground_truth": "5"},
}
CHARTQA = {"image": {"bytes": PNG, "path": "1.png"}, "query": "How many bars?", "label": ["14"], "human_or_machine": 0}
CHARTQA_AUTHORS = {"imgname": "41699051005347.png", "query": "What is the highest bar?", "label": "Spain"}
INFOGRAPHIC = {
    "questionId": 65718,
    "question": "Which platform is used most?",
    "image_local_name": "20471.jpeg",
    "image_url": "https://example.org/20471.jpeg",
    "ocr_output_file": "20471.json",
    "answers": ["linkedin", "LinkedIn"],
    "data_split": "train",
}
