"""Megatron checkpoint to Hugging Face folder: ``megatron-opd convert to-hf``.

python tools/convert_to_hf.py CKPT OUT [shard_gb=4 tensor_parallel=2 ...]
"""

from __future__ import annotations

import typer

from megatron_opd.cli import convert_to_hf

if __name__ == "__main__":
    typer.run(convert_to_hf)
