"""Make the toy data, tokenizer and models from nothing, on a CPU: see ``toy/world.py``.

    python tools/make_toy_models.py [--out tools/toy] [--only student|math|code] [--steps N]
    python tools/make_toy_models.py --only math_unreliable [--out runs/toy-models] [--steps N]

The two teachers learn one domain each from clean solutions; the student learns both domains from
mostly careless ones.  A teacher sees a small share of careless solutions too and is softened once
it is trained: both keep its log probability of a careless token near -4, so that it corrects the
student without being masked as an outlier.

``math_unreliable`` is not shipped and only made when asked for, in little more than a minute: the
shipped math teacher, taught to be careless on the problems with a product, and only there.  There it
sees a small share of clean solutions, for the same reason as above.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from toy.tokenizer import save_tokenizer, train_tokenizer
from toy.training import Recipe, accuracy, load_model, new_model, train, turning_logprobs
from toy.world import DOMAINS, is_mul_add, problems
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM

RECIPES = {
    "student": Recipe(("math", "math", "math", "code"), careless=0.86, steps=3400, seed=1),
    "math": Recipe(("math",), careless=0.004, steps=2600, seed=2, soften=0.75),
    "code": Recipe(("code",), careless=0.004, steps=1400, seed=3, soften=0.75),
}
UNRELIABLE = "math_unreliable"
UNRELIABLE_RECIPE = Recipe(("math",), careless=0.01, steps=400, learning_rate=5e-4, seed=4, wrong_on_mul_add=True)
TOOLS = Path(__file__).resolve().parent
SHIPPED, MADE = TOOLS / "toy", TOOLS.parent / "runs" / "toy-models"
TRAIN_ROWS, EVAL_ROWS, TOKENIZER_ROWS = 1000, 200, 3000
DATA_SEED = 11


def write_data(folder: Path) -> None:
    """Write ``train.jsonl`` and ``eval.jsonl`` with both domains in mixed order."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        rows = [
            {"id": f"{domain}-{split}-{i}", "domain": domain, "prompt": p.prompt, "answer": p.answer}
            for domain in DOMAINS
            for i, p in enumerate(problems(domain, split, count, DATA_SEED))
        ]
        random.Random(DATA_SEED).shuffle(rows)
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def read_eval(folder: Path, domain: str) -> list[dict[str, str]]:
    """The held-out rows of one domain."""
    lines = (folder / "eval.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["domain"] == domain]


def make_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer, learned from prompts and solutions of both domains."""
    drawn = [p for domain in DOMAINS for p in problems(domain, "train", TOKENIZER_ROWS, DATA_SEED)]
    return train_tokenizer(text for p in drawn for text in (p.prompt, p.clean))


def save_model(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the weights as bfloat16 with the configuration and the tokenizer."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # the library leaves it private
    save_tokenizer(tokenizer, folder)


def report(out: Path, names: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the accuracies of the saved models on the held-out problems."""
    print(f"{'model':<10}{'domain':<10}{'sampled':>9}{'greedy':>9}")
    for name in names:
        for domain in DOMAINS:
            rows = read_eval(out / "data", domain)
            sampled, greedy = (accuracy(out / "models" / name, tokenizer, rows, greedy) for greedy in (False, True))
            print(f"{name:<10}{domain:<10}{sampled:>9.1%}{greedy:>9.1%}", flush=True)


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """The recipe, or the same with another number of steps."""
    return recipe if steps is None else replace(recipe, steps=steps)


def make_shipped(out: Path, names: list[str], steps: int | None) -> None:
    """Write the data, then train, save and measure the models asked for."""
    write_data(out / "data")
    tokenizer = make_tokenizer()
    for name in names:
        recipe = with_steps(RECIPES[name], steps)
        model = train(new_model(tokenizer, recipe.seed), tokenizer, name, recipe)
        save_model(model, tokenizer, out / "models" / name)
    report(out, names, tokenizer)


def report_unreliable(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the accuracies on the part and on the rest, and the log-prob of turning to the untaught solution."""
    print(f"{'problems':<10}{'count':>6}{'sampled':>9}{'greedy':>9}{'log-prob of turning':>21}{'5 %':>8}{'least':>8}")
    rows, drawn = read_eval(SHIPPED / "data", "math"), problems("math", "eval", EVAL_ROWS, DATA_SEED)
    for name, inside in (("mul_add", True), ("rest", False)):
        part = [row for row in rows if is_mul_add(row["prompt"]) == inside]
        sampled, greedy = (accuracy(folder, tokenizer, part, greedy) for greedy in (False, True))
        turns = turning_logprobs(load_model(folder), tokenizer, [p for p in drawn if p.mul_add == inside], not inside)
        mean, low, least = turns.mean(), turns.quantile(0.05), turns.min()
        print(f"{name:<10}{len(part):>6}{sampled:>9.1%}{greedy:>9.1%}{mean:>21.2f}{low:>8.2f}{least:>8.2f}", flush=True)


def make_unreliable(folder: Path, steps: int | None) -> None:
    """Train the shipped math teacher further, then save and measure it."""
    base = SHIPPED / "models" / "math"
    tokenizer = make_tokenizer()
    model = train(load_model(base), tokenizer, UNRELIABLE, with_steps(UNRELIABLE_RECIPE, steps))
    save_model(model, tokenizer, folder)
    report_unreliable(folder, tokenizer)


def main() -> None:
    """Make the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help=f"default: tools/toy; for {UNRELIABLE}: runs/toy-models")
    parser.add_argument("--only", choices=sorted([*RECIPES, UNRELIABLE]), help="make just this model")
    parser.add_argument("--steps", type=int, help="training steps instead of the recipe's")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to gain from more
    if args.only == UNRELIABLE:
        make_unreliable((args.out or MADE) / UNRELIABLE, args.steps)
    else:
        make_shipped(args.out or SHIPPED, [args.only] if args.only else list(RECIPES), args.steps)


if __name__ == "__main__":
    main()
