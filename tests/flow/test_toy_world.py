"""The shipped toy world is what it claims to be, measured on the real servers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pools import pool_of

from megatron_opd.config import load_config
from megatron_opd.coordinator.evaluate import accuracies, evaluate
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.tokenizer import load_tokenizer, same_tokenizer
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.verifiers.pool import VerifierPool

from runs import ROOT, TOY, Servers

TOY_WORLD = ROOT / "tools" / "toy"
MODELS = TOY_WORLD / "models"


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def test_everything_fits_in_eight_megabytes() -> None:
    assert size_of(TOY_WORLD) <= 8e6


def test_held_out_prompts_are_not_training_prompts() -> None:
    rows = {part: (TOY_WORLD / "data" / f"{part}.jsonl").read_text().splitlines() for part in ("train", "eval")}
    prompts = {part: [json.loads(row)["prompt"] for row in lines] for part, lines in rows.items()}
    assert len(set(prompts["eval"])) == len(prompts["eval"]) == 400
    assert not set(prompts["train"]) & set(prompts["eval"])


@pytest.mark.parametrize("teacher", ["math", "code"])
def test_models_share_one_tokenizer(teacher: str) -> None:
    same_tokenizer(MODELS / "student", MODELS / teacher)


async def test_each_teacher_knows_its_own_domain_and_not_the_other(servers: Servers) -> None:
    config = load_config(TOY, ["evaluation.samples_per_prompt=2", "verifiers.timeout_s=10"])
    tokenizer = load_tokenizer(MODELS / "student")
    _, held_out = read_inputs(config, tokenizer)
    verifiers = VerifierPool(config.verifiers)
    accuracy = {}
    for teacher, url in (("math", servers.math), ("code", servers.code)):
        client = SGLangClient(url, timeout_s=120, max_concurrency=128)
        graded = await evaluate(RolloutEngine(pool_of(client), tokenizer, 2), verifiers, held_out, config)
        accuracy[teacher] = accuracies(graded)
        await client.close()
    await verifiers.close()
    for teacher, other in (("math", "code"), ("code", "math")):
        assert accuracy[teacher][teacher].value >= 0.9
        assert accuracy[teacher][other].value <= 0.2
        assert accuracy[teacher][teacher].unknown == 0
