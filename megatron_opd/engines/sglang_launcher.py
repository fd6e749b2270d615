"""Starts a real SGLang server. Runs by path in the engine's own environment, so it imports nothing of this package.

    ENGINE_PYTHON -P sglang_launcher.py --model-path DIR --port N [any SGLang argument ...]

With ``--device cpu`` it stands in for three things that SGLang 0.5.21 expects and a CPU-only environment lacks: the
compiled ``sgl_kernel`` package (only its entry points are named; the pure torch paths do the work), Triton, and the
operator library of torchvision, whose wheel is a CUDA build. On a GPU nothing is touched.
"""

import ctypes
import importlib.machinery
import importlib.util
import os
import platform
import signal
import sys
import types

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the run that started it is gone; its own children then do the same.

    SIGKILL, because a server holds nothing worth saving and takes up to 14 s to leave politely.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def declare_torchvision_operators() -> object:
    """Define the operators that ``import torchvision`` registers a fake kernel for. Keep the returned library alive."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def stand_in_for_sgl_kernel() -> None:
    """Register a ``sgl_kernel`` whose one working function fills the request-to-token table; the rest raise by name."""
    import torch

    def assign_req_to_token_pool_cpu(request_indices, table, starts, ends, locations, *_):
        taken = 0
        for request, start, end in zip(request_indices.tolist(), starts.tolist(), ends.tolist(), strict=True):
            table[request, start:end] = locations[taken : taken + end - start].to(torch.int32)
            taken += end - start

    def missing(name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def raise_by_name(*args, **kwargs):
            raise NotImplementedError(f"sgl_kernel.{name} does not exist in a CPU-only environment")

        return raise_by_name

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


def prepare_cpu() -> object:
    """Everything that ``--device cpu`` needs before SGLang is imported."""
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    library = declare_torchvision_operators()
    stand_in_for_sgl_kernel()
    if importlib.util.find_spec("triton") is None:
        stand_in_for_triton()
    return library


# SGLang spawns its scheduler and detokenizer, which import this file again before they import SGLang:
# the stand-ins must be made in them too, hence not under the guard below.
_on_cpu = "--device" in sys.argv and sys.argv[sys.argv.index("--device") + 1] == "cpu"
_operators = prepare_cpu() if _on_cpu else None

if __name__ == "__main__":
    die_with_parent()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args

    run_server(prepare_server_args(sys.argv[1:]))
