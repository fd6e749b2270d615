"""Supervised training of one multimodal toy model, and its accuracy on held-out problems."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from toy.grade import GRADERS, grade_math
from toy.training import BATCH, IGNORE, POOL, Recipe
from toy.world import Problem
from toy_multimodal.dice import PALETTE, Picture
from toy_multimodal.model import PATCH, SIDE, patches
from toy_multimodal.tokenizer import IMAGE, chat_ids
from toy_multimodal.world import stream
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    """Token ids of a prompt and perhaps its solution, where the solution starts, and the pictures of the prompt."""

    ids: list[int]
    start: int
    pictures: tuple[Picture, ...]


def encode(tokenizer: PreTrainedTokenizerBase, problem: Problem, solution: str | None) -> Row:
    """One problem as a row; None leaves the solution to the model."""
    pictures = getattr(problem, "pictures", ())
    prompt = chat_ids(tokenizer, problem.prompt, [c.width * c.height // SIDE**2 for c in pictures])
    if solution is None:
        return Row(prompt, len(prompt), pictures)
    answer = tokenizer(solution + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return Row(prompt + answer, len(prompt), pictures)


def collate(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], *, left: bool = False) -> Inputs:
    """Padded arguments of the model: on the right, or on the ``left`` to go on from."""
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row.ids), width) if left else slice(0, len(row.ids))
        ids[i, place], mask[i, place] = torch.tensor(row.ids), 1
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image).int()}
    pictures = [picture for row in rows for picture in row.pictures]
    if pictures:
        colours = np.array(PALETTE, dtype=np.uint8)
        inputs["pixel_values"] = torch.from_numpy(np.concatenate([patches(colours[c.pixels()]) for c in pictures]))
        inputs["image_grid_thw"] = torch.tensor([[1, c.height // PATCH, c.width // PATCH] for c in pictures])
    return inputs


def batches(tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """Endless padded inputs and labels of fresh problems; only solutions carry a label."""
    rng = random.Random(recipe.seed)
    streams = [stream(domain, "train", recipe.seed + 1000 * i) for i, domain in enumerate(recipe.domains)]
    while True:
        drawn = [p for s in streams for p in islice(s, POOL * BATCH // len(streams))]
        rows = [encode(tokenizer, p, p.careless if recipe.takes_careless(p, rng) else p.clean) for p in drawn]
        rows.sort(key=lambda row: len(row.ids))
        groups = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            inputs = collate(tokenizer, group)
            labels = torch.full_like(inputs["input_ids"], IGNORE)
            for i, row in enumerate(group):
                labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
            yield inputs, labels


def train(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, name: str, recipe: Recipe
) -> Qwen3VLForConditionalGeneration:
    """Train one model in place, as far as its parameters ask for gradients."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    began, total = time.time(), 0.0
    for step, (inputs, labels) in enumerate(islice(batches(tokenizer, recipe), recipe.steps)):
        warm = min(1.0, (step + 1) / 50)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * warm * decay
        logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        total += loss.item()
        if (step + 1) % 100 == 0:
            spent = time.time() - began
            print(f"{name}: step {step + 1}/{recipe.steps} loss {total / 100:.4f} {spent:.0f}s", flush=True)
            total = 0.0
    model.model.language_model.norm.weight.data.mul_(recipe.soften)  # the last scale before the logits
    return model


@torch.no_grad()
def respond(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    greedy: bool,
    limit: int = 80,
) -> list[str]:
    """One response per problem, at temperature 1 or greedy."""
    inputs = collate(tokenizer, [encode(tokenizer, p, None) for p in problems], left=True)
    sampling = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    out = model.generate(**inputs, max_new_tokens=limit, **sampling)
    return tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def accuracy(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, problems: list[Problem], greedy: bool
) -> float:
    """The share of ``problems`` (one domain) that the model answers right."""
    torch.manual_seed(0)
    responses = respond(model.eval(), tokenizer, problems, greedy)
    grade = GRADERS.get(problems[0].domain, grade_math)
    return sum(grade(responses, [p.answer for p in problems])) / len(problems)
