"""Log-probs of several tokens over a split vocabulary against log_softmax and autograd in float64.

Every rank checks itself; a failed assertion of a spawned rank is raised here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from megatron_opd.student.logprob import vocab_parallel_logprob, vocab_parallel_logprobs

POSITIONS, COLUMNS = 9, 516
# Three times the vocabulary: one padded column, the second rank half padded, the second rank all padding.
CASES = [(515, torch.float32), (400, torch.float32), (100, torch.float32), (515, torch.float64), (515, torch.bfloat16)]


@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_agrees_with_log_softmax(size: int, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    if size == 1:
        check_rank(0, 1, store)
    else:
        torch.multiprocessing.spawn(check_rank, args=(size, store), nprocs=size)


def check_rank(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        for vocab, dtype in CASES:
            for count in (0, 1, 5):
                check_case(vocab, dtype, count)
        check_one_token_is_the_case_of_one_column()
        check_ids_outside_the_vocabulary()
        dist.barrier()  # a rank that leaves while another still talks to it takes it down
    finally:
        dist.destroy_process_group()


def make_case(vocab: int, dtype: torch.dtype, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [POSITIONS, COLUMNS], ids and gradients of the log-probs [POSITIONS, count], equal on all ranks."""
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn(POSITIONS, COLUMNS, generator=generator) * 5).to(dtype)
    logits[0, 3] = 300.0  # a certain token
    ids = torch.randint(0, vocab, (POSITIONS, count), generator=generator)
    gradients = torch.randn(POSITIONS, count, generator=generator)
    if count > 1:
        ids[:, -1] = ids[:, 0]  # twice in each row
        ids[0, 0], ids[1, 1], ids[2, 1] = 3, vocab - 1, 0
        gradients[3] = 0.0
        gradients[4] -= gradients[4].mean()  # adds to 0: only the chosen tokens move
    return logits, ids, gradients


def own_columns(whole: torch.Tensor) -> torch.Tensor:
    return whole.chunk(dist.get_world_size(), dim=1)[dist.get_rank()]


def check_case(vocab: int, dtype: torch.dtype, count: int) -> None:
    logits, ids, gradients = make_case(vocab, dtype, count)
    whole = logits.to(torch.float64, copy=True).requires_grad_()
    expected = torch.log_softmax(whole[:, :vocab], -1).gather(1, ids)
    (expected * gradients).sum().backward()

    mine = own_columns(logits).clone().requires_grad_()
    found = vocab_parallel_logprobs(mine, ids, vocab, dist.group.WORLD)
    (found * gradients).sum().backward()
    assert found.shape == (POSITIONS, count) and found.dtype == torch.float32 and mine.grad.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-6
    torch.testing.assert_close(mine.grad.double(), own_columns(whole.grad), atol=tolerance, rtol=0)
    assert not mine.grad[:, max(0, vocab - dist.get_rank() * mine.shape[1]) :].any()

    everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found.detach())
    assert all(torch.equal(other, found) for other in everywhere)


def check_one_token_is_the_case_of_one_column() -> None:
    logits, ids, gradients = make_case(515, torch.float32, 5)
    many = vocab_parallel_logprobs(own_columns(logits), ids, 515, dist.group.WORLD)
    for column in range(ids.shape[1]):
        results = []
        for single in (True, False):
            mine = own_columns(logits).clone().requires_grad_()
            if single:
                found = vocab_parallel_logprob(mine, ids[:, column], 515, dist.group.WORLD)
            else:
                found = vocab_parallel_logprobs(mine, ids[:, column : column + 1], 515, dist.group.WORLD)[:, 0]
            (found * gradients[:, column]).sum().backward()
            results.append((found.detach(), mine.grad))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
        assert results[0][0].shape == (POSITIONS,) and torch.equal(results[0][0], many[:, column])


def check_ids_outside_the_vocabulary() -> None:
    """They must not pass for a token: -1, a padded column, and beyond all columns."""
    logits, ids, gradients = make_case(510, torch.float32, 5)
    ids[:, 1], ids[:, 2], ids[:, 3] = -1, 511, COLUMNS + 7
    outside = torch.tensor([False, True, True, True, False])
    mine, clean = (own_columns(logits).clone().requires_grad_() for _ in range(2))
    found = vocab_parallel_logprobs(mine, ids, 510, dist.group.WORLD)
    expected = vocab_parallel_logprobs(clean, ids[:, ~outside], 510, dist.group.WORLD)
    assert torch.equal(found[:, ~outside], expected)
    assert (found[:, outside] == -torch.inf).all()
    found.backward(gradients)
    expected.backward(gradients[:, ~outside])
    torch.testing.assert_close(mine.grad, clean.grad, atol=1e-6, rtol=0)
