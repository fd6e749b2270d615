"""Hugging Face folder to Megatron checkpoint: ``megatron-opd convert to-megatron``.

python tools/convert_to_megatron.py HF_DIR OUT [tensor_parallel=2 pipeline_parallel=2 ...]
"""

from __future__ import annotations

import typer

from megatron_opd.cli import convert_to_megatron

if __name__ == "__main__":
    typer.run(convert_to_megatron)
