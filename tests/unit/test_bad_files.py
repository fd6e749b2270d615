"""Every command, given what is no input of it: one error that names it, exit code 1, and every file as it was."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_opd.cli import app

ROOT = Path(__file__).resolve().parents[2]
STUDENT, TOY, EVAL = ROOT / "tools/toy/models/student", ROOT / "conf/toy.yaml", ROOT / "conf/eval/toy.yaml"
NOBODY = "server.urls=[http://127.0.0.1:9]"
Arguments = Callable[[Path, Path], list[object]]  # of the bad input, and of a folder for outputs

# Command to its arguments.
INPUTS: dict[str, Arguments] = {
    "prepare": lambda bad, out: ["prepare", "gsm8k", bad, out / "new.jsonl"],
    "prepare --benchmark": lambda bad, out: [
        *("prepare", "gsm8k", out / "good.jsonl", out / "new.jsonl", "--benchmark", f"gsm8k={bad}")
    ],
    "prepare --tokenizer": lambda bad, out: [
        *("prepare", "gsm8k", out / "good.jsonl", out / "new.jsonl", "--tokenizer", bad, "--max-tokens", "9")
    ],
    "eval model": lambda bad, out: ["eval", bad, EVAL, f"output={out / 'new'}", NOBODY],
    "eval config": lambda bad, out: ["eval", STUDENT, bad, f"output={out / 'new'}", NOBODY],
    "eval problems": lambda bad, out: [
        *("eval", STUDENT, EVAL, f"benchmarks.toy_math.file={bad}", f"output={out / 'new'}", NOBODY)
    ],
    "compare": lambda bad, out: ["compare", bad, bad],
    "difficulty config": lambda bad, out: ["difficulty", bad],
    "difficulty model": lambda bad, out: [
        "difficulty",
        TOY,
        f"student.model={bad}",
        f"difficulty.output={out / 'new'}",
    ],
    "difficulty prompts": lambda bad, out: [
        *("difficulty", TOY, f"data.train={bad}", f"difficulty.output={out / 'new'}", f"rollout.{NOBODY}")
    ],
    "convert to-megatron": lambda bad, out: ["convert", "to-megatron", bad, out / "new"],
    "convert to-hf": lambda bad, out: ["convert", "to-hf", bad, out / "new"],
    "plan config": lambda bad, out: ["plan", bad],
    "plan model": lambda bad, out: ["plan", TOY, f"student.model={bad}"],
    "doctor": lambda bad, out: ["doctor", bad, "--json"],
    "view": lambda bad, out: ["view", bad],
    "audit": lambda bad, out: ["audit", bad],
    "train config": lambda bad, out: ["train", bad, "--dry-run"],
    "train prompts": lambda bad, out: ["train", TOY, f"data.train={bad}", f"output={out / 'runs'}", "--dry-run"],
    "train streamed": lambda bad, out: [
        *("train", TOY, f"data.train={bad}", "data.stream.window_mb=2", "data.columns.id=id"),
        *(f"output={out / 'runs'}", "--dry-run"),
    ],
}
OUTPUTS: dict[str, Arguments] = {
    "prepare": lambda bad, out: ["prepare", "gsm8k", out / "good.jsonl", bad / "new.jsonl"],
    "eval": lambda bad, out: ["eval", STUDENT, EVAL, f"output={bad}", NOBODY],
    "difficulty": lambda bad, out: ["difficulty", TOY, f"difficulty.output={bad}", f"rollout.{NOBODY}"],
    "convert to-megatron": lambda bad, out: ["convert", "to-megatron", STUDENT, bad],
}


def kinds(folder: Path) -> dict[str, Path]:
    """What is given instead of a good file or folder."""
    found = {name: folder / name for name in ("missing.jsonl", "a_folder.jsonl", "empty.jsonl", "broken.jsonl")}
    found |= {name: folder / name for name in ("empty.yaml", "binary.yaml", "truncated.parquet")}
    found["inside a file"] = folder / "empty.jsonl" / "x.jsonl"
    found["a_folder.jsonl"].mkdir()
    for name in ("empty.jsonl", "empty.yaml"):
        found[name].touch()
    found["broken.jsonl"].write_text('{"prompt": "1 + 1", "answer"')
    found["binary.yaml"].write_bytes(b"\xff\xfe\x00\x9f")
    found["truncated.parquet"].write_bytes(b"PAR1" + bytes(40))
    return found


KINDS = ["missing.jsonl", "a_folder.jsonl", "empty.jsonl", "broken.jsonl", "empty.yaml", "binary.yaml"]
KINDS += ["truncated.parquet", "inside a file"]


@pytest.fixture
def bad(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "good.jsonl").write_text('{"question": "1 + 1?", "answer": "#### 2"}\n')
    (tmp_path / "bad").mkdir()
    return kinds(tmp_path / "bad")


def content(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refused(tmp_path: Path, arguments: list[object]) -> str:
    """What the command says; it must fail by itself and leave everything as it was."""
    before = content(tmp_path)
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code == 1 and isinstance(done.exception, SystemExit), (done.output, done.exc_info)
    assert content(tmp_path) == before
    return done.output


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", INPUTS)
def test_a_bad_input_is_named_and_nothing_is_lost(
    tmp_path: Path, bad: dict[str, Path], command: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    text = refused(tmp_path, INPUTS[command](bad[kind], tmp_path / "out"))
    assert bad[kind].name in text, text
    assert "error: " in text or command == "doctor"


@pytest.mark.parametrize("kind", ["empty.jsonl", "inside a file"])
@pytest.mark.parametrize("command", OUTPUTS)
def test_an_output_that_cannot_be_written(tmp_path: Path, bad: dict[str, Path], command: str, kind: str) -> None:
    text = refused(tmp_path, OUTPUTS[command](bad[kind], tmp_path / "out"))
    assert "error: " in text and "empty.jsonl" in text.replace("\n", "")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv (util-linux)")
@pytest.mark.parametrize(
    ("command", "shut"),
    [
        *[(command, "file") for command in ("prepare --benchmark", "eval problems", "train streamed")],
        *[(command, "folder") for command in ("prepare", "difficulty prompts", "compare")],
    ],
)
def test_a_file_that_may_not_be_read(tmp_path: Path, bad: dict[str, Path], command: str, shut: str) -> None:
    folder = tmp_path / "shut"
    folder.mkdir()
    file = folder / "prompts.jsonl"
    file.write_text('{"id": "a", "prompt": "1 + 1", "answer": "2", "domain": "math"}\n')
    place = file if shut == "file" else folder
    place.chmod(0)
    drop = "-dac_override,-dac_read_search"  # what lets root read everything
    argv = ["setpriv", f"--bounding-set={drop}", "--inh-caps=-all", str(ROOT / ".venv/bin/megatron-opd")]
    argv += map(str, INPUTS[command](file, tmp_path / "out"))
    try:
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    finally:
        place.chmod(0o700)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    assert "error: " in done.stdout and "Permission denied" in done.stdout and "prompts.jsonl" in done.stdout
    assert not (tmp_path / "out" / "new.jsonl").exists() and not (tmp_path / "out" / "new").exists()
