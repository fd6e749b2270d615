"""Answers of an SGLang server at scale, made once and sent again and again, and a student that takes every batch.

    python tools/fake_cluster.py PORT COORDINATOR_URL TOKENS SAMPLES VOCABULARY RANKS

``tools/bench_coordinator.py`` starts it, so that what a server and a trainer cost is not counted as the coordinator's.
Responses have TOKENS tokens; that number i of a group begins with the id 3 + i, by which a scoring request names it.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys

import aiohttp
import numpy as np
from aiohttp import web

from megatron_opd.runtime.env import token
from megatron_opd.runtime.messages import RefreshReport

PROMPT = tuple(range(20, 84))
VERSION = "@@@@@@"  # replaced by digits of the same width
NAME = "@request@"  # replaced by the name that the request has


class Cluster:
    """Engine and teacher in one."""

    def __init__(self, tokens: int, samples: int, vocabulary: int) -> None:
        rng = np.random.default_rng(0)
        self.version = 0
        self._sampled, self._scored = [], []
        for number in range(samples):
            ids = rng.integers(3, vocabulary, tokens)
            ids[0] = 3 + number
            rows = [_rows(rng, ids) for _ in range(2)]
            self._sampled.append([part.encode() for part in _generation(ids, rows[0]).split(VERSION)])
            self._scored.append([part.encode() for part in _scoring(ids, rows[1]).split(NAME)])

    async def generate(self, request: web.Request) -> web.Response:
        """One group, or the scores of one response."""
        body = await request.read()
        if b'"n":' in body[:2000]:
            version = f"{self.version:06d}".encode()
            replies = b",".join(version.join(parts) for parts in self._sampled)
            return web.Response(body=b"[" + replies + b"]", content_type="application/json")
        first = body[:2000].split(b",")[len(PROMPT)]
        name = re.search(rb'"rid": ?"(\w+)"', body).group(1)
        return web.Response(body=name.join(self._scored[int(first) - 3]), content_type="application/json")

    async def train(self, coordinator: str, ranks: int) -> None:
        """Take the batches of all ranks and report the next weights, until the run is over."""
        headers = {"Authorization": f"Bearer {token()}"}
        async with aiohttp.ClientSession(headers=headers) as session:
            while True:
                training = {"time/train_s": 0.0} if self.version else {}
                report = RefreshReport(
                    version=self.version, refresh_s=0.0, refresh_bytes=1, probe_difference=0.0, training=training
                )
                async with session.post(f"{coordinator}/v1/refreshed", json=report.model_dump()) as answer:
                    answer.raise_for_status()
                url = f"{coordinator}/v1/batch/{self.version}"
                if not all([await self._batch(session, f"{url}/{rank}") for rank in range(ranks)]):
                    return  # each rank has been told
                self.version += 1

    @staticmethod
    async def _batch(session: aiohttp.ClientSession, url: str) -> int:
        """Bytes of a batch; 0 when the run is over."""
        while True:
            async with session.get(url) as answer:
                size = 0
                async for part in answer.content.iter_any():
                    size += len(part)
                if answer.status == 200:
                    return size


def _rows(rng: np.random.Generator, ids: np.ndarray) -> list[list]:
    logprobs = (-rng.exponential(0.5, len(ids))).astype(np.float32)  # as a server has them: 17 digits in JSON
    return [[float(logprob), int(one), None] for logprob, one in zip(logprobs, ids, strict=True)]


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _generation(ids: np.ndarray, rows: list) -> str:
    spans = [{"version": VERSION, "start": 0, "end": len(ids)}]
    finish = {"type": "length", "length": len(ids)}
    meta = {"finish_reason": finish, "weight_versions": spans, "output_token_logprobs": rows}
    return _json({"text": "", "output_ids": ids.tolist(), "meta_info": meta})


def _scoring(ids: np.ndarray, rows: list) -> str:
    finish = {"type": "length", "length": 0}
    meta = {
        "finish_reason": finish,
        "prompt_tokens": len(PROMPT) + len(ids),
        "cached_tokens": len(PROMPT) - 1,
        "id": NAME,
    }
    echoed = [[None, PROMPT[-1], None], *rows]
    return _json({"text": "", "output_ids": [], "meta_info": meta | {"input_token_logprobs": echoed}})


async def main(port: int, coordinator: str, tokens: int, samples: int, vocabulary: int, ranks: int) -> None:
    """Serve and train until the run is over."""
    cluster = Cluster(tokens, samples, vocabulary)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/generate", cluster.generate)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    print("ready", flush=True)
    await cluster.train(coordinator, ranks)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])))
