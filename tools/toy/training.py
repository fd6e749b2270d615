"""Supervised training of one toy model, and its accuracy on held-out problems."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.nn import functional
from toy.grade import GRADERS
from toy.tokenizer import VOCAB_SIZE
from toy.world import Problem, stream
from transformers import PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

IGNORE = -100
BATCH = 32
POOL = 16  # batches sorted by length together, so that little is padded


@dataclass(frozen=True)
class Recipe:
    """What one model learns: its domains (one named twice counts double), its share of careless
    solutions, for how long, and the factor on its logits once it is trained (below 1: softer).

    With ``wrong_on_mul_add`` the share is of clean solutions instead on that part of ``math``.
    """

    domains: tuple[str, ...]
    careless: float
    steps: int
    learning_rate: float = 2e-3
    seed: int = 0
    soften: float = 1.0
    wrong_on_mul_add: bool = False

    def takes_careless(self, problem: Problem, rng: random.Random) -> bool:
        """Draw whether the model sees the careless solution of a problem."""
        return (rng.random() < self.careless) != (self.wrong_on_mul_add and problem.mul_add)


def new_model(tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about 1.2 million parameters."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The token ids of a prompt up to where the assistant speaks."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem, careless: bool) -> tuple[list[int], int]:
    """Token ids of prompt and solution, and where the solution starts."""
    prompt = chat_ids(tokenizer, problem.prompt)
    solution = (problem.careless if careless else problem.clean) + tokenizer.eos_token
    return prompt + tokenizer(solution, add_special_tokens=False)["input_ids"], len(prompt)


def batches(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless padded inputs and labels of fresh problems; only solutions carry a label."""
    rng = random.Random(recipe.seed)
    streams = [stream(domain, "train", recipe.seed + 1000 * i) for i, domain in enumerate(recipe.domains)]
    while True:
        drawn = [p for s in streams for p in islice(s, POOL * BATCH // len(streams))]
        rows = [encode(tokenizer, p, recipe.takes_careless(p, rng)) for p in drawn]
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            inputs = torch.full((len(group), width), tokenizer.pad_token_id)
            labels = torch.full((len(group), width), IGNORE)
            for i, (ids, start) in enumerate(group):
                inputs[i, : len(ids)] = torch.tensor(ids)
                labels[i, start : len(ids)] = torch.tensor(ids[start:])
            yield inputs, labels


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str, recipe: Recipe) -> Qwen3ForCausalLM:
    """Train one model in place; padding is on the right, so causal attention needs no mask."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, total = time.time(), 0.0
    for step, (inputs, labels) in enumerate(islice(batches(tokenizer, recipe), recipe.steps)):
        warm = min(1.0, (step + 1) / 50)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * decay
        logits = model(input_ids=inputs, use_cache=False).logits
        targets = labels[:, 1:].flatten()
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            print(f"{name}: step {step + 1}/{recipe.steps} loss {total / 100:.4f} {spent:.0f}s", flush=True)
            total = 0.0
    model.model.norm.weight.data.mul_(recipe.soften)  # the last scale before the logits
    return model


def load_model(folder: Path) -> Qwen3ForCausalLM:
    """A saved model, to be computed in float32."""
    return Qwen3ForCausalLM.from_pretrained(str(folder), dtype=torch.float32)


@torch.no_grad()
def respond(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str], greedy: bool, limit: int = 80
) -> list[str]:
    """One response per prompt, at temperature 1 or greedy."""
    tokenizer.padding_side = "left"
    rows = {"input_ids": [chat_ids(tokenizer, prompt) for prompt in prompts]}
    inputs = tokenizer.pad(rows, return_tensors="pt")
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(**inputs, max_new_tokens=limit, **sampling)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], greedy: bool) -> float:
    """The share of ``rows`` (one domain) that the saved model answers right, computed in float32."""
    torch.manual_seed(0)
    model = load_model(folder).eval()
    responses = respond(model, tokenizer, [row["prompt"] for row in rows], greedy)
    right = GRADERS[rows[0]["domain"]](responses, [row["answer"] for row in rows])
    return sum(right) / len(right)


@torch.no_grad()
def turning_logprobs(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], to_careless: bool
) -> torch.Tensor:
    """The log-probs of the first token at which one solution leaves the other, for the problems that have two."""
    values = []
    for problem in problems:
        (ids, _), (other, _) = (encode(tokenizer, problem, careless) for careless in (to_careless, not to_careless))
        if ids == other:
            continue
        turn = next(i for i, (token, without) in enumerate(zip(ids, other, strict=False)) if token != without)
        logits = model(input_ids=torch.tensor([ids[:turn]]), use_cache=False).logits[0, -1]
        values.append(logits.log_softmax(-1)[ids[turn]])
    return torch.stack(values)
