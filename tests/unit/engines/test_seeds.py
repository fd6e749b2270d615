"""Seeded sampling: one request for each response, with a seed of its own; and what the CPU launcher stands in for."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch
from pools import pool_of

from megatron_opd.engines.command import LAUNCHER
from megatron_opd.engines.rollout import RolloutEngine, response_seed
from megatron_opd.engines.sglang import Generation, Sampling
from megatron_opd.records import Prompt
from megatron_opd.runtime.http import TransientError

PROMPT = Prompt("p:1", "math", "?", (5, 6), "1")


class FakeTokenizer:
    eos_token_id = 2

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return str(ids)


class FakeClient:
    """Answers with the seed as the only token."""

    def __init__(self, version: int = 0) -> None:
        self.asked: list[tuple[int, Sampling]] = []
        self.version = version

    async def generate(
        self, prompt: tuple, samples: int, sampling: Sampling, top_ids: int, images: tuple
    ) -> list[Generation]:
        self.asked.append((samples, sampling))
        ids = np.array([(sampling.seed or 0) % 1000])
        return [Generation(ids, np.zeros(1, np.float32), np.array([self.version]), "stop", None)] * samples


async def test_each_response_has_a_request_and_a_seed_of_its_own() -> None:
    client = FakeClient()
    rollouts = await RolloutEngine(pool_of(client), FakeTokenizer(), 1, seed=7).sample_group(PROMPT, 3, 4, 16)
    seeds = [response_seed(7, "p:1", 3, number) for number in range(4)]
    assert client.asked == [(1, Sampling(16, 1.0, (2,), seed=seed)) for seed in seeds]
    assert [int(rollout.token_ids[0]) for rollout in rollouts] == [seed % 1000 for seed in seeds]


async def test_without_a_seed_a_group_is_one_request() -> None:
    client = FakeClient()
    await RolloutEngine(pool_of(client), FakeTokenizer(), 1).sample_group(PROMPT, 3, 4, 16)
    assert client.asked == [(4, Sampling(16, 1.0, (2,)))]


async def test_tokens_of_an_engine_that_has_lost_its_weights_are_nobody_s() -> None:
    lost, good = FakeClient(version=-1), FakeClient(version=3)
    engine = RolloutEngine(pool_of(lost, good), FakeTokenizer(), 2, refreshed=True)
    rollouts = await engine.sample_group(PROMPT, 3, 4, 16)
    assert len(lost.asked) == 1 and {int(rollout.versions[0]) for rollout in rollouts} == {3}
    alone = RolloutEngine(pool_of(FakeClient(version=-1)), FakeTokenizer(), 1, refreshed=True)
    with pytest.raises(TransientError, match="started again"):
        await alone.sample_group(PROMPT, 3, 4, 16)
    teacher = RolloutEngine(pool_of(FakeClient(version=-1)), FakeTokenizer(), 1)  # nobody refreshes it
    assert len(await teacher.sample_group(PROMPT, 3, 4, 16)) == 4


def test_seeds_differ_and_never_change() -> None:
    names = list(itertools.product((0, 1, -1), ("a", "b"), (0, 1, 12), (0, 1, 2)))
    seeds = [response_seed(*name) for name in names]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(0, "a", 0, 0) == 6213714296089835783  # a resumed run must get what the old one got


@pytest.fixture(scope="module")
def launcher():
    specification = importlib.util.spec_from_file_location("sglang_launcher", LAUNCHER)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def slow_murmur(*blocks: int) -> int:
    """MurmurHash3 of 32-bit blocks, x86, 32 bits, seed 0."""
    hashed = 0
    for block in blocks:
        mixed = block * 0xCC9E2D51 % 2**32
        hashed ^= (mixed << 15 | mixed >> 17) % 2**32 * 0x1B873593 % 2**32
        hashed = ((hashed << 13 | hashed >> 19) % 2**32 * 5 + 0xE6546B64) % 2**32
    hashed ^= 4 * len(blocks)
    hashed = (hashed ^ hashed >> 16) * 0x85EBCA6B % 2**32
    hashed = (hashed ^ hashed >> 13) * 0xC2B2AE35 % 2**32
    return hashed ^ hashed >> 16


def test_the_hash_is_murmur(launcher) -> None:
    seeds, positions = [0, 1, 2**63 - 1, 0x123456789ABCDEF], [0, 7, 4095, 123456]
    found = launcher.murmur_hash32(torch.tensor(seeds).to(torch.uint64), torch.tensor(positions), torch.arange(50))
    assert found.dtype == torch.uint32
    for row, (seed, position) in enumerate(zip(seeds, positions, strict=True)):
        expected = [slow_murmur(seed % 2**32, seed >> 32, position, column) for column in range(50)]
        assert found[row].tolist() == expected


def test_rows_of_a_product_do_not_depend_on_their_number(launcher, monkeypatch) -> None:
    functional = torch.nn.functional
    monkeypatch.setattr(functional, "linear", functional.linear)  # both are put back after the test
    monkeypatch.setattr(torch, "matmul", torch.matmul)
    plain_linear, plain_matmul = functional.linear, torch.matmul
    launcher.multiply_in_tiles()
    generator = torch.Generator().manual_seed(0)
    rows, weight, bias = (torch.randn(*size, generator=generator) for size in ((70, 160), (448, 160), (448,)))
    linear, matmul = functional.linear(rows, weight, bias), torch.matmul(rows, weight.T)
    torch.testing.assert_close(linear, plain_linear(rows, weight, bias))
    torch.testing.assert_close(matmul, plain_matmul(rows, weight.T))
    for start, count in ((0, 1), (1, 2), (5, 3), (30, 33), (69, 1)):
        part = rows[start : start + count]
        assert torch.equal(functional.linear(part, weight, bias), linear[start : start + count])
        assert torch.equal(torch.matmul(part, weight.T), matmul[start : start + count])
    assert functional.linear(rows[:0], weight).shape == (0, 448)
    assert torch.equal(functional.linear(rows.view(7, 10, 160), weight, bias).view(70, 448), linear)
    assert torch.equal(torch.matmul(rows[0], weight.T), plain_matmul(rows[0], weight.T))
