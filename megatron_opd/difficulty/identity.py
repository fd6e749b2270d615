"""The settings that pass rates depend on."""

from __future__ import annotations

from megatron_opd.config import Config
from megatron_opd.sampling.identity import drawing_of, judging_of


def settings_of(config: Config, domains: set[str]) -> dict[str, object]:
    """The options that decide how responses are drawn and judged, by their key in the config."""
    options = config.difficulty
    kinds = {f"verifiers.kinds.{domain}": config.verifiers.kinds[domain] for domain in sorted(domains)}
    columns = config.data.columns.model_dump(exclude={"repeats"})  # which belongs to training
    return {
        "difficulty.samples": options.samples,
        "difficulty.temperature": options.temperature,
        "difficulty.top_p": options.top_p,
        "difficulty.top_k": options.top_k,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        **drawing_of(config.engine, config.seed),
        **kinds,
        **judging_of(config.verifiers, kinds.values()),
        **{f"data.columns.{name}": column for name, column in columns.items()},
        "data.default_domain": config.data.default_domain,
    }
