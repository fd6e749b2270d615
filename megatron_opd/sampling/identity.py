"""What the samples of a journal depend on: those of two models, files or settings are never mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from megatron_opd.config import EngineConfig, VerifierConfig
from megatron_opd.verifiers.sandbox import choose

NO_VERDICT = {  # options of verifiers that change none; any other, a new one too, is part of the identity
    "kinds": True,  # the caller names those that are used
    "workers": True,
    "judge": {"token_env"},
}

SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")  # config, tokenizer and chat template
BLOCKS, BLOCK_BYTES = 16, 1 << 16  # of each file of weights: training changes all of it, so a part is enough


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


def judging_of(verifiers: VerifierConfig, kinds: Iterable[str]) -> dict[str, object]:
    """The options that decide a verdict, by their key in the config. ``kinds``: the verifiers that are used.

    Code is fenced in as the machine allows, and what a fence refuses fails: so the level in force counts too. Raises
    ProcessError when the wanted one does not work here.
    """
    plain = verifiers.model_dump(mode="json", exclude=NO_VERDICT)
    if "code" in kinds:
        plain["sandbox in force"] = choose(verifiers.sandbox)
    return {f"verifiers.{key}": value for key, value in plain.items()}


def drawing_of(engine: EngineConfig, seed: int) -> dict[str, object]:
    """The options of an engine that decide what it samples. Servers heed a seed only in the deterministic mode."""
    return {
        "engine.dtype": engine.dtype,
        "engine.deterministic": engine.deterministic,
        "seed": seed if engine.deterministic else None,
    }
