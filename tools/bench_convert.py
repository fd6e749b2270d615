"""Memory and time of conversions: from a Hugging Face folder to a Megatron checkpoint and back, under several layouts.

    python tools/bench_convert.py [--layers 4 12] [--hidden 1024] [--units 4096] [--vocab 16384] [--dtype float32]

Makes a random Qwen3 model with tied embeddings for each number of layers, converts it there and back under each layout
and compares the weight file with the original, byte by byte. Memory is resident memory of each process, as Linux counts
it, mapped files included, less what the process held with torch and Megatron loaded and no model. What a rank holds
beyond its own part of the weights must not grow with the number of layers.
"""

from __future__ import annotations

import argparse
import filecmp
import math
import shutil
import tempfile
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


def make_model(folder: Path, layers: int, options: argparse.Namespace) -> list[int]:
    """A random model in ``folder``; bytes of its tensors."""
    config = Qwen3Config(
        vocab_size=options.vocab,
        hidden_size=options.hidden,
        intermediate_size=options.units,
        num_hidden_layers=layers,
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


def row(layers: int, layout: str, direction: str, converted: Converted, total: int) -> str:
    """One line of the table."""
    most = max(converted.ranks, key=lambda rank: rank.peak)
    used = most.peak - most.before
    cells = [
        layers,
        layout,
        direction,
        f"{total / MIB:.0f}",
        f"{most.weights / MIB:.0f}",
        f"{used / MIB:.0f}",
        f"{(used - most.weights) / MIB:.0f}",
        f"{converted.seconds:.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--units", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=16_384)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    rows, largest = [], 0
    with tempfile.TemporaryDirectory() as folder, ConversionConsole() as console:
        for layers in options.layers:
            work = Path(folder) / str(layers)
            (work / "model").mkdir(parents=True)
            sizes = make_model(work / "model", layers, options)
            largest = max(sizes)
            for number, (name, layout) in enumerate(LAYOUTS.items()):
                given = [f"{key}={value}" for key, value in layout.items()]
                there, back = work / f"megatron-{number}", work / f"hf-{number}"
                made = to_megatron(work / "model", there, given, console)
                rows.append(row(layers, name, "to Megatron", made, sum(sizes)))
                rows.append(row(layers, name, "to HF", to_hf(there, back, given, console), sum(sizes)))
                assert filecmp.cmp(work / "model/model.safetensors", back / "model.safetensors", shallow=False)
                shutil.rmtree(there)
                shutil.rmtree(back)
    print(f"\nall files equal to the original; largest tensor {largest / MIB:.0f} MiB; MiB of the rank that used most:")
    print("| layers | layout | direction | model | its weights | at most | beyond its weights | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
