"""Make the multimodal toy data and models from nothing, on a CPU: see ``toy_multimodal/world.py``.

    python tools/make_toy_multimodal.py [--out tools/toy_multimodal] [--only data|teacher|language|student] [--steps N]

The teacher learns to read dice from clean solutions.  The student is made as such models are: a language model learns
the text world's code, gets a vision tower that can see (the teacher's), and learns dice with it, without changing it;
all of it from mostly careless solutions.  So the tower can stay frozen when the student is distilled, and the text-only
code teacher of ``tools/toy`` can teach it too.  The language model alone is not shipped: it is in ``runs/toy-models``.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from toy.training import Recipe
from toy.world import Problem
from toy_multimodal.model import load_model, new_model, save_model
from toy_multimodal.tokenizer import make_tokenizer
from toy_multimodal.training import accuracy, train
from toy_multimodal.world import stream
from transformers import PreTrainedTokenizerBase

RECIPES = {
    "teacher": Recipe(("dice",), careless=0.004, steps=800, seed=2, soften=0.75),
    "language": Recipe(("code",), careless=0.88, steps=700, seed=3),
    "student": Recipe(("dice", "dice", "dice", "code"), careless=0.88, steps=800, seed=1),
}
TOOLS = Path(__file__).resolve().parent
SHIPPED, MADE = TOOLS / "toy_multimodal", TOOLS.parent / "runs" / "toy-models"
ROWS = {"train": 600, "eval": 200}  # of each domain
DATA_SEED = 11
URL = "data:image/png;base64,"


def problems(domain: str, split: str, count: int) -> list[Problem]:
    """The first problems of a stream that have distinct keys."""
    found: dict[str, Problem] = {}
    for problem in stream(domain, split, DATA_SEED):
        found.setdefault(problem.key, problem)
        if len(found) == count:
            break
    return list(found.values())


def record(name: str, problem: Problem) -> dict[str, object]:
    """One line of a data file; images are PNG files as data URLs."""
    row = {"id": name, "domain": problem.domain, "prompt": problem.prompt, "answer": problem.answer}
    images = [URL + base64.b64encode(p.png()).decode() for p in getattr(problem, "pictures", ())]
    return row | ({"images": images} if images else {})


def write_data(folder: Path) -> None:
    """Write ``dice_*.jsonl`` with dice alone, and ``cross_*.jsonl`` with code among them in mixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in ROWS.items():
        rows = {
            domain: [record(f"{domain}-{split}-{i}", p) for i, p in enumerate(problems(domain, split, count))]
            for domain in ("dice", "code")
        }
        mixed = [*rows["dice"], *rows["code"]]
        random.Random(DATA_SEED).shuffle(mixed)
        for name, lines in (("dice", rows["dice"]), ("cross", mixed)):
            with open(folder / f"{name}_{split}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def folder_of(out: Path, name: str) -> Path:
    """Where a model is saved."""
    return MADE / name if name == "language" else out / "models" / name


def make_model(out: Path, name: str, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> None:
    """Train and save one model; the student is made of the other two."""
    if name == "student":
        model = load_model(folder_of(out, "language"))
        model.model.visual = load_model(folder_of(out, "teacher")).model.visual.requires_grad_(False)
    else:
        model = new_model(recipe.seed)
    save_model(train(model, tokenizer, name, recipe), tokenizer, folder_of(out, name))


def report(out: Path, names: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the accuracies of the saved models on the held-out problems."""
    print(f"{'model':<10}{'domain':<10}{'sampled':>9}{'greedy':>9}")
    for name in names:
        model = load_model(folder_of(out, name))
        for domain in dict.fromkeys(RECIPES[name].domains):
            held_out = problems(domain, "eval", ROWS["eval"])
            sampled, greedy = (accuracy(model, tokenizer, held_out, greedy) for greedy in (False, True))
            print(f"{name:<10}{domain:<10}{sampled:>9.1%}{greedy:>9.1%}", flush=True)


def main() -> None:
    """Make what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=SHIPPED, help="default: tools/toy_multimodal")
    parser.add_argument("--only", choices=["data", *RECIPES], help="make just this")
    parser.add_argument("--steps", type=int, help="training steps instead of the recipe's")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to gain from more
    names = [name for name in RECIPES if args.only in (None, name)]
    if args.only in (None, "data"):
        write_data(args.out / "data")
    tokenizer = make_tokenizer()
    for name in names:
        recipe = RECIPES[name]
        make_model(args.out, name, tokenizer, replace(recipe, steps=args.steps or recipe.steps))
    report(args.out, names, tokenizer)


if __name__ == "__main__":
    main()
