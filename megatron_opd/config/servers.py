"""The sections of the config about servers: how they are started, found, asked and left out when they fail."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from megatron_opd.config.base import Port, PositiveFloat, PositiveInt, Section


class RoutingConfig(Section):
    """How requests are spread over replicas, and when one of these is left out (docs/teachers.md)."""

    failures: PositiveInt = 3
    """Failures in a row after which a replica gets no more requests until it answers again."""
    first_pause_s: PositiveFloat = 1.0
    """Seconds until a replica that was left out is probed; doubled after each probe that fails."""
    longest_pause_s: PositiveFloat = 10.0
    """Most seconds between two probes."""
    wait_s: PositiveFloat = 300.0
    """Longest wait of a request while every replica is out; then it fails with an error that names them."""


class EngineConfig(Section):
    """How servers that this run starts are started, and how any server is asked."""

    python: Path = Path(".venv-engine/bin/python")
    """Python of SGLang's own environment."""
    vllm_python: Path = Path(".venv-vllm/bin/python")
    """Python of vLLM's own environment; needed only where a server's engine is vllm."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where servers run; auto takes a GPU when there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the served models."""
    max_total_tokens: PositiveInt | None = None
    """Size of SGLang's key-value cache in tokens; null lets it choose."""
    memory_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.75
    """Share of the device's memory for weights and key-value cache."""
    start_timeout_s: PositiveFloat = 600.0
    """Longest wait for a server to become ready."""
    request_timeout_s: PositiveFloat = 300.0
    """Longest wait for one answer, whatever its length; the next two come on top."""
    prompt_token_timeout_s: Annotated[float, Field(ge=0)] = 0.01
    """Seconds that each token of a request adds to the longest wait for its answer."""
    new_token_timeout_s: Annotated[float, Field(ge=0)] = 0.1
    """Seconds that each token which may be sampled adds to the longest wait for the answer."""
    max_concurrency: PositiveInt = 256
    """Most requests under way at one server."""
    restarts: Annotated[int, Field(ge=0)] = 3
    """How often each server that this run started is started again when it dies; then the run stops."""
    hang_s: PositiveFloat = 120.0
    """Seconds without any answer after which a server that this run started is killed, and started again."""
    deterministic: bool = False
    """Seed each response and make it independent of its batch: a run repeats to the bit. Slower; SGLang only."""
    routing: RoutingConfig = RoutingConfig()


class ServerConfig(Section):
    """The servers of one model, all alike: started by the run on this machine, or attached to by URL."""

    engine: Literal["sglang", "vllm"] = "sglang"
    """What serves the model; vllm is for teachers and the reference."""
    urls: list[str] = []
    """Attach to these running servers, for example ["http://127.0.0.1:30000"]; empty starts some."""
    replicas: PositiveInt = 1
    """Servers that are started; requests are spread over them."""
    port: Port = 0
    """Port of the first started server, the others take the next ones; 0 takes free ones."""
    tensor_parallel: PositiveInt = 1
    """Ranks of each started server."""
    gpus: str | None = None
    """GPUs of all started servers, dealt out evenly in order, for example "0,1,2,3"; null: CUDA_VISIBLE_DEVICES."""
    model_path: str | None = None
    """What attached servers call the model, where that is not the name of the model's folder here."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the bearer token of attached servers; null sends none."""

    @model_validator(mode="before")
    @classmethod
    def _explain_url(cls, values: object) -> object:
        if isinstance(values, dict) and "url" in values:
            raise ValueError(f"url has become urls, a list: urls=[{values['url']}]")
        if isinstance(values, dict) and isinstance(values.get("urls"), str):
            raise ValueError(f"urls is a list: urls=[{values['urls']}]")
        return values

    @model_validator(mode="after")
    def _fits(self) -> ServerConfig:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        for url in self.urls:
            address = urlsplit(url)
            if address.scheme not in ("http", "https") or not address.hostname or address.query or address.fragment:
                yield f"urls: {url!r} is not like http://127.0.0.1:30000"
            elif address.username or address.password:
                yield "urls: a URL is shown in logs, so it must hold no password; use api_key_env"
        if len(set(self.urls)) < len(self.urls):
            yield "urls names a server twice"
        started = {"replicas": self.replicas != 1, "port": self.port != 0, "gpus": self.gpus is not None}
        attached = {"model_path": self.model_path is not None, "api_key_env": self.api_key_env is not None}
        for name in [name for name, given in started.items() if given and self.urls]:
            yield f"{name} is of servers that the run starts, urls of servers that run already: give one of them"
        for name in [name for name, given in attached.items() if given and not self.urls]:
            yield f"{name} is of servers that run already: it needs urls"
        if self.gpus is not None and len(self.gpus.split(",")) % self.replicas:
            yield f"gpus {self.gpus!r} cannot be dealt out evenly to {self.replicas} replicas"

    @property
    def count(self) -> int:
        """Servers, started or attached."""
        return len(self.urls) or self.replicas

    def gpus_of(self, replica: int) -> str | None:
        """CUDA_VISIBLE_DEVICES of one started server; None leaves the variable as it is."""
        if self.gpus is None:
            return None
        names = self.gpus.split(",")
        share = len(names) // self.replicas
        return ",".join(names[replica * share : (replica + 1) * share])
