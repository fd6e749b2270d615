"""Argument lists that start an SGLang server: one place for what differs between a CPU and a GPU."""

from __future__ import annotations

import shutil
from pathlib import Path
from urllib.parse import urlsplit

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.env import engine_environment
from megatron_opd.runtime.vision import has_vision

LAUNCHER = Path(__file__).with_name("sglang_launcher.py")
IMAGE_CACHE_MB = 256  # of decoded images in a server
CPU_CACHE_TOKENS = 65536  # a CPU machine's memory is shared with the trainer, so the cache gets a fixed size


def gpu_present() -> bool:
    """Whether this machine has an NVIDIA GPU and its driver. Needs no torch."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def resolve_device(device: str) -> str:
    """ "auto" becomes "cuda" where there is a GPU, "cpu" elsewhere."""
    return ("cuda" if gpu_present() else "cpu") if device == "auto" else device


def check_engine_python(engine: EngineConfig) -> None:
    """Raises ConfigError when the engine's environment is not there."""
    if not engine.python.is_file():
        raise ConfigError(
            "The engine's Python does not exist",
            where="engine.python",
            got=engine.python.absolute(),
            fix="make the environment with `make install`, or name the Python of an environment that has SGLang",
        )


def server_argv(
    engine: EngineConfig, server: ServerConfig, model: Path, url: str, seed: int, *, frozen: bool = False
) -> list[str]:
    """Command line of a server of ``model`` at ``url``. Token ids only: the server needs no tokenizer.

    ``frozen``: its weights are never refreshed, so their version is the model's name, which every answer then bears.
    """
    address = urlsplit(url)
    argv = [
        *(str(engine.python.absolute()), "-P", str(LAUNCHER)),  # -P: modules beside the launcher must not shadow SGLang
        *("--model-path", str(model)),
        *("--host", address.hostname, "--port", str(address.port)),
        *("--dtype", engine.dtype),
        *("--tp-size", str(server.tensor_parallel)),
        *("--random-seed", str(seed)),
        "--skip-tokenizer-init",
        "--enable-metrics",
        *("--grammar-backend", "none"),
    ]
    argv += ["--weight-version", str(model)] if frozen else []
    argv += ["--enable-deterministic-inference"] if engine.deterministic else []
    # Each image of a group is decoded once. And SGLang keeps a request's tokens on the way that leads to this cache; on
    # the other, Qwen2.5-VL's, it makes text of them and looks for images in it: "<image>" in a response would be one.
    argv += ["--mm-preprocess-cache-size-mb", str(IMAGE_CACHE_MB)] if has_vision(model) else []
    if resolve_device(engine.device) == "cpu":
        # In one piece: where a prompt is cut depends on the others of the batch, and cutting changes the rounding.
        argv += ["--chunked-prefill-size", "-1"] if engine.deterministic else []
        argv += [
            *("--device", "cpu", "--attention-backend", "torch_native"),
            # Nothing is taken by this share, since the next line fixes the cache's size. But SGLang does not start when
            # other programs take more than it while the weights are loaded.
            *("--mem-fraction-static", "0.7"),
            *("--max-total-tokens", str(engine.max_total_tokens or CPU_CACHE_TOKENS)),
            *("--disable-overlap-schedule", "--disable-cuda-graph", "--sleep-on-idle"),
        ]
        argv += ["--mm-attention-backend", "sdpa"] if has_vision(model) else []
    else:
        argv += ["--mem-fraction-static", str(engine.memory_fraction)]
        argv += ["--max-total-tokens", str(engine.max_total_tokens)] if engine.max_total_tokens else []
    return argv


def server_environment(
    engine: EngineConfig, server: ServerConfig, replica: int = 0, *, frozen: bool = False
) -> dict[str, str]:
    """Environment of that server, one of ``server.replicas``; ``frozen`` as above."""
    values = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}
    if not frozen:  # SGLang would go on with what the vision tower made of an image before its weights were refreshed
        values |= {"SGLANG_VLM_CACHE_SIZE_MB": "0"}
    if resolve_device(engine.device) == "cpu":
        values |= {"OMP_NUM_THREADS": "1"}
    return engine_environment(**values, **gpu_variable(server, replica))


def gpu_variable(server: ServerConfig, replica: int) -> dict[str, str]:
    """What shows a replica its own GPUs; nothing when the config leaves that to the environment."""
    gpus = server.gpus_of(replica)
    return {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
