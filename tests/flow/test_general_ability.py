"""General ability by lm-evaluation-harness, as docs/evaluation.md says: its own model class reads what runs export."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from runs import ROOT

COMMAND = ROOT / ".venv-lm-eval" / "bin" / "lm-eval"
PROBLEMS = 30
TASK = r"""
task: toy_sums
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: answer
generation_kwargs: {until: ["</s>"], max_gen_toks: 80, do_sample: false}
filter_list:
  - name: boxed
    filter:
      - {function: regex, regex_pattern: '\\boxed\{([^}]*)\}'}
      - {function: take_first}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def accuracy(tmp_path: Path, model: str) -> float:
    """Greedy answers to the toy world's mathematics, judged by the harness."""
    argv = [str(COMMAND), "run", "--model", "hf", "--tasks", "toy_sums", "--include_path", str(tmp_path)]
    argv += ["--model_args", f"pretrained={ROOT / 'tools/toy/models' / model},dtype=float32", "--device", "cpu"]
    argv += ["--batch_size", "16", "--apply_chat_template", "--output_path", str(tmp_path / model)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / model).rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["n-samples"]["toy_sums"]["effective"] == PROBLEMS
    return found["results"]["toy_sums"]["exact_match,boxed"]


@pytest.mark.skipif(not COMMAND.exists(), reason="needs `make .venv-lm-eval`")
def test_the_harness_evaluates_a_folder_as_a_run_exports_it(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "tools/toy/data/eval.jsonl").read_text().splitlines()]
    sums = [row for row in rows if row["domain"] == "math"][:PROBLEMS]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in sums))
    (tmp_path / "toy_sums.yaml").write_text(TASK % problems)
    assert accuracy(tmp_path, "math") > 0.7 > accuracy(tmp_path, "code")
