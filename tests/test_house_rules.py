"""Rules of this project that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_opd.config import load_config, load_evaluation

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_opd"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PYTHON_FILES = SOURCES + sorted((ROOT / "tools").rglob("*.py")) + sorted((ROOT / "tests").rglob("*.py"))

# These run by path in a Python that is not ours, or before anything may be imported.
RUN_BY_PATH = {"sglang_launcher.py", "forker.py", "runner.py"}

# What each part may import of the package, besides itself. Dependencies point one way.
FOUNDATION = {"errors", "records", "config"}
ALLOWED = {
    "errors": set(),
    "records": set(),
    "config": {"errors"},
    "runtime": FOUNDATION,
    "recipe": FOUNDATION,
    "data": FOUNDATION | {"runtime", "recipe"},
    "verifiers": FOUNDATION | {"runtime"},
    "engines": FOUNDATION | {"runtime"},
    "teachers": FOUNDATION | {"runtime", "engines"},
    "observe": FOUNDATION | {"runtime"},
    "coordinator": FOUNDATION | {"runtime", "recipe", "data", "verifiers", "engines", "teachers", "observe"},
    "student": FOUNDATION | {"runtime", "recipe", "engines", "observe"},
    "train": FOUNDATION | {"runtime", "data", "engines", "observe", "student"},
    "sampling": FOUNDATION | {"runtime", "verifiers", "engines", "observe", "train"},
    "difficulty": FOUNDATION | {"runtime", "recipe", "data", "engines", "sampling", "train"},
    "evaluation": FOUNDATION | {"runtime", "data", "engines", "sampling", "train", "observe", "convert"},
    "audit": FOUNDATION | {"runtime", "recipe", "observe", "data"},
    "plan": FOUNDATION | {"runtime", "student"},
    "view": FOUNDATION | {"runtime", "observe", "audit"},
    "convert": FOUNDATION | {"runtime", "observe", "student", "train"},
    "doctor": FOUNDATION
    | {"runtime", "data", "verifiers", "engines", "teachers", "observe", "student", "train", "plan"},
    "prepare": FOUNDATION | {"runtime", "data", "verifiers", "observe"},
    "cli": FOUNDATION
    | {
        "runtime",
        "train",
        "difficulty",
        "evaluation",
        "observe",
        "audit",
        "plan",
        "view",
        "convert",
        "doctor",
        "prepare",
    },
}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return names


def part_of(path: Path) -> str:
    """The part of the package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path: Path) -> None:
    part = part_of(path)
    if part == "__init__":
        return
    used = {name.split(".")[1] for name in imports_of(path) if name.startswith("megatron_opd.")}
    assert used - {part} <= ALLOWED[part]


def test_only_the_student_imports_megatron_and_nobody_imports_an_engine() -> None:
    for path in SOURCES:
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert part_of(path) == "student" or not roots & {"megatron", "mbridge"}, path
        assert path.name in RUN_BY_PATH or not roots & {"sglang", "vllm"}, path


def test_the_recipe_does_no_io() -> None:
    for path in (PACKAGE / "recipe").glob("*.py"):
        roots = {name.split(".")[0] for name in imports_of(path)}
        assert roots <= {
            "__future__",
            "collections",
            "dataclasses",
            "heapq",
            "math",
            "typing",
            "numpy",
            "torch",
            "megatron_opd",
            "",
        }


def test_only_the_environment_module_reads_the_environment() -> None:
    own_rules = RUN_BY_PATH | {"env.py"}
    for path in SOURCES:
        assert path.name in own_rules or "os.environ" not in path.read_text(), path


@pytest.mark.parametrize("arguments", [["-c", "import megatron_opd.cli"], ["-m", "megatron_opd.cli", "--help"]])
def test_help_and_import_pull_in_no_torch(arguments: list[str]) -> None:
    code = "import sys; sys.argv[1:] = ['--help']; import megatron_opd.cli as cli\n"
    code += "try: cli.main()\nexcept SystemExit: pass\n" if "--help" in arguments else ""
    code += "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_ascii(path: Path) -> None:
    source = path.read_text()
    assert source.isascii()
    assert source.count("\n") <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name}: {length} lines"
            arguments = node.args.args + node.args.kwonlyargs
            assert len(arguments) <= 9, f"{node.name}: {len(arguments)} parameters"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_are_typed(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            assert node.returns is not None or path.name in RUN_BY_PATH, f"{node.name} has no return type"


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    if path.parent == ROOT / "conf/eval":
        load_evaluation([str(path)])
        return
    is_part = path.parent != ROOT / "conf"  # of a config, such as a recipe: loads on top of a whole one
    load_config(*((ROOT / "conf/toy.yaml", [str(path)]) if is_part else (path, [])))
