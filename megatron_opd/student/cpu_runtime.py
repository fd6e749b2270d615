"""Stand-ins that let unmodified Megatron-Core run on a CPU with gloo.

Megatron-Core names the device ``cuda`` throughout. This file is the only place that answers those calls on a machine
without a GPU: tensors asked for on ``cuda`` are made on the CPU, waiting for the device does nothing, and the CUDA
random state is the CPU's. Nothing happens at import; ``install`` does the work.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed_in = threading.local()


def install() -> None:
    """Replace the CUDA entry points that Megatron-Core uses. Calling it again does nothing.

    PyTorch keeps function modes per thread: call it in every thread that runs the student.
    """
    if getattr(_installed_in, "mode", None) is not None:
        return
    _replace_cuda_functions()
    _installed_in.mode = _CudaMeansCpu()
    _installed_in.mode.__enter__()  # stays for the life of the thread


class _CudaMeansCpu(TorchFunctionMode):
    """Sends every tensor that is asked for on a GPU to the CPU."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:  # counters of the schedules and optimizers: torch.zeros(1, device="cuda")
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.cuda:  # checkpoints move what they load
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:  # tensor.to("cuda")
            args = (args[0], _on_cpu(args[1]), *args[2:])
        if func is torch.Tensor.type and len(args) == 1:
            # The optimizers tell precisions apart by the names of CUDA tensor types.
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def _on_cpu(device: Any) -> Any:
    is_cuda = (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )
    return _CPU if is_cuda else device


class _CpuGenerators:
    """``torch.cuda.default_generators``, which the dropout and recompute trackers index by device."""

    def __getitem__(self, device: object) -> torch.Generator:
        return torch.default_generator


def _replace_cuda_functions() -> None:
    cuda = torch.cuda
    # Weights, buffers and received tensors are allocated on "the current device".
    cuda.current_device = lambda: _CPU
    # Pipeline exchanges, timers and checkpoints wait for the device; CPU work is already done when a call returns.
    cuda.synchronize = lambda device=None: None
    _replace_streams()
    _replace_random_state()
    _replace_expert_functions()
    _replace_uneven_collectives()


class _Done:
    """A stream, or an event on it, of a device whose work is done when the call returns."""

    def wait_stream(self, stream: object) -> None:
        """Nothing is under way."""

    def synchronize(self) -> None:
        """Nothing is under way."""

    def record_event(self) -> _Done:
        return self


def _replace_streams() -> None:
    """The dispatcher of experts copies its counts to the host on a stream of its own."""
    stream = _Done()
    torch.cuda.Stream = lambda *args, **options: stream
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()


def _replace_expert_functions() -> None:
    """Parts of the mixture of experts that work only with Transformer Engine, or only with counts from a GPU."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # the router compares it with None, but imports it from Transformer Engine

    def counts_on_host(counts: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return counts.numpy() if as_numpy and torch.is_tensor(counts) else counts

    # It leaves what is on the CPU already a tensor, and collectives take counts only as numbers.
    token_dispatcher.maybe_move_tensor_to_cpu = counts_on_host


def _replace_uneven_collectives() -> None:
    """Tensor-parallel ranks of an expert exchange different numbers of tokens, for which gloo has no collective."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        part: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, *rest: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_gather(part, group, sizes, *rest)
        longest = torch.cat([part, part.new_zeros(max(sizes) - len(part), *part.shape[1:])])
        parts = [torch.empty_like(longest) for _ in sizes]
        dist.all_gather(parts, longest, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def reduce_scatter(
        whole: torch.Tensor, group: dist.ProcessGroup, sizes: list[int] | None = None, *rest: Any
    ) -> torch.Tensor:
        if sizes is None or group.size() == 1:
            return even_scatter(whole, group, sizes, *rest)
        total = whole.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total.split(sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter


def _replace_random_state() -> None:
    """Tensor-parallel random states (initialisation, dropout, recomputation) come from the CPU generator."""
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.default_generators = _CpuGenerators()
    # CUDA calls made before CUDA starts are queued; it never starts here, so they would wait, and pile up, for ever.
    megatron_random._lazy_call = lambda call, **options: call()
