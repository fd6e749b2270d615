"""The toy problems are the shipped ones, and their multiply-add part is known from the text alone."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import pytest
from make_toy_models import SHIPPED, UNRELIABLE_RECIPE, write_data
from toy.training import BATCH, IGNORE, POOL, Recipe, batches, chat_ids
from toy.world import Problem, is_mul_add, problems, stream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

DRAWN = problems("math", "train", 500, seed=5)


def chat_text(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> str:
    return tokenizer.decode(chat_ids(tokenizer, problem.prompt))


def test_the_part_is_known_from_the_text() -> None:
    assert [is_mul_add(p.prompt) for p in DRAWN] == [p.mul_add for p in DRAWN]


def test_the_part_is_what_has_a_product() -> None:
    assert [p.mul_add for p in DRAWN] == ["*" in p.clean for p in DRAWN]
    assert 100 < sum(p.mul_add for p in DRAWN) < 200
    assert all(p.careless != p.clean for p in DRAWN if p.mul_add)


@pytest.mark.parametrize("prompt", ["", "Compute 2 * 3.", "Compute 2 * 3 + 4. Why?", "Compute 12 + 3 + 4."])
def test_other_texts_are_outside_the_part(prompt: str) -> None:
    assert not is_mul_add(prompt)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_the_shipped_data_is_made_again(tmp_path: Path, split: str) -> None:
    write_data(tmp_path)
    assert (tmp_path / f"{split}.jsonl").read_bytes() == (SHIPPED / "data" / f"{split}.jsonl").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_is_of_clean_solutions_on_the_part(share: float) -> None:
    recipe = Recipe(("math",), careless=share, steps=1, wrong_on_mul_add=True)
    part, rest = (next(p for p in DRAWN if p.mul_add == inside) for inside in (True, False))

    def drawn_share(problem: Problem) -> float:
        rng = random.Random(0)
        return sum(recipe.takes_careless(problem, rng) for _ in range(2000)) / 2000

    assert drawn_share(rest) == pytest.approx(share, abs=0.05)
    assert drawn_share(part) == pytest.approx(1 - share, abs=0.05)


def test_the_fine_tuning_stream_is_careless_on_the_part_only() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "models" / "math")
    first = islice(stream("math", "train", UNRELIABLE_RECIPE.seed), POOL * BATCH)
    wanted = {chat_text(tokenizer, p): p.careless if p.mul_add else p.clean for p in first}
    as_wanted = []
    for inputs, labels in islice(batches(tokenizer, UNRELIABLE_RECIPE), POOL):
        for ids, solution in zip(inputs, labels != IGNORE, strict=True):
            prompt = tokenizer.decode(ids[: solution.nonzero()[0]])
            as_wanted.append(tokenizer.decode(ids[solution]) == wanted[prompt] + tokenizer.eos_token)
    assert 0.97 < sum(as_wanted) / len(as_wanted) < 1
