"""What the samples of a journal depend on: samples of two models, prompt files or settings are never mixed."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_opd.config import Config

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer and chat template
BLOCKS, BLOCK_BYTES = 16, 1 << 16  # of each file of weights: training changes all of it, so a part is enough


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


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 of a checkpoint folder: its small files, and blocks of its weights. Cost: reads some megabytes."""
    digest = hashlib.sha256()
    small = sorted(path for pattern in SMALL_FILES for path in folder.glob(pattern))
    for path in small:
        digest.update(f"{path.name}:{file_digest(path)}\n".encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            for block in range(BLOCKS):
                file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
