"""A scorer that speaks SGLang's HTTP and scores as it says: the log-prob of a token depends on the one before it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import numpy as np
from aiohttp import web
from aiohttp.test_utils import TestServer
from fake_scorer import encode

VOCAB = 512


class HonestScorer:
    """One server. ``seed`` makes the model; everything public may be changed while it runs, to make it a bad one."""

    def __init__(self, seed: int = 0, model_path: str = "models/math", weight_version: str = "models/math") -> None:
        logits = np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB))
        self.table = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
        self.model_path, self.weight_version, self.longest = model_path, weight_version, 4096
        self.ready = True
        self.cached: set[tuple[int, ...]] = set()  # whole texts: what a second request finds
        self.drift_warm = 0.0  # added to log-probs of a text that was seen before
        self.drift_part = 0.0  # added to log-probs when the prompt is longer than one token
        self.requests: list[dict] = []

    def logprobs(self, token_ids: list[int]) -> np.ndarray:
        """Of each token but the first, [N - 1] float32."""
        return self.table[token_ids[:-1], token_ids[1:]]

    def tokens(self, body: dict) -> list[int]:
        """What the server makes of a request's tokens."""
        return body["input_ids"]

    def echoed(self, body: dict, token_ids: list[int]) -> list[int]:
        """What it calls them in its answer."""
        return token_ids

    def account(self, body: dict) -> dict:
        """What it tells besides."""
        return {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """The server's URL."""
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/ready", self._ready)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")

    async def _ready(self, _: web.Request) -> web.Response:
        return web.Response(status=200 if self.ready else 503)

    async def _model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"model_path": self.model_path, "weight_version": self.weight_version})

    async def _server_info(self, _: web.Request) -> web.Response:
        return web.json_response({"max_req_input_len": self.longest + 1})

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        ids, start, top_k = self.tokens(body), body["logprob_start_len"], body.get("top_logprobs_num", 0)
        warm = tuple(ids) in self.cached
        self.cached.add(tuple(ids))
        values = self.logprobs(ids)[start:] + self.drift_warm * warm + self.drift_part * (start > 0)
        echoed = self.echoed(body, ids)[start:]
        rows = [[None, echoed[0], None]]
        rows += [[float(value), token, None] for value, token in zip(values, echoed[1:], strict=True)]
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": len(ids),
            "cached_tokens": start if warm else 0,
            "weight_version": self.weight_version,
            "input_token_logprobs": rows,
        }
        reply = {"text": "", "meta_info": meta | self._top(ids[start:-1], top_k) | self.account(body)}
        return web.json_response(reply, dumps=partial(json.dumps, separators=(",", ":")))  # compact, as SGLang writes

    def _top(self, before: list[int], k: int) -> dict:
        """Rows of the ``k`` most likely tokens after each of ``before``."""
        if not k:
            return {}
        ids = np.argsort(-self.table[before], axis=1, kind="stable")[:, :k]
        return {
            "input_top_logprobs_val_flat_b64": encode(np.take_along_axis(self.table[before], ids, axis=1), "<f4"),
            "input_top_logprobs_idx_flat_b64": encode(ids, "<i4"),
            "input_top_logprobs_val_flat_b64_dtype": "float32",
            "input_top_logprobs_idx_flat_b64_dtype": "int32",
            "input_top_logprobs_shape": list(ids.shape),
            "input_top_logprobs_null_prefix": 1,
        }
