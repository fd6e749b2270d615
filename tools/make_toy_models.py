"""Make the toy data, tokenizer and models from nothing, on a CPU: see ``toy/world.py``.

    python tools/make_toy_models.py [--out tools/toy] [--only student|math|code] [--steps N]

The two teachers learn one domain each from clean solutions; the student learns both domains from
mostly careless ones.  A teacher sees a small share of careless solutions too and is softened once
it is trained: both keep its log probability of a careless token near -4, so that it corrects the
student without being masked as an outlier.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from toy.tokenizer import save_tokenizer, train_tokenizer
from toy.training import Recipe, accuracy, train
from toy.world import DOMAINS, problems
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM

RECIPES = {
    "student": Recipe(("math", "math", "math", "code"), careless=0.86, steps=3400, seed=1),
    "math": Recipe(("math",), careless=0.004, steps=2600, seed=2, soften=0.75),
    "code": Recipe(("code",), careless=0.004, steps=1400, seed=3, soften=0.75),
}
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


def main() -> None:
    """Write the data, then train, save and measure the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "toy")
    parser.add_argument("--only", choices=sorted(RECIPES), help="make just this model")
    parser.add_argument("--steps", type=int, help="training steps instead of the recipe's")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the models are too small to gain from more
    names = [args.only] if args.only else list(RECIPES)
    write_data(args.out / "data")
    tokenizer = make_tokenizer()
    for name in names:
        recipe = RECIPES[name] if args.steps is None else replace(RECIPES[name], steps=args.steps)
        save_model(train(tokenizer, name, recipe), tokenizer, args.out / "models" / name)
    report(args.out, names, tokenizer)


if __name__ == "__main__":
    main()
