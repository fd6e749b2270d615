"""The presets as they are shipped, from published files to a table, with a real server; only sizes are the toy's."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from megatron_opd.evaluation.results import read_problems

from runs import COMMAND, ROOT, Servers

PROBLEMS = 2
TESTS = ["assert f(1) == 2", "assert f(-1) == 0"]
HUMANEVAL = {
    "task_id": "HumanEval/{}",
    "prompt": "def f(x):\n    '''Add {} to x.'''\n",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}
PUBLISHED = {  # benchmark to format and record, in which {} is a number
    "aime24": ("competition", {"problem": "What is $7 + {}$?", "answer": "{}"}),
    "aime25": ("competition", {"problem": "Compute {} * 3.", "answer": "{}"}),
    "hmmt25_feb": ("competition", {"question": "Find {} - 1.", "answer": "\\frac{1}{2}"}),
    "hmmt25_nov": ("competition", {"question": "Find {} + 1.", "answer": "{}"}),
    "humaneval+": ("humaneval", HUMANEVAL),
    "mbpp+": ("mbpp", {"task_id": "{}", "prompt": "Add one, {}.", "test": "\n".join(TESTS), "test_list": TESTS}),
    "livecodebench": (
        "canonical",
        {
            "id": "{}",
            "prompt": "Read {} numbers and print their sum.",
            "domain": "code",
            "answer": json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]),
        },
    ),
}


def numbered(record: dict, number: int) -> dict:
    return {key: value.replace("{}", str(number)) if isinstance(value, str) else value for key, value in record.items()}


def prepared(folder: Path, name: str) -> Path:
    """The benchmark's file, made by ``prepare`` of what is published."""
    kind, record = PUBLISHED[name]
    source, out = folder / f"{name}.in.jsonl", folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps(numbered(record, number)) + "\n" for number in range(PROBLEMS + 1)))
    argv = [str(COMMAND), "prepare", kind, str(source), str(out)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout
    return out


def test_the_presets_are_sampled_judged_and_reported(servers: Servers, tmp_path: Path) -> None:
    files = [f"benchmarks.{name}.file={prepared(tmp_path, name)}" for name in PUBLISHED]
    sizes = [f"benchmarks.{name}.max_new_tokens=40" for name in PUBLISHED]  # the toy's context is small
    argv = [str(COMMAND), "eval", "tools/toy/models/student", "conf/eval/math.yaml", "conf/eval/code.yaml"]
    argv += [*files, *sizes, f"output={tmp_path / 'out'}", f"server.urls=[{servers.rollout}]", f"limit={PROBLEMS}"]
    argv += ["max_prompt_tokens=1024", "verifiers.workers=2", "engine.dtype=float32"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["benchmarks"].keys() == PUBLISHED.keys()
    for name, scores in summary["benchmarks"].items():
        samples = 32 if name.startswith(("aime", "hmmt")) else 4
        assert (scores["problems"], scores["samples"], scores["unknown"]) == (PROBLEMS, samples, 0.0), name
        assert f"{PROBLEMS} x {samples}" in done.stdout and scores["pass_at"][str(samples)] is not None
        settings = {key: summary["settings"][f"benchmarks.{name}.{key}"] for key in ("temperature", "top_p", "top_k")}
        assert settings == {"temperature": 1.0, "top_p": 1.0, "top_k": None}
    assert len(read_problems(tmp_path / "out").problems) == PROBLEMS * len(PUBLISHED)
