"""What a plan needs and a config does not say: each with a default, settable, and shown with the result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationError

from megatron_opd.config import Config
from megatron_opd.config.base import PositiveFloat, PositiveInt, Section
from megatron_opd.errors import ConfigError

Share = Annotated[float, Field(gt=0, le=1)]


class Assumptions(Section):
    """Set one with ``--assume key=value``."""

    prompt_tokens: PositiveFloat | None = None
    """Mean length of a prompt; null takes a quarter of data.max_prompt_tokens."""
    image_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Tokens of a prompt that stand for images, of a model with a vision tower."""
    response_tokens: PositiveFloat | None = None
    """Mean length of a response; null takes half of the longest."""
    longest_response: PositiveFloat | None = None
    """Length of the step's longest response; null takes rollout.max_new_tokens."""
    kept_share: Share = 1.0
    """Rollouts that balancing leaves: scored and trained on; 1 is the upper bound."""
    student_gpus: PositiveInt | None = None
    """GPUs whose layouts --layouts compares; null takes the ranks of the config."""
    rollout_gpus: PositiveInt | None = None
    """GPUs of all rollout engines; a multiple of rollout.server.tensor_parallel; null takes what the config starts."""
    teacher_gpus: PositiveInt | None = None
    """GPUs of each teacher; a multiple of its server's tensor_parallel; null takes what the config starts."""
    gpus_per_node: PositiveInt = 8
    """GPUs that reach each other by the fast link."""
    network_gb_s: PositiveFloat = 50.0
    """Network of one GPU, one direction; 50 is one 400 Gb/s card for each GPU."""
    transfer_utilisation: Share = 0.7
    """Share of links and network that collectives reach."""
    message_latency_us: Annotated[float, Field(ge=0)] = 20.0
    """Time of one message between ranks beside its bytes: starting it, and waiting for the slowest."""
    train_utilisation: Share = 0.4
    """Share of the peak in training; without bubbles and messages, which are added."""
    prefill_utilisation: Share = 0.5
    """Share of the peak in scoring and reading prompts."""
    decode_utilisation: Share = 0.6
    """Share of bandwidth and peak in sampling."""
    decode_overhead_ms: Annotated[float, Field(ge=0)] = 2.0
    """Time of a token beside memory and arithmetic: launching, scheduling, sampling."""
    memory_share: Share = 0.92
    """Memory that the student can use: the rest is CUDA's, NCCL's and lost between tensors."""
    expert_imbalance: Annotated[float, Field(ge=1)] = 1.2
    """Tokens of the busiest experts' rank, of the mean; there is no router loss that would even them out."""

    def resolved(self, config: Config) -> Assumptions:
        """With numbers in place of null; the three counts of GPUs stay."""
        longest = self.longest_response or float(config.rollout.max_new_tokens)
        mean = self.response_tokens or longest / 2
        if mean > longest:
            raise ConfigError(
                "The mean response is longer than the longest",
                where="--assume response_tokens, longest_response",
                got=f"{mean:g} and {longest:g}",
                fix="raise longest_response, or rollout.max_new_tokens",
            )
        prompt = self.prompt_tokens or config.data.max_prompt_tokens / 4
        return self.model_copy(update={"prompt_tokens": prompt, "response_tokens": mean, "longest_response": longest})


def parse_assumptions(items: list[str]) -> Assumptions:
    """``key=value`` items over the defaults. Raises ConfigError for an unknown key or a value out of range."""
    pairs = [item.partition("=") for item in items]
    try:
        return Assumptions.model_validate({key: value for key, _, value in pairs})
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        raise ConfigError(
            "An assumption cannot be used",
            where="--assume",
            got="; ".join(problems),
            expected=f"key=value with a key of: {', '.join(Assumptions.model_fields)}",
        ) from error
