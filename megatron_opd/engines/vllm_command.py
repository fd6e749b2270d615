"""Command lines that start a vLLM server for scoring, on a CPU and on a GPU."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.engines.command import gpu_variable, resolve_device
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.env import engine_environment

ON_CPU = {  # 1 GiB of cache, and no pinning: a CPU machine is shared with the trainer
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def check_vllm_python(engine: EngineConfig) -> None:
    """Raises ConfigError when vLLM's environment is not there."""
    if not engine.vllm_python.is_file():
        raise ConfigError(
            "The engine's Python does not exist",
            where="engine.vllm_python",
            got=engine.vllm_python.absolute(),
            fix="make the environment with `make .venv-vllm`, or name the Python of an environment that has vLLM",
        )


def vllm_argv(engine: EngineConfig, server: ServerConfig, model: Path, url: str, seed: int, top_k: int) -> list[str]:
    """Command line of a server of ``model`` at ``url`` that grants requests for ``top_k`` most likely tokens."""
    address = urlsplit(url)
    argv = [
        *(str(engine.vllm_python.absolute()), "-P", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model)),
        *("--host", address.hostname, "--port", str(address.port)),
        *("--dtype", engine.dtype),
        *("--tensor-parallel-size", str(server.tensor_parallel)),
        *("--seed", str(seed)),
        *("--max-logprobs", str(max(top_k, 1))),
        "--enable-prompt-tokens-details",  # says how much came from the cache
        "--disable-uvicorn-access-log",
    ]
    if resolve_device(engine.device) == "cpu":
        return [*argv, "--enforce-eager"]
    return [*argv, "--gpu-memory-utilization", str(engine.memory_fraction)]


def vllm_environment(engine: EngineConfig, server: ServerConfig, replica: int) -> dict[str, str]:
    """Environment of that server, one of ``server.replicas``."""
    on_cpu = ON_CPU if resolve_device(engine.device) == "cpu" else {}
    return engine_environment(**on_cpu, **gpu_variable(server, replica))
