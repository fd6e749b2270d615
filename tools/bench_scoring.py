"""What scoring costs: tokens that a real server computes for each token it scores, and the decoding of its answers.

    python tools/bench_scoring.py [--engine sglang|vllm] [--groups 8] [--samples 8] [--prompt 512] [--response 128]

A server of the toy math teacher on the CPU scores groups of random responses to random prompts, all requests at once,
as a run sends them: for the whole text (start at 0), for the response only (start at the prompt's last token), and for
the response only after one sample of each group has been scored, so that the cache holds every prompt.
Before that, made-up answers in the form of either engine are decoded: text to checked arrays, CPU time of one thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from bench_topk import VOCABULARY, base64_body, milliseconds, rows

from megatron_opd.config import load_config
from megatron_opd.engines.connect import CLIENTS, new_client
from megatron_opd.engines.scores import ScoringClient
from megatron_opd.errors import EngineError
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import start
from megatron_opd.teachers.scoring import Scores, score, score_request
from megatron_opd.train.roles import replica_roles

TOY_VOCABULARY = 512
WHOLE, RESPONSE, STAGGERED = "whole text", "response only", "response only, one of each first"


async def measure(client: ScoringClient, options: argparse.Namespace, how: str) -> None:
    """Score fresh groups and print what they cost."""
    rng = np.random.default_rng(time.time_ns())
    requests = []
    for _ in range(options.groups):
        prompt = rng.integers(4, TOY_VOCABULARY, options.prompt)
        for _ in range(options.samples):
            text = np.r_[prompt, rng.integers(4, TOY_VOCABULARY, options.response)]
            cut = 1 if how == WHOLE else options.prompt
            requests.append(score_request(text[:cut], text[cut:], TOY_VOCABULARY, 0))
    parts = [requests[:: options.samples], [r for i, r in enumerate(requests) if i % options.samples]]
    began, found = time.perf_counter(), list[Scores]()
    for part in parts if how == STAGGERED else [requests]:
        found += await asyncio.gather(*(score(client, request) for request in part))
    seconds = time.perf_counter() - began
    wanted = options.response * len(found)
    prefilled = sum(scores.prefilled for scores in found)
    print(f"{how:31} {prefilled:>9,} prefilled {prefilled / wanted:7.2f} per scored token {seconds:8.2f} s")


async def serve_and_measure(options: argparse.Namespace) -> None:
    config = load_config(Path("conf/toy.yaml"), [f"teachers.math.server.engine={options.engine}", "engine.device=cpu"])
    teacher, url = config.teachers["math"], f"http://127.0.0.1:{free_port()}"
    (role,) = replica_roles(config.engine, 0, config.scoring.top_k, "teacher", teacher.server, teacher.model, [url])
    with tempfile.TemporaryDirectory() as folder:
        child = start(role.name, role.argv, role.environment, Path(folder) / "server.log")
        client = new_client(config.engine, teacher.server, url)
        try:
            await client.wait_until_ready(config.engine.start_timeout_s)
            for how in (WHOLE, RESPONSE, STAGGERED) * 2:  # the first one also warms the server up
                await measure(client, options, how)
        finally:
            await client.close()
            for process in [*psutil.Process(child.process.pid).children(recursive=True), child.process]:
                process.kill()


def sglang_reply(ids: np.ndarray, cut: int, k: int) -> str:
    length = len(ids) - cut
    meta = {
        "input_token_logprobs": [[None, int(ids[cut - 1]), None]]
        + [[-float(i % 97) / 7, token, None] for i, token in enumerate(ids[cut:].tolist())],
        "prompt_tokens": len(ids),
        "cached_tokens": 0,
        "finish_reason": {"type": "length", "length": 0},
    }
    meta |= json.loads(base64_body(rows(length, k))) if k else {}
    return json.dumps({"meta_info": meta}, separators=(",", ":"))


def vllm_reply(ids: np.ndarray, k: int) -> str:
    top = rows(len(ids), k) if k else None
    listed: list[dict | None] = []
    for i, token in enumerate(ids.tolist()):
        row = {str(token): {"logprob": -float(i % 97) / 7, "rank": k + 1, "decoded_token": " word"}}
        if top is not None:
            pairs = zip(top.ids[i].tolist(), top.logprobs[i].tolist(), strict=True)
            row |= {str(t): {"logprob": v, "rank": r, "decoded_token": " word"} for r, (t, v) in enumerate(pairs, 1)}
        listed.append(row if i else None)
    choice = {"prompt_logprobs": listed, "prompt_token_ids": ids.tolist(), "finish_reason": "length"}
    usage = {"prompt_tokens": len(ids), "prompt_tokens_details": None}
    return json.dumps({"choices": [choice], "usage": usage, "model": "m"}, separators=(",", ":"))


def require(ok: bool, kind: str, what: str, got: object, expected: object) -> None:
    """The checks of a scoring request, as an error of this script."""
    if not ok:
        raise EngineError(what, kind=kind, got=got, expected=expected)


def decoding(prompt: int, response: int, k: int, repeat: int) -> None:
    """Print bytes and milliseconds of one answer of each engine."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, prompt + response)
    request = score_request(ids[:prompt], ids[prompt:], VOCABULARY, k)
    bodies = {
        "sglang": sglang_reply(ids, prompt, k).encode(),
        "vllm": vllm_reply(ids, k).encode(),
    }
    for name, body in bodies.items():
        client = CLIENTS[name]
        spent = milliseconds(lambda c=client, b=body: c.read_scores(c.read_answer(b), request, require), repeat)
        print(f"{name:7} K={k:<3} {len(body):>12,} bytes {spent:9.2f} ms to decode {prompt} + {response} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("sglang", "vllm"), default="sglang")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    for k in (0, 16):
        decoding(1024, 4096, k, options.repeat)
    asyncio.run(serve_and_measure(options))


if __name__ == "__main__":
    main()
