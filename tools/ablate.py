"""Which part of the recipe does what: runs every combination on the toy world, several seeds each, and tabulates them.

    python tools/ablate.py [--seeds 0 1 2] [--out runs/ablation] [--only-table] [key=value ...]

One command: it makes what is missing (the unreliable teacher, the difficulty store), starts the servers once, trains
what has not been trained (a finished run has a summary; kill this at any moment and start it again), and writes
OUT/table.md and OUT/figure.png. The budget is tokens: every run ends with the
step in which it has generated max_generated_tokens of conf/ablation.yaml.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from ablation.cells import BESIDE_THE_GRID, DELTA_4, LAZY, PARTS, RANDOM_LABELS, WEIGHTED, constant_reward, grid
from ablation.results import effects, figure, mean_shift, read_run, table

from megatron_opd.config import Config, load_config
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.runtime.process import start, stop_all
from megatron_opd.runtime.supervision import answers, signals_raise
from megatron_opd.train.roles import assign_endpoints, server_roles

CONFIG = Path("conf/ablation.yaml")
COMMAND = [sys.executable, "-m", "megatron_opd.cli"]
TEACHER = Path("runs/toy-models/math_unreliable")


def prepare() -> None:
    """Make the teacher and the difficulty store where they are missing."""
    if not (TEACHER / "model.safetensors").is_file():
        subprocess.run([sys.executable, "tools/make_toy_models.py", "--only", "math_unreliable"], check=True)
    if not WEIGHTED.is_file():
        output = f"difficulty.output={WEIGHTED.parent}"
        subprocess.run([*COMMAND, "difficulty", "conf/toy.yaml", output], check=True)


def start_servers(config: Config, logs: Path) -> list[str]:
    """Start the rollout engine and the teachers; overrides that attach a run to them."""
    logs.mkdir(parents=True, exist_ok=True)
    endpoints = assign_endpoints(config)
    roles = server_roles(config, endpoints)
    children = [start(role.name, role.argv, role.environment, logs / f"{role.name}.log") for role in roles]
    for role, child in zip(roles, children, strict=True):
        while not answers(role.ready_url):
            if child.returncode is not None:
                raise SystemExit(f"{role.name} died:\n{child.last_lines()}")
            time.sleep(0.5)
    teachers = [f"teachers.{domain}.server.urls=[{','.join(urls)}]" for domain, urls in endpoints.teachers.items()]
    return [f"rollout.server.urls=[{','.join(endpoints.rollout)}]", *teachers]


def train(cell: str, seed: int, overrides: list[str], out: Path) -> Path:
    """The folder of a finished run, which is made where it does not exist."""
    name = f"{cell.replace('+', '_').replace(' ', '_')}-{seed}"
    folder = out / name
    if not (folder / "summary.json").is_file():
        began = time.monotonic()
        settings = [f"name={name}", f"output={out}", f"seed={seed}", "existing=archive", *overrides]
        with (out / f"{name}.out").open("w") as log:
            subprocess.run([*COMMAND, "train", str(CONFIG), *settings], stdout=log, stderr=log, check=True)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    return folder


def run_all(seeds: list[int], out: Path, extra: list[str]) -> None:
    """Train every cell and control that is missing, one after the other."""
    attach = start_servers(load_config(CONFIG, extra), out / "servers")

    def run(cell: str, seed: int, overrides: list[str]) -> Path:
        return train(cell, seed, [*attach, *extra, *overrides], out)

    for seed in seeds:
        folders = {cell: run(cell, seed, overrides) for cell, overrides in grid().items()}
        run("constant reward", seed, constant_reward(mean_shift(folders["all"])))
        run("random labels", seed, RANDOM_LABELS)
    for seed in seeds:
        strong = run("delta 4", seed, DELTA_4)
        run("constant reward as delta 4", seed, constant_reward(mean_shift(strong)))
    for seed in seeds:
        run("lazy instead of offline", seed, LAZY)


def tabulate(out: Path) -> None:
    """Write and print the table of all runs that are finished."""
    config = load_config(CONFIG, [])
    _, held_out = read_inputs(config, load_tokenizer(config.student.model))
    prompts = {prompt.id: prompt.text for prompt in held_out}
    outcomes = {}
    for cell in [*grid(), *BESIDE_THE_GRID]:
        folders = sorted(out.glob(f"{cell.replace('+', '_').replace(' ', '_')}-[0-9]*"))
        runs = [read_run(folder, prompts) for folder in folders if (folder / "summary.json").is_file()]
        if runs:
            outcomes[cell] = runs
    text = table(outcomes)
    if set(grid()) <= set(outcomes):
        text += "\n\n" + effects({cell: outcomes[cell] for cell in grid()}, list(PARTS))
    (out / "table.md").write_text(text + "\n")
    figure(outcomes, out / "figure.png")
    print(text)


def main() -> None:
    """Run what is missing, then tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--only-table", action="store_true")
    parser.add_argument("overrides", nargs="*", help="further changes of conf/ablation.yaml, for all runs")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        prepare()
        with signals_raise():
            try:
                run_all(arguments.seeds, arguments.out, arguments.overrides)
            finally:
                stop_all()
    tabulate(arguments.out)


if __name__ == "__main__":
    main()
