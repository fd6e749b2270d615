"""What the trainer tells the coordinator: plain JSON, checked on arrival."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class TrainerInfo(BaseModel):
    """How the student was built."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor_parallel: int
    pipeline_parallel: int
    virtual_pipeline: int
    context_parallel: int
    data_parallel: int
    expert_parallel: int
    backend: str  # "torch" or "transformer_engine"
    backend_reason: str
    dtype: str
    device: str


class RefreshReport(BaseModel):
    """Weights of ``version`` are live in rollout engines, and how the step that made them went."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int  # number of optimizer steps behind the weights
    resend: int = 0  # how often these weights had been asked for again; 0: their first report
    refresh_s: float
    refresh_bytes: int
    probe_difference: float  # largest |log-prob difference| of a live engine and trainer on the probe sequence
    live: list[str] = []  # URLs of the engines that have these weights, proven: no other may be asked for responses
    out: dict[str, str] = {}  # URL to reason of the others; tried again at the next refresh
    info: TrainerInfo | None = None  # with version 0 only
    training: dict[str, float] = {}  # metrics of the optimizer step; empty with version 0
