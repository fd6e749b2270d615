"""Memory and time of conversions: from a Hugging Face folder to a Megatron checkpoint and back, under several layouts.

    python tools/bench_convert.py [--layers 8] [--hidden 1024] [--units 4096] [--vocab 16384] [--dtype float32]

Makes a random Qwen3 model (by default 0.57 GB, tied embeddings), converts it there under each layout and back in one
process, and compares every weight file with the original, byte by byte. Memory is resident memory of each process, as
Linux counts it, mapped files included: at most, less what the process held with torch and Megatron loaded and no model.
A share is what a rank holds of the weights, a layout's tied embeddings counted on both ends.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen3Config

from megatron_opd.convert.command import to_hf, to_megatron
from megatron_opd.convert.console import ConversionConsole
from megatron_opd.convert.ranks import Converted
from megatron_opd.student.hf_weights import expected_shapes
from megatron_opd.student.shards import ShardedFiles
from megatron_opd.student.sizes import read_hf_config

LAYOUTS = {
    "1 process": {},
    "TP 2": {"tensor_parallel": 2},
    "PP 2": {"pipeline_parallel": 2},
    "TP 2 x PP 2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
MIB = 2**20


def make_model(folder: Path, options: argparse.Namespace) -> list[int]:
    """A random model in ``folder``; bytes of its tensors."""
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.units,
        num_hidden_layers=options.layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        dtype=options.dtype,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    dtype = getattr(torch, options.dtype)
    shapes = expected_shapes(folder, read_hf_config(folder))
    files = ShardedFiles(folder, shapes, dtype, 4 * 2**30)
    for name, shape in shapes.items():
        files.write(name, torch.randn(shape, dtype=dtype))
    files.finish()
    return [dtype.itemsize * math.prod(shape) for shape in shapes.values()]


def row(direction: str, layout: str, converted: Converted, total: int) -> str:
    """One line of the table."""
    extra = [rank.peak - rank.before for rank in converted.ranks]
    cells = [
        direction,
        layout,
        f"{max(rank.before for rank in converted.ranks) / MIB:.0f}",
        ", ".join(f"{size / MIB:.0f}" for size in extra),
        f"{max(extra) / total:.0%}",
        f"{sum(extra) / total:.0%}",
        f"{converted.seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder, ConversionConsole() as console:
        work = Path(folder)
        (work / "model").mkdir()
        sizes = make_model(work / "model", options)
        total = sum(sizes)
        began = time.monotonic()
        for number, (name, layout) in enumerate(LAYOUTS.items()):
            given = [f"{key}={value}" for key, value in layout.items()]
            there, back = work / f"megatron-{number}", work / f"hf-{number}"
            rows.append(row("to Megatron", name, to_megatron(work / "model", there, given, console), total))
            rows.append(row("to HF", name, to_hf(there, back, given, console), total))
            assert filecmp.cmp(work / "model/model.safetensors", back / "model.safetensors", shallow=False)
    print(f"\nmodel {total / MIB:.0f} MiB, its largest tensor {max(sizes) / MIB:.0f} MiB")
    print(
        "| direction | layout | a process without a model, MiB | at most above that, MiB, each rank | largest rank, ",
        end="",
    )
    print("of the model | all ranks, of the model | seconds |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\nall files equal to the original; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
