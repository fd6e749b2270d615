"""Starts a real SGLang server. Runs by path in the engine's own environment, so it imports nothing of this package.

    ENGINE_PYTHON -P sglang_launcher.py --model-path DIR --port N [any SGLang argument ...]

With ``--device cpu`` it stands in for three things that SGLang 0.5.21 expects and a CPU-only environment lacks: the
compiled ``sgl_kernel`` package (only its entry points are named; the pure torch paths do the work), Triton, and the
operator library of torchvision, whose wheel is a CUDA build. With ``--enable-deterministic-inference`` as well it also
stands in for SGLang's kernels of that mode, which are written in Triton: matrix products whose rows do not depend on
the other rows of the batch, and the hash behind seeded sampling. For a multimodal model it also answers for operators
that modules name while they are imported. On a GPU nothing is touched.
"""

import ctypes
import importlib.machinery
import importlib.util
import json
import logging
import os
import platform
import signal
import sys
import types

PR_SET_PDEATHSIG = 1
TILE = 32  # rows of one matrix product in the deterministic mode
LOW_32 = 0xFFFFFFFF


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the run that started it is gone; its own children then do the same.

    SIGKILL, because a server holds nothing worth saving and takes up to 14 s to leave politely.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def declare_torchvision_operators() -> object | None:
    """Define the operators that ``import torchvision`` registers a fake kernel for. Keep the returned library alive.

    Only where torchvision's own library cannot be loaded: its wheel is a CUDA build, which beside a CPU build of torch
    lacks CUDA's libraries, and beside a CUDA build does not.
    """
    import torch

    folder = os.path.dirname(importlib.util.find_spec("torchvision").origin)
    try:
        torch.ops.load_library(os.path.join(folder, "_C.so"))
        return None
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def missing(name: str):
    """What stands for a function of ``sgl_kernel``: it may be imported, and raises when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def raise_by_name(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name} does not exist in a CPU-only environment")

    return raise_by_name


def stand_in_for_sgl_kernel() -> None:
    """Register a ``sgl_kernel`` whose one working function fills the request-to-token table; the rest raise by name."""
    import torch

    def assign_req_to_token_pool_cpu(request_indices, table, starts, ends, locations, *_):
        taken = 0
        for request, start, end in zip(request_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
            table[request, start:end] = locations[taken : taken + end - start].to(torch.int32)
            taken += end - start

    module = types.ModuleType("sgl_kernel")
    module.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None, is_package=True)
    module.__path__ = []
    module.__version__ = "0"
    module.__getattr__ = missing
    module.assign_req_to_token_pool_cpu = assign_req_to_token_pool_cpu
    sys.modules["sgl_kernel"] = module


def stand_in_for_triton() -> None:
    """Use the stand-in that SGLang ships for Apple machines: it makes kernel definitions importable."""
    import torch

    folder = os.path.dirname(importlib.util.find_spec("sglang").origin)
    spec = importlib.util.spec_from_file_location("_platform_stubs", os.path.join(folder, "_platform_stubs.py"))
    stubs = importlib.util.module_from_spec(spec)
    sys.modules["_platform_stubs"] = stubs
    spec.loader.exec_module(stubs)
    true_values = sys.platform, platform.machine, torch.backends.mps.is_available
    sys.platform, platform.machine, torch.backends.mps.is_available = "darwin", lambda: "arm64", lambda: True
    try:
        stubs.install_platform_stubs()
    finally:
        sys.platform, platform.machine, torch.backends.mps.is_available = true_values


def argument(name: str) -> str | None:
    """The value after ``name`` on the command line; None without it."""
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv[:-1] else None


def has_vision(model: str | None) -> bool:
    """Whether the checkpoint in a folder reads images."""
    try:
        with open(os.path.join(model or "", "config.json"), encoding="utf-8") as file:
            return isinstance(json.load(file).get("vision_config"), dict)
    except OSError:
        return False


def name_kernel_operators() -> None:
    """Let a module read any ``torch.ops.sgl_kernel.<name>`` while it is imported; what it gets raises when called.

    Modules of multimodal models do, and SGLang silently leaves out a model or an image processor whose module cannot be
    imported. Functions still see what there is: SGLang asks for some names to choose its kernels.
    """
    import torch

    class Named(type(torch.ops.sgl_kernel)):
        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                if sys._getframe(1).f_code.co_name != "<module>":
                    raise
            return missing(name)

    torch.ops.sgl_kernel = Named("sgl_kernel")


def prepare_cpu() -> object | None:
    """Everything that ``--device cpu`` needs before SGLang is imported."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    sees = has_vision(argument("--model-path"))
    if sees:  # parts of the vision tower are compiled otherwise: seconds at the first image, and a C++ compiler
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    library = declare_torchvision_operators()
    stand_in_for_sgl_kernel()
    if sees:
        name_kernel_operators()
    if importlib.util.find_spec("triton") is None:
        stand_in_for_triton()
    return library


