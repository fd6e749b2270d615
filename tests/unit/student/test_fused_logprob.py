"""Log-probs, entropy and losses from hidden states against the plain formula and autograd in float64.

Every rank checks itself; a failed assertion of a spawned rank is raised here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_opd.student.fused_logprob import hidden_logprobs, hidden_loss

POSITIONS, COLUMNS, HIDDEN = 10, 516, 24


@dataclass(frozen=True)
class Case:
    """What is computed, and how it is cut; by default all of it in one block, with one padded column."""

    vocab: int = 515
    count: int = 5
    dtype: torch.dtype = torch.float32
    temperature: float = 1.0
    entropy: bool = False
    sequence: bool = False
    block: tuple[int, int] | None = None


CASES = [
    *(Case(count=count, entropy=entropy) for count in (0, 1, 5) for entropy in (False, True)),
    *(Case(block=block, entropy=block[0] == 3) for block in ((3, 1000), (1000, 100), (3, 100), (1, 7), (4, 129))),
    *(Case(sequence=True, block=block) for block in (None, (3, 100))),
    *(Case(sequence=sequence, entropy=True, temperature=0.7, block=(4, 100)) for sequence in (False, True)),
    # With two ranks: half of the second one's columns are padding, all of them are.
    *(Case(vocab=vocab, entropy=True, block=(3, 100)) for vocab in (400, 258, 100)),
    *(Case(dtype=torch.bfloat16, sequence=sequence, entropy=sequence, block=(3, 100)) for sequence in (False, True)),
]


@pytest.mark.parametrize("size", [1, 2])
def test_every_rank_agrees_with_plain_autograd(size: int, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    if size == 1:
        check_rank(0, 1, store)
    else:
        torch.multiprocessing.spawn(check_rank, args=(size, store), nprocs=size)


def check_rank(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        for case in CASES:
            check_case(case)
        for sequence in (False, True):
            check_positions_without_gradient_are_left_out(Case(sequence=sequence, block=(3, 100), entropy=sequence))
        for case in dict.fromkeys(replace(case, entropy=False, block=None) for case in CASES):
            for part in (3, 10, 1000):
                check_loss(case, part)
        check_a_loss_of_ids_outside_the_vocabulary()
        check_ids_outside_the_vocabulary()
        check_only_what_needs_a_gradient_gets_one()
        check_no_tensor_of_positions_by_columns()
        dist.barrier()  # a rank that leaves while another still talks to it takes it down
    finally:
        dist.destroy_process_group()


def mine(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of the first dimension."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def make_inputs(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Whole hidden states, weight and ids, equal on all ranks: some ids come twice, some beside a rank's last column.

    Logits are spread over about [-15, 15].
    """
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=generator).to(case.dtype)
    weight = torch.randn(COLUMNS, HIDDEN, generator=generator).to(case.dtype)
    ids = torch.randint(0, case.vocab, (POSITIONS, case.count), generator=generator)
    if case.count > 1:
        ids[:, 1] = ids[:, 0]
        ids[0, 2], ids[1, 2] = case.vocab - 1, min(case.vocab - 1, COLUMNS // 2)
    return hidden, weight, ids


def plain(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(hidden @ weight[: case.vocab].T / case.temperature, -1)
    return logprobs.gather(1, ids), -(logprobs.exp() * logprobs).sum(-1)


def fused(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, case: Case
) -> tuple[torch.Tensor, torch.Tensor | None]:
    return hidden_logprobs(
        hidden,
        weight,
        ids,
        case.vocab,
        dist.group.WORLD,
        temperature=case.temperature,
        block=case.block,
        entropy=case.entropy,
        sequence_parallel=case.sequence,
    )


def leaves(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What this rank holds: hidden states (all, or its part), its rows of the weight; and all ids."""
    hidden, weight, ids = make_inputs(case)
    own = mine(hidden) if case.sequence else hidden
    return own.clone().requires_grad_(), mine(weight).clone().requires_grad_(), ids


def check_case(case: Case) -> None:
    hidden, weight, ids = (tensor.double() if tensor.is_floating_point() else tensor for tensor in make_inputs(case))
    generator = torch.Generator().manual_seed(4)
    gradients = torch.randn(POSITIONS, case.count, generator=generator)
    entropy_gradients = torch.randn(POSITIONS, generator=generator) * case.entropy
    hidden.requires_grad_(), weight.requires_grad_()
    expected, expected_entropy = plain(hidden, weight, ids, case)
    ((expected * gradients).sum() + (expected_entropy * entropy_gradients).sum()).backward()

    own_hidden, own_weight, ids = leaves(case)
    found, entropy = fused(own_hidden, own_weight, ids, case)
    assert found.shape == (POSITIONS, case.count) and found.dtype == torch.float32
    assert (entropy is not None) == case.entropy
    loss = (found * gradients).sum()
    (loss if entropy is None else loss + (entropy * entropy_gradients).sum()).backward()

    half = case.dtype == torch.bfloat16
    near = {"atol": 0.1, "rtol": 0} if half else {"atol": 2e-5, "rtol": 1e-6}
    torch.testing.assert_close(found.double(), expected, **near)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), expected_entropy, **near)
    check_gradient(own_hidden, mine(hidden.grad) if case.sequence else hidden.grad, half)
    check_gradient(own_weight, mine(weight.grad), half)
    assert not own_weight.grad[max(0, case.vocab - dist.get_rank() * len(own_weight)) :].any()

    everywhere = [torch.empty_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, found.detach())
    assert all(torch.equal(other, found) for other in everywhere)


def check_gradient(leaf: torch.Tensor, expected: torch.Tensor, half: bool) -> None:
    assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape
    tolerance = {"atol": 0.1, "rtol": 0.05} if half else {"atol": 5e-5, "rtol": 1e-5}
    torch.testing.assert_close(leaf.grad.double(), expected, **tolerance)


def check_positions_without_gradient_are_left_out(case: Case) -> None:
    """Their hidden states are not read backward, not even non-finite ones; the rest is as if they were not there."""
    generator = torch.Generator().manual_seed(6)
    gradients = torch.randn(POSITIONS, case.count, generator=generator)
    used = torch.arange(POSITIONS) % 3 != 1
    gradients[~used] = 0.0
    hidden, weight, ids = leaves(case)
    fused(hidden, weight, ids, case)[0].backward(gradients)

    spoilt, other_weight, _ = leaves(case)
    spoilt.data[~(mine(used) if case.sequence else used)] = torch.nan
    fused(spoilt, other_weight, ids, case)[0].backward(gradients)
    assert torch.equal(spoilt.grad, hidden.grad) and torch.equal(other_weight.grad, weight.grad)
    assert not hidden.grad[~(mine(used) if case.sequence else used)].any()

    whole, all_weight, _ = (tensor.double() if tensor.is_floating_point() else tensor for tensor in make_inputs(case))
    whole.requires_grad_(), all_weight.requires_grad_()
    plain(whole, all_weight, ids, case)[0].backward(gradients.double())
    check_gradient(hidden, mine(whole.grad) if case.sequence else whole.grad, half=False)
    check_gradient(weight, mine(all_weight.grad), half=False)


def fused_loss(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, factors: torch.Tensor, case: Case, part: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``square_loss`` by parts, and the log-probs."""
    return hidden_loss(
        hidden,
        weight,
        ids,
        lambda logprobs, at: square_loss(logprobs, factors[at]),
        case.vocab,
        dist.group.WORLD,
        temperature=case.temperature,
        part=part,
        sequence_parallel=case.sequence,
    )


def square_loss(logprobs: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Its gradient depends on the log-probs; where the factor is 0 they are not read."""
    return (factors * torch.where(factors != 0, logprobs, 0.0).square()).sum()


def check_loss(case: Case, part: int) -> None:
    """In float32 half of the positions, and with parts of 3 all of one part, have no gradient."""
    hidden, weight, ids = (tensor.double() if tensor.is_floating_point() else tensor for tensor in make_inputs(case))
    factors = torch.randn(POSITIONS, case.count, generator=torch.Generator().manual_seed(9))
    if case.dtype == torch.float32:
        factors[3:6], factors[7:9] = 0.0, 0.0
    hidden.requires_grad_(), weight.requires_grad_()
    expected, _ = plain(hidden, weight, ids, case)
    expected_loss = square_loss(expected, factors)
    (expected_loss * 0.5).backward()

    own_hidden, own_weight, ids = leaves(case)
    loss, found = fused_loss(own_hidden, own_weight, ids, factors, case, part)
    assert found.dtype == torch.float32 and not found.requires_grad
    (loss * 0.5).backward()
    half = case.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, atol=0.1 if half else 2e-5, rtol=0 if half else 1e-6)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=0.02 if half else 1e-5)
    for leaf, whole in (
        (own_hidden, mine(hidden.grad) if case.sequence else hidden.grad),
        (own_weight, mine(weight.grad)),
    ):
        scale = float(whole.abs().max()) or 1.0
        leaf.grad /= scale
        check_gradient(leaf, whole / scale, half)
    assert not own_weight.grad[max(0, case.vocab - dist.get_rank() * len(own_weight)) :].any()


def check_a_loss_of_ids_outside_the_vocabulary() -> None:
    """The loss sees -inf there, and what it makes of it has no gradient."""
    case = Case(vocab=510)
    hidden, weight, ids = leaves(case)
    clean_hidden, clean_weight, _ = leaves(case)
    factors = torch.randn(POSITIONS, case.count, generator=torch.Generator().manual_seed(7))
    clean = ids.clone()
    ids[:, 1], ids[:, 2], ids[:, 3] = -1, 511, COLUMNS + 7
    outside = torch.tensor([False, True, True, True, False])
    loss, found = fused_loss(hidden, weight, ids, factors * ~outside, case, 4)
    expected, _ = fused_loss(clean_hidden, clean_weight, clean, factors * ~outside, case, 4)
    assert (found[:, outside] == -torch.inf).all() and torch.equal(loss, expected)
    fused_loss(hidden, weight, ids, factors, case, 4)[0].backward()
    expected.backward()
    torch.testing.assert_close(hidden.grad, clean_hidden.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.grad, clean_weight.grad, atol=1e-6, rtol=0)


def check_ids_outside_the_vocabulary() -> None:
    """They must not pass for a token: -1, a padded column, and beyond all columns."""
    case = Case(vocab=510, block=(3, 100))
    hidden, weight, ids = leaves(case)
    clean_hidden, clean_weight, _ = leaves(case)
    ids[:, 1], ids[:, 2], ids[:, 3] = -1, 511, COLUMNS + 7
    outside = torch.tensor([False, True, True, True, False])
    gradients = torch.randn(POSITIONS, case.count, generator=torch.Generator().manual_seed(7))
    found, _ = fused(hidden, weight, ids, case)
    expected, _ = fused(clean_hidden, clean_weight, ids[:, ~outside], case)
    assert torch.equal(found[:, ~outside], expected) and (found[:, outside] == -torch.inf).all()
    found.backward(gradients)
    expected.backward(gradients[:, ~outside])
    torch.testing.assert_close(hidden.grad, clean_hidden.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.grad, clean_weight.grad, atol=1e-6, rtol=0)


def check_only_what_needs_a_gradient_gets_one() -> None:
    case = Case(block=(3, 100))
    gradients = []
    for frozen in (None, 0, 1):
        inputs = leaves(case)
        if frozen is not None:
            inputs[frozen].requires_grad_(False)
        fused(*inputs, case)[0].sum().backward()
        gradients.append([tensor.grad for tensor in inputs[:2]])
    both, without_hidden, without_weight = gradients
    assert without_hidden[0] is None and torch.equal(without_hidden[1], both[1])
    assert without_weight[1] is None and torch.equal(without_weight[0], both[0])


class LargestTensor(TorchDispatchMode):
    """Remembers the most entries of a tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def check_no_tensor_of_positions_by_columns() -> None:
    case = Case(vocab=2000, count=2, block=(16, 100))
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(256, 4, generator=generator).requires_grad_()
    weight = mine(torch.randn(2000, 4, generator=generator)).clone().requires_grad_()
    ids = torch.randint(0, 2000, (256, 2), generator=generator)
    largest = {}
    for entropy in (False, True):
        with LargestTensor() as record:
            logprobs, entropies = fused(hidden, weight, ids, replace(case, entropy=entropy))
            (logprobs.sum() if entropies is None else logprobs.sum() + entropies.sum()).backward()
        largest[entropy] = record.entries
    assert largest[False] == largest[True] == weight.numel()  # its gradient; all logits have 64 times as many
    with LargestTensor() as record:
        hidden_loss(hidden, weight, ids, lambda logprobs, at: logprobs.sum(), 2000, dist.group.WORLD, part=4)[
            0
        ].backward()
    assert record.entries == weight.numel()
