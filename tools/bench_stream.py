"""How fast a streamed training file gives its first prompt, and how many a second after that, in how much memory.

    python tools/bench_stream.py [--gigabytes 4] [--prompts 20000] [--folder FOLDER]

Writes files of math and code records (about a kilobyte each) of a hundredth, a tenth and the whole size, and opens each
in a process of its own, after asking the kernel to forget what it has in memory of them. "memory" is the resident size
of that process above what it had before the file was opened: the tokenizer and Python are not counted. "all in memory"
is what a run does without ``data.stream``; of the smallest file only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megatron_opd.config import Config, load_config
from megatron_opd.data.inputs import open_stream
from megatron_opd.data.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
HEAD = "| file | records | how | first prompt, s | prompts/s | memory, MB |\n|---|---|---|---|---|---|"
KINDS = {
    "stream": ["data.stream.window_mb=32"],
    "stream, mixture": ["data.stream.window_mb=32", "data.mixture={math: 0.7, code: 0.3}"],
    "all in memory": [],
}


def write(path: Path, size: int) -> int:
    """Records of about a kilobyte until the file has ``size`` bytes; returns how many."""
    words = ["sum", "field", "prime", "graph", "list", "circle", "even", "matrix", "string", "seven"]
    texts = [" ".join(random.Random(seed).choices(words, k=140)) for seed in range(1000)]
    count = written = 0
    with path.open("w") as file:
        while written < size:
            domain = "math" if count % 4 else "code"
            record = {"id": f"r{count}", "prompt": texts[count % 1000], "answer": str(count), "domain": domain}
            written += file.write(json.dumps(record) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return count


def measure(path: Path, kind: str, prompts: int) -> dict[str, float]:
    """Open the file as a run does and draw."""
    config: Config = load_config(
        ROOT / "conf/toy.yaml",
        [f"data.train={path}", "data.eval=null", "data.columns.id=id", "data.max_prompt_tokens=4096", *KINDS[kind]],
    )
    tokenizer = load_tokenizer(config.student.model)
    tokenizer.apply_chat_template([{"role": "user", "content": "?"}])  # compiles the template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    stream, _ = open_stream(config, tokenizer)
    stream.take(1)
    first = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(prompts // 50):
        stream.take(50)
    speed = prompts / (time.perf_counter() - began)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"first": first, "speed": speed, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--prompts", type=int, default=20000)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are written, and removed again")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "KIND"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(Path(given.measure[0]), given.measure[1], given.prompts)))
        return
    print(HEAD)
    for share in (0.01, 0.1, 1.0):
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            path = Path(folder) / "train.jsonl"
            records = write(path, int(given.gigabytes * share * 1e9))
            for kind in KINDS if share == 0.01 else ("stream", "stream, mixture"):
                command = [sys.executable, __file__, "--prompts", str(given.prompts), "--measure", str(path), kind]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                size = f"{path.stat().st_size / 1e9:.2f} GB"
                print(
                    f"| {size} | {records} | {kind} | {found['first']:.2f} | {found['speed']:.0f} "
                    f"| {found['memory']:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
