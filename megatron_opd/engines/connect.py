"""From the config to clients and pools of the servers of one model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.engines.client import EngineClient
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.vllm import VLLMClient
from megatron_opd.runtime.env import engine_key, secret
from megatron_opd.runtime.replicas import ReplicaPool

CLIENTS = {"sglang": SGLangClient, "vllm": VLLMClient}


def new_client(engine: EngineConfig, server: ServerConfig, url: str, images: ImageFolder | None = None) -> EngineClient:
    """A client of one server; ``images`` of prompts. Raises ConfigError when the environment lacks its key."""
    return CLIENTS[server.engine](
        url,
        timeout_s=engine.request_timeout_s,
        prompt_token_s=engine.prompt_token_timeout_s,
        new_token_s=engine.new_token_timeout_s,
        max_concurrency=engine.max_concurrency,
        api_key=key_of(server),
        images=images,
    )


def key_of(server: ServerConfig) -> str | None:
    """Bearer token of these servers, or None. Raises ConfigError when the environment lacks it."""
    if server.api_key_env:
        return secret(server.api_key_env)
    return None if server.urls else engine_key()


def new_pool(
    stack: AsyncExitStack,
    role: str,
    engine: EngineConfig,
    server: ServerConfig,
    urls: Sequence[str],
    probe: Callable[[EngineClient], Awaitable[None]] = EngineClient.check_ready,
    images: ImageFolder | None = None,
) -> ReplicaPool[EngineClient]:
    """A pool of the servers at ``urls``, which ``stack`` closes. ``probe`` decides when a failed one may come back.

    images: of prompts; None: no prompt has any.
    """
    clients = [new_client(engine, server, url, images) for url in urls]
    for client in clients:
        stack.push_async_callback(client.close)
    pool = ReplicaPool(role, clients, probe, engine.routing)
    stack.push_async_callback(pool.close)
    return pool