def check_image_processor() -> None:
    """Import the image processor of the models that are served here: SGLang itself leaves out one that it cannot."""
    importlib.import_module("sglang.srt.multimodal.processors.qwen_vl")


def murmur_hash32(seeds, positions, columns):
    """SGLang's hash of 64-bit seed, position and column, [n], [n], [m] -> [n, m] uint32: four blocks of 32 bits."""
    import torch

    def rotate(value, bits):
        return ((value << bits) | (value >> (32 - bits))) & LOW_32

    seeds, positions, columns = (tensor.to(torch.int64) for tensor in (seeds, positions, columns))
    hashed = torch.zeros((), dtype=torch.int64)
    for block in (seeds[:, None] & LOW_32, (seeds[:, None] >> 32) & LOW_32, positions[:, None], columns[None, :]):
        mixed = rotate(times(block & LOW_32, 0xCC9E2D51), 15)
        hashed = rotate(hashed ^ times(mixed, 0x1B873593), 13)
        hashed = (hashed * 5 + 0xE6546B64) & LOW_32
    hashed = hashed ^ 16
    hashed = times(hashed ^ (hashed >> 16), 0x85EBCA6B)
    hashed = times(hashed ^ (hashed >> 13), 0xC2B2AE35)
    return (hashed ^ (hashed >> 16)).to(torch.uint32)


def times(value, factor: int):
    """Product modulo 2**32 of numbers below 2**32, in int64 without overflow."""
    return ((value >> 16) * factor % (1 << 16) * (1 << 16) + (value & 0xFFFF) * factor) & LOW_32


def multiply_in_tiles() -> None:
    """Make each row of a matrix product independent of how many others are in the batch.

    The library picks its kernel by the number of rows, and kernels round differently. So every product gets the same
    number of rows, the last one filled up with zeros. Cost: up to 32 times the arithmetic of a single row.
    """
    import torch
    from torch.nn import functional

    linear, matmul = functional.linear, torch.matmul

    def in_tiles(product, rows):
        flat = rows.reshape(-1, rows.shape[-1])
        padded = functional.pad(flat, (0, 0, 0, -len(flat) % TILE))
        results = torch.cat([product(tile) for tile in padded.split(TILE)])[: len(flat)]
        return results.reshape(*rows.shape[:-1], results.shape[-1])

    def tiled_linear(rows, weight, bias=None):
        return in_tiles(lambda tile: linear(tile, weight, bias), rows) if len(rows) else linear(rows, weight, bias)

    def tiled_matmul(rows, other, *, out=None):
        if out is not None or other.dim() != 2 or rows.dim() < 2 or not len(rows):
            return matmul(rows, other, out=out) if out is not None else matmul(rows, other)
        return in_tiles(lambda tile: matmul(tile, other), rows)

    functional.linear, torch.matmul = tiled_linear, tiled_matmul


def prepare_deterministic_cpu() -> object:
    """What ``--enable-deterministic-inference`` needs on a CPU. Keep the returned library alive."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # the sampler is compiled otherwise, which needs a C++ compiler
    import torch

    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
    library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")
    multiply_in_tiles()
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("torch_native")  # attends to each sequence on its own
    batch_invariant_ops.enable_batch_invariant_mode = lambda *_: None
    return library


def keep_out_of_logs(key: str) -> None:
    """SGLang logs all its arguments when it starts: put stars in the place of its bearer token."""
    make = logging.getLogRecordFactory()

    def without_key(*args, **kwargs):
        record = make(*args, **kwargs)
        record.msg, record.args = record.getMessage().replace(key, "***"), ()
        return record

    logging.setLogRecordFactory(without_key)


# SGLang spawns its scheduler and detokenizer, which import this file again before they import SGLang:
# the stand-ins must be made in them too, hence not under the guard below.
_on_cpu = argument("--device") == "cpu"
_key = os.environ.get("OPD_ENGINE_KEY")  # not an argument: everyone on the machine can read those
if _key:
    keep_out_of_logs(_key)
_operators = prepare_cpu() if _on_cpu else None
_deterministic = prepare_deterministic_cpu() if _on_cpu and "--enable-deterministic-inference" in sys.argv else None

if __name__ == "__main__":
    die_with_parent()
    if _on_cpu and has_vision(argument("--model-path")):
        check_image_processor()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:] + (["--api-key", _key] if _key else [])))
