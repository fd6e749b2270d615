"""What tells two models or two files apart by their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
