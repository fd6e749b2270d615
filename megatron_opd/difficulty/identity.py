"""What the samples of a journal depend on: samples of two models, prompt files or settings are never mixed."""

from __future__ import annotations

from megatron_opd.config import Config


def settings_of(config: Config, domains: set[str]) -> dict[str, object]:
    """The options that decide how responses are drawn and judged, by their key in the config."""
    columns, options = config.data.columns, config.difficulty
    kinds = {f"verifiers.kinds.{domain}": config.verifiers.kinds[domain] for domain in sorted(domains)}
    return {
        "difficulty.samples": options.samples,
        "difficulty.temperature": options.temperature,
        "difficulty.top_p": options.top_p,
        "difficulty.top_k": options.top_k,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "engine.dtype": config.engine.dtype,
        **kinds,
        "verifiers.timeout_s": config.verifiers.timeout_s,
        "data.columns.prompt": columns.prompt,
        "data.columns.answer": columns.answer,
        "data.columns.domain": columns.domain,
        "data.columns.id": columns.id,
        "data.default_domain": config.data.default_domain,
    }
